"""Invalid folders. Each function before DAMAGES damages a copy and returns the expected error."""

import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoints import STEM, edit, refused, same, state

from gadjax.formats import diffusers_folder, weights
from gadjax.formats.diffusers_folder import check_pipeline, read_pipeline
from gadjax.formats.diffusers_writer import write_pipeline
from gadjax.models.params import flatten


def retensor(source, change):
    """Change the transformer's tensors in place by the safetensors library."""
    path = source / "transformer" / f"{STEM}.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    return path


def no_folder(source):
    shutil.rmtree(source)
    return source, "no such folder", "hf download"


def no_index(source):
    (source / "model_index.json").unlink()
    return source, "no model_index.json", "a diffusers pipeline folder"


def broken_index(source):
    (source / "model_index.json").write_text("{")
    return source / "model_index.json", "corrupt", "expected JSON"


def odd_entry(source):
    edit(source / "model_index.json", vae=["AutoencoderKL"])
    return source / "model_index.json", "vae: ['AutoencoderKL']", "[library, class]"


def entry_outside(source):
    edit(source / "model_index.json", **{"../vae": ["diffusers", "AutoencoderKL"]})
    return source / "model_index.json", "'../vae'", "a folder's name"


def no_networks(source):
    edit(
        source / "model_index.json",
        **dict.fromkeys(("transformer", "vae", "text_encoder"), [None, None]),
    )
    return source / "model_index.json", "no networks"


def unsupported(source):
    edit(source / "model_index.json", transformer_2=["diffusers", "SD3TransformerModel"])
    return (
        source / "model_index.json",
        "transformer_2 of class diffusers.SD3TransformerModel",
        f"(SD3Transformer2DModel is the nearest of {', '.join(diffusers_folder.COMPONENTS)})",
    )


def other_class(source):
    edit(source / "vae" / "config.json", _class_name="AutoencoderDC")
    return source / "vae" / "config.json", "AutoencoderDC", "expected AutoencoderKL"


def option(source):
    edit(source / "transformer" / "config.json", norm_type="ada_norm_zero")
    return source / "transformer" / "config.json", "norm_type", "ada_norm_zero", "expected"


def option_type(source):
    edit(source / "vae" / "config.json", block_out_channels=8)
    return source / "vae" / "config.json", "make no AutoencoderKL"


def no_config(source):
    (source / "vae" / "config.json").unlink()
    return source / "vae" / "config.json", "No such file"


def no_scheduler(source):
    (source / "scheduler" / "scheduler_config.json").unlink()
    return source / "scheduler" / "scheduler_config.json", "No such file"


def no_tokenizer(source):
    shutil.rmtree(source / "tokenizer")
    return source / "tokenizer", "no files", "those of the tokenizer"


def no_weights(source):
    (source / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    return source / "vae", "no weights, only config.json"


def truncated(source):
    path = source / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path, "truncated", "expected"


def pickled(source):
    path = source / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(safetensors.torch.load_file(path), path.with_suffix(".bin"))
    path.unlink()
    return path.with_suffix(".bin"), "pickle", "expected safetensors"


def keys(source):
    def change(tensors):
        tensors["stranger"] = tensors.pop("proj_out.weight")

    path = retensor(source, change)
    return path, "PixArtTransformer2DModel", "1 missing: proj_out.weight", "unexpected: stranger"


def shape(source):
    def change(tensors):
        tensors["proj_out.weight"] = tensors["proj_out.weight"].T.contiguous()

    return retensor(source, change), "proj_out.weight (found (24, 32), expected (32, 24))"


def layers(source):
    edit(source / "transformer" / "config.json", num_layers=1)
    return source / "transformer", "unexpected: transformer_blocks.1."


def dtype_of_a_layer(source):
    key = "transformer_blocks.1.attn1.to_q.weight"
    path = retensor(source, lambda tensors: tensors.update({key: tensors[key].half()}))
    return path, f"{key} (float16, while transformer_blocks.0.attn1.to_q.weight is float32)"


def integers(source):
    key = "proj_out.weight"
    path = retensor(source, lambda tensors: tensors.update({key: tensors[key].to(torch.int8)}))
    return path, f"{key} (int8)", "floating-point"


DAMAGES = [
    no_folder,
    no_index,
    broken_index,
    odd_entry,
    entry_outside,
    no_networks,
    unsupported,
    other_class,
    option,
    option_type,
    no_config,
    no_scheduler,
    no_tokenizer,
    no_weights,
    truncated,
    pickled,
    keys,
    shape,
    layers,
    dtype_of_a_layer,
    integers,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_refused_before_any_data_is_read(source, damage, monkeypatch):
    words = damage(source)
    monkeypatch.setattr(weights.Tensor, "read", lambda self: pytest.fail("data were read"))
    refused(lambda: read_pipeline(source), *words)


def test_values_not_finite(source, tmp_path):
    path = retensor(source, lambda tensors: tensors["proj_out.bias"].fill_(float("nan")))
    refused(lambda: read_pipeline(source), path, "NaN or infinity in proj_out.bias")
    retensor(source, lambda tensors: tensors["proj_out.bias"].fill_(1e5))
    read_pipeline(source, dtype=ml_dtypes.bfloat16)
    refused(lambda: read_pipeline(source, dtype=np.float16), path, "proj_out.bias", "float16")


def test_pickles_on_request(source, tmp_path):
    before = read_pipeline(source).components["vae"].params
    pickled(source)
    pipeline = read_pipeline(source, allow_pickle=True)
    after = pipeline.components["vae"].params
    for path, leaf in flatten(before).items():
        assert flatten(after)[path].tobytes() == leaf.tobytes()
    dst = write_pipeline(pipeline, tmp_path / "dst", {"vae": after})
    assert same(state(dst, "vae"), torch.load(source / "vae" / "diffusion_pytorch_model.bin"))


def test_variant_and_network_that_are_not_there(tiny_pipeline):
    refused(lambda: check_pipeline(tiny_pipeline, variant="fp16"), "no variant fp16", "plain")
    refused(lambda: read_pipeline(tiny_pipeline, components=["unet"]), tiny_pipeline, "no unet")
