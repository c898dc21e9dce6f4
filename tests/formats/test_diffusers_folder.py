import importlib
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoints import edit, params_of, refused, same, state
from diffusers import AutoencoderKL, PixArtAlphaPipeline, PixArtTransformer2DModel
from transformers import T5EncoderModel

from gadjax.formats import diffusers_folder, weights
from gadjax.formats.diffusers_folder import check_pipeline, read_pipeline
from gadjax.formats.diffusers_writer import write_pipeline
from gadjax.formats.fingerprints import text_fingerprint
from gadjax.formats.state_dict import tensors_from_params
from gadjax.models.params import cast, flatten
from gadjax.pipelines.pipeline import load_pipeline

NETWORKS = {
    "transformer": (PixArtTransformer2DModel, "diffusion_pytorch_model"),
    "vae": (AutoencoderKL, "diffusion_pytorch_model"),
    "text_encoder": (T5EncoderModel, "model"),
}
DTYPES = {
    torch.float32: np.dtype(np.float32),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    torch.float16: np.dtype(np.float16),
}


def save(torch_pipeline, base, dst, dtype=torch.float32, **options):
    """The pipeline's folder with its networks in `dtype`, as diffusers and transformers save it."""
    shutil.copytree(base, dst)
    for name, (kind, _) in NETWORKS.items():
        shutil.rmtree(dst / name)
        network = getattr(torch_pipeline, name)
        copy = kind(network.config) if name == "text_encoder" else kind.from_config(network.config)
        copy.load_state_dict(network.state_dict())
        copy.to(dtype).save_pretrained(dst / name, **options)
    return dst


def test_table_names_the_modules_classes():
    named = {}
    for class_name, module in diffusers_folder.COMPONENTS.items():
        named.setdefault(module, set()).add(class_name)
    for module, classes in named.items():
        assert classes == set(importlib.import_module(module).FAMILY.class_names)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"max_shard_size": 10_000}, {"variant": "fp16"}], ids=["one", "split", "fp16"]
)
def test_round_trip_is_bit_exact(torch_pipeline, tiny_pipeline, tmp_path, dtype, options):
    src = save(torch_pipeline, tiny_pipeline, tmp_path / "src", dtype, **options)
    pipeline = read_pipeline(src, variant=options.get("variant"))
    for part in pipeline.components.values():
        assert part.weights.variant == options.get("variant")
        assert len(part.weights.files) > 2 or "max_shard_size" not in options
        assert {leaf.dtype for leaf in flatten(part.params).values()} == {DTYPES[dtype]}
    write_pipeline(pipeline, tmp_path / "dst", params_of(pipeline))
    for name, (_, stem) in NETWORKS.items():
        held = sorted(p.name for p in (tmp_path / "dst" / name).iterdir())
        assert held == sorted(["config.json", f"{stem}.safetensors"])
        original = state(src, name)
        assert same(state(tmp_path / "dst", name), original)
        expected = {k: v.to(dtype) for k, v in getattr(torch_pipeline, name).state_dict().items()}
        expected.pop("encoder.embed_tokens.weight", None)  # tied to shared.weight
        assert same(original, expected)


def test_diffusers_loads_what_is_written(torch_pipeline, tiny_pipeline, tmp_path):
    dst = tmp_path / "dst"
    pipeline = read_pipeline(tiny_pipeline)
    write_pipeline(pipeline, dst, params_of(pipeline))
    for name, (kind, _) in NETWORKS.items():
        network, info = kind.from_pretrained(dst / name, output_loading_info=True)
        assert not any(info.values()), info
        assert same(network.state_dict(), getattr(torch_pipeline, name).state_dict())
    loaded = PixArtAlphaPipeline.from_pretrained(dst)
    assert {k: v for k, v in loaded.scheduler.config.items() if k != "_use_default_values"} == {
        k: v for k, v in torch_pipeline.scheduler.config.items() if k != "_use_default_values"
    }
    words = ["a red circle above blue"]
    assert loaded.tokenizer(words)["input_ids"] == torch_pipeline.tokenizer(words)["input_ids"]


def test_parts_of_a_variant_are_copied_under_plain_names(torch_pipeline, tiny_pipeline, tmp_path):
    src = save(
        torch_pipeline, tiny_pipeline, tmp_path / "src", variant="fp16", max_shard_size=20_000
    )
    pipeline = read_pipeline(src)
    params = {"transformer": pipeline.components["transformer"].params}
    dst = write_pipeline(pipeline, tmp_path / "dst", params)
    assert not list(dst.rglob("*fp16*"))
    loaded = PixArtAlphaPipeline.from_pretrained(dst)
    for name in NETWORKS:
        expected = getattr(torch_pipeline, name).state_dict()
        assert same(getattr(loaded, name).state_dict(), expected)


