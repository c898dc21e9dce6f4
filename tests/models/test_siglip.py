"""SigLIP's text tower against transformers' class, through folders that transformers wrote."""

import jax
import numpy as np
import pytest
import torch
import transformers

from gadjax.errors import InputError
from gadjax.features.network import load_params
from gadjax.models.module import functional
from gadjax.models.text import siglip

SIZES = {
    "small": {
        "vocab_size": 40,
        "hidden_size": 24,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 9,
    },
    "another width of the vector": {
        "vocab_size": 70,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
        "projection_size": 20,
        "layer_norm_eps": 1e-3,
        "hidden_act": "gelu",
    },
}
# As google/siglip-base-patch16-224 and google/siglip2-so400m-patch14-384 have them.
PUBLISHED = {
    "SigLIP B": {"vocab_size": 32000},
    "SigLIP 2 So400m": {
        "vocab_size": 256000,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
    },
}


@pytest.mark.parametrize("name", SIZES)
def test_vectors_are_those_of_transformers(name, tmp_path):
    """Of sequences of all lengths up to the table's; padding counts like any token."""
    torch.manual_seed(0)
    vision = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    vision |= {"intermediate_size": 30, "image_size": 16, "patch_size": 8}
    model = transformers.SiglipModel(
        transformers.SiglipConfig(text_config=SIZES[name], vision_config=vision)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape))
    model.eval().save_pretrained(tmp_path)
    config = siglip.Config.from_dict(SIZES[name])
    network = functional(siglip.build(config))
    params, _ = load_params(tmp_path, network, siglip.KEYMAP)
    rng = np.random.default_rng(0)
    for length in (1, config.max_position_embeddings):
        ids = rng.integers(0, config.vocab_size, (4, length))
        with torch.no_grad():
            expected = model.get_text_features(torch.from_numpy(ids)).pooler_output.numpy()
        with jax.default_matmul_precision("highest"):
            found = np.asarray(network.apply(params, ids.astype(np.int32)))
        assert found.shape == (4, config.width)
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    with pytest.raises(InputError, match=f"found {length + 1} tokens; expected at most {length}"):
        network.apply(params, np.zeros((1, length + 1), np.int32))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """Every parameter of transformers' class, on the meta device."""
    options = PUBLISHED[name]
    network = functional(siglip.build(siglip.Config.from_dict(options)))
    count = sum(np.prod(x.shape) for x in jax.tree.leaves(network.abstract))
    with torch.device("meta"):
        text = transformers.SiglipTextModel(transformers.SiglipTextConfig(**options))
    assert count == sum(parameter.numel() for parameter in text.parameters())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "relu"),
        ("hidden_size", "24"),
        ("num_attention_heads", 5),
        ("layer_norm_eps", None),
        ("projection_size", 0),
    ],
)
def test_refusals(key, value):
    with pytest.raises(InputError, match=f"{key}: found"):
        siglip.Config.from_dict(SIZES["small"] | {key: value})
