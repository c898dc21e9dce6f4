"""FLUX.2-klein's transformer: the conformance suite, and what only this family has."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from conformance import BackboneSuite, Case, Published, Rules, Size, Tangents, loaded, torch_class
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel

from gadjax.errors import InputError
from gadjax.models import flux2
from gadjax.models.flux2.prompts import KleinPromptEncoder

PUBLISHED = json.loads(Path(__file__).parents[1].joinpath("published.json").read_text())
REAL = PUBLISHED["FLUX.2-klein-base-4B"]["transformer/config.json"]
LENGTH = 7  # of the text


def tiny(heads, axes, double, single, *, joint=20, channels=12, **more):
    return REAL | {
        "num_attention_heads": heads,
        "attention_head_dim": sum(axes),
        "axes_dims_rope": list(axes),
        "num_layers": double,
        "num_single_layers": single,
        "joint_attention_dim": joint,
        "in_channels": channels,
        "timestep_guidance_channels": 32,
        **more,
    }


# Name -> config, latent height and width.
SIZES = {
    "square": Size(tiny(3, (4, 6, 2, 4), 2, 2), 4, 4),
    "wide": Size(tiny(2, (2, 4, 6, 8), 1, 3, joint=28, channels=10, rope_theta=300), 3, 7),
    "tall": Size(tiny(4, (6, 2, 2, 4), 3, 1, channels=8, mlp_ratio=2.5, eps=1e-3), 6, 2),
}
CASE = Case(
    family=flux2.FAMILY,
    torch_network=torch_class(Flux2Transformer2DModel),
    sizes=SIZES,
    times=lambda config: (1.0, 499.25, 1000.0),
    extras=lambda config, r, batch: None,
    blocks=lambda model: [*model.transformer_blocks, *model.single_transformer_blocks],
    # A single block's sequence begins with the text.
    tokens=lambda out: out[1] if isinstance(out, tuple) else out[:, LENGTH:],
    length=LENGTH,
    tangents=Tangents(
        size=Size(tiny(2, (2, 2, 4, 2), 1, 1, channels=4), 2, 3),
        paths=(
            "double_blocks/attn_context/to_k/kernel",
            "single_blocks/attn/to_qkv_mlp_proj/kernel",
            "single_stream_modulation/linear/kernel",
        ),
        times=(1.0, 499.25),
        length=3,
    ),
    bfloat16=SIZES["wide"],
    fresh=SIZES["square"],
    layers="single_blocks/attn/to_out/kernel",
    published={"klein-base-4B": Published(REAL, 3_875_544_576, 169)},
    rules=Rules(mesh={"fsdp": 64, "tensor": 8}, complete=True, replicated=("/scale",)),
    refused_in=REAL,
    refused=[
        ("patch_size", 2),
        ("guidance_embeds", True),
        ("out_channels", 64),
        ("axes_dims_rope", [32, 32, 32, 33]),
        ("axes_dims_rope", [32, 96]),
        ("axes_dims_rope", [31, 33, 32, 32]),
        ("axes_dims_rope", "32"),
        ("num_single_layers", 0),
        ("num_layers", "5"),
        ("mlp_ratio", -3.0),
        ("timestep_guidance_channels", 255),
        ("eps", 0),
        ("rope_theta", "2000"),
        ("qk_norm", "rms_norm"),
        ("quantization_config", {"load_in_4bit": True}),
    ],
)


class TestFlux2(BackboneSuite):
    case = CASE
    test_kv_cache_stands_for_the_prompt = None  # the text's stream changes from layer to layer

    @pytest.mark.slow
    def test_features_of_listed_blocks_are_their_tokens(self, size):
        super().test_features_of_listed_blocks_are_their_tokens(size)

    @pytest.mark.slow
    def test_derivatives_are_those_of_central_differences(self):
        super().test_derivatives_are_those_of_central_differences()

    @pytest.mark.slow
    def test_bfloat16_is_close(self):
        super().test_bfloat16_is_close()


def test_a_config_that_does_not_deny_its_guidance_has_it():
    """As the class in diffusers, whose default is FLUX.2-dev's."""
    config = {key: value for key, value in REAL.items() if key != "guidance_embeds"}
    with pytest.raises(InputError, match="^guidance_embeds: found True; expected False$"):
        CASE.config(config)


def test_positions_are_those_of_the_pipeline():
    """The class is called with them in the other tests."""
    seen = {}

    def network(**inputs):
        seen.update(inputs)
        return type("Out", (), {"sample": inputs["hidden_states"]})

    both = loaded(CASE, "wide")
    x, t, cond = both.inputs
    CASE.torch_call(network, SIZES["wide"].config, x, t, cond)
    nchw = seen["hidden_states"].new_zeros(1, 10, 3, 7)
    theirs = Flux2KleinPipeline._prepare_latent_ids(nchw)[0]
    assert (seen["img_ids"] == theirs).all() and len(theirs) == 21
    texts = Flux2KleinPipeline._prepare_text_ids(seen["encoder_hidden_states"])[0]
    assert (seen["txt_ids"] == texts).all() and len(texts) == LENGTH
    packed = Flux2KleinPipeline._pack_latents(
        seen["hidden_states"].new_tensor(x.transpose(0, 3, 1, 2))
    )
    assert (seen["hidden_states"] == packed).all()


def test_the_text_is_three_states_and_its_padding_takes_part():
    states = [np.full((2, 5, 4), value) for value in (1, 2, 3)]

    def qwen3(params, ids, mask, after):
        assert after == (9, 18, 27) and mask.sum() == 6
        return tuple(states)

    encoder, mask = KleinPromptEncoder(None, qwen3), np.zeros((2, 5), np.int32)
    mask[0, :1], mask[1] = 1, 1
    embeds = encoder.encode({"text_encoder": {}}, np.zeros_like(mask), mask)
    np.testing.assert_array_equal(embeds.embeds, np.repeat([1, 2, 3], 4) * np.ones((2, 5, 1)))
    assert np.asarray(embeds.mask).all() and embeds.pooled is None


@pytest.mark.slow
def test_too_shallow_a_text_encoder_is_refused(folders):
    """transformers' hidden_states[27] of 27 layers are behind the final norm."""
    from gadjax.models.flux2.prompts import prompts
    from gadjax.models.text.prompts import TextComponents
    from gadjax.pipelines.pipeline import abstract_pipeline

    pipeline, _ = abstract_pipeline(folders("flux2_klein"))
    specs = {name: part.spec for name, part in pipeline.folder.components.items()}
    apply = {name: network.apply for name, network in pipeline.networks.items()}

    def parts(layers, **index):
        spec = type(specs["text_encoder"])(
            **vars(specs["text_encoder"]) | {"num_hidden_layers": layers}
        )
        return TextComponents(
            pipeline.folder.path,
            pipeline.folder.model_index | index,
            apply,
            specs | {"text_encoder": spec},
        )

    config = specs["transformer"]
    with pytest.raises(
        InputError, match="found a text encoder of 27 layers; expected more than 27"
    ):
        prompts(parts(27), config)
    assert prompts(parts(28), config).guidance == 4.0
    assert prompts(parts(28, is_distilled=True), config).guidance == 1.0
    assert jax.tree.leaves(pipeline.latent) == [4, 4, 16] and pipeline.upscale == 4