def test_single_file_next_to_an_index(torch_pipeline, tiny_pipeline, tmp_path):
    """As left by a second save: diffusers reads the index, transformers the single file."""
    old = save(torch_pipeline, tiny_pipeline, tmp_path / "old")
    for name, (kind, _) in NETWORKS.items():
        network = kind.from_pretrained(old / name)
        with torch.no_grad():
            for value in network.parameters():
                value.mul_(0.5)
        network.save_pretrained(tmp_path / name, max_shard_size=10_000)
        shutil.copytree(tmp_path / name, old / name, dirs_exist_ok=True)
    pipeline = read_pipeline(old)
    for name, (kind, stem) in NETWORKS.items():
        part = pipeline.components[name]
        assert part.weights.unused_files
        single_file = part.library == "transformers"
        ending = "safetensors" if single_file else "safetensors.index.json"
        assert f"{name}/{stem}.{ending}" in pipeline.files
        ours = dict(tensors_from_params(part.params, part.keymap))
        theirs = kind.from_pretrained(old / name).state_dict()
        for key, value in ours.items():
            np.testing.assert_array_equal(value, theirs[key].numpy(), key)


@pytest.mark.parametrize("held", ["shared", "encoder.embed_tokens", "both"])
@pytest.mark.parametrize("tied", [True, False])
def test_t5s_embedding_under_either_name(tiny_pipeline, tmp_path, held, tied):
    src = shutil.copytree(tiny_pipeline, tmp_path / "src")
    folder, path = src / "text_encoder", src / "text_encoder" / "model.safetensors"
    edit(folder / "config.json", tie_word_embeddings=tied)
    tensors = state(src, "text_encoder")
    value = tensors.pop("shared.weight")
    names = ["shared", "encoder.embed_tokens"] if held == "both" else [held]
    tensors |= {f"{name}.weight": value.clone() for name in names}
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    theirs = T5EncoderModel.from_pretrained(folder).encoder.embed_tokens.weight.detach().numpy()
    read = read_pipeline(src, components=["text_encoder"]).components["text_encoder"].params
    np.testing.assert_array_equal(read["shared"]["embedding"], theirs)
    if held == "both":  # of which transformers takes the second, and no longer ties them
        tensors["encoder.embed_tokens.weight"] *= 0.5
        safetensors.torch.save_file(tensors, path, {"format": "pt"})
        words = "encoder.embed_tokens.weight and shared.weight with different values"
        refused(lambda: read_pipeline(src), path, words)


def test_variant_of_some_parts(torch_pipeline, tiny_pipeline, tmp_path, caplog):
    """Parts without the variant are read from their plain files, as in diffusers."""
    src = save(torch_pipeline, tiny_pipeline, tmp_path / "src")
    with torch.no_grad():
        network = PixArtTransformer2DModel.from_pretrained(src / "transformer")
        network.proj_out.bias.add_(1)
    network.save_pretrained(src / "transformer", variant="fp16")
    pipeline, params = load_pipeline(src, variant="fp16")
    assert "transformer/diffusion_pytorch_model.fp16.safetensors" in pipeline.folder.files
    assert "vae/diffusion_pytorch_model.safetensors" in pipeline.folder.files
    (warning,) = [record for record in caplog.records if record.name == "gadjax.pipelines.pipeline"]
    assert pipeline.folder.files in warning.getMessage()
    theirs = PixArtAlphaPipeline.from_pretrained(src, variant="fp16")
    bias = params["transformer"]["proj_out"]["bias"]
    np.testing.assert_array_equal(bias, theirs.transformer.proj_out.bias.detach().numpy())
    identity = text_fingerprint(src, variant="fp16")
    assert identity == text_fingerprint(src)
    (src / "vae" / "diffusion_pytorch_model.safetensors").rename(
        src / "vae" / "diffusion_pytorch_model.bf16.safetensors"
    )
    refused(lambda: load_pipeline(src, variant="fp16"), src / "vae", "bf16", "the plain one")


def test_dtypes_on_reading_and_writing(tiny_pipeline, tmp_path):
    half = ml_dtypes.bfloat16
    pipeline = read_pipeline(tiny_pipeline, dtype=half)
    params = params_of(pipeline)
    assert {leaf.dtype for leaf in flatten(params["vae"]).values()} == {np.dtype(half)}
    wide = {name: cast(tree, np.float32) for name, tree in params.items()}
    dst = write_pipeline(pipeline, tmp_path / "dst", wide, dtype=half)
    for name in NETWORKS:
        expected = {k: v.to(torch.bfloat16) for k, v in state(tiny_pipeline, name).items()}
        assert same(state(dst, name), expected)


def test_fingerprint_survives_the_round_trip(tiny_pipeline):
    for part in read_pipeline(tiny_pipeline).components.values():
        tensors = tensors_from_params(part.params, part.keymap, views=True)
        assert weights.fingerprint(tensors) == weights.fingerprint(part.weights)


def test_absent_parts_and_arguments(source):
    index = source / "model_index.json"
    edit(index, safety_checker=[None, None], requires_safety_checker=False, vae=[None, None])
    assert set(check_pipeline(source).components) == {"transformer", "text_encoder"}
