import importlib
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, PixArtAlphaPipeline, PixArtTransformer2DModel
from transformers import T5EncoderModel

from gadjax.convert import files, folder
from gadjax.convert.folder import check_pipeline, read_pipeline, write_pipeline
from gadjax.errors import InputError
from gadjax.models.module import cast, flatten

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


def state(path, name):
    """A component's tensors by the safetensors library, from all its files."""
    paths = sorted((path / name).glob("*.safetensors"))
    return {k: v for p in paths for k, v in safetensors.torch.load_file(p).items()}


def same(ours, theirs):
    return set(ours) == set(theirs) and all(
        ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key])
        for key in theirs
    )


def params_of(pipeline):
    return {name: part.params for name, part in pipeline.components.items()}


def refused(call, *words):
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


@pytest.fixture
def source(tiny_pipeline, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(tiny_pipeline, tmp_path / "source")


def edit(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "removed"}))


def retensor(source, change, name="transformer"):
    """Change a component's tensors in place by the safetensors library."""
    path = source / name / f"{NETWORKS[name][1]}.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_table_names_the_modules_classes():
    named = {}
    for class_name, module in folder.COMPONENTS.items():
        named.setdefault(module, set()).add(class_name)
    for module, classes in named.items():
        assert classes == set(importlib.import_module(module).CLASS_NAMES)


# Round trips


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
    write_pipeline(src, tmp_path / "dst", params_of(pipeline))
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
    write_pipeline(tiny_pipeline, dst, params_of(read_pipeline(tiny_pipeline)))
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


def test_one_network_replaced(tiny_pipeline, tmp_path):
    src, dst = shutil.copytree(tiny_pipeline, tmp_path / "src"), tmp_path / "dst"
    (src / "LICENSE.md").write_text("terms")
    pipeline = read_pipeline(src, components=["transformer"])
    assert pipeline.components["vae"].params is None
    params = pipeline.components["transformer"].params
    params["pos_embed"]["proj"]["bias"][:] = 3
    scheduler = pipeline.scheduler | {"_class_name": "EulerDiscreteScheduler", "beta_end": 0.5}
    write_pipeline(
        src,
        dst,
        {"transformer": params},
        scheduler=scheduler,
        extra_files={"README.md": "# Käse", "gadjax.json": b"{}"},
    )
    assert state(dst, "transformer")["pos_embed.proj.bias"].eq(3).all()
    changed = {"scheduler/scheduler_config.json", "model_index.json"}
    changed |= {"transformer/diffusion_pytorch_model.safetensors"}
    for path in src.rglob("*"):
        name = str(path.relative_to(src))
        if path.is_file():
            assert (path.read_bytes() == (dst / name).read_bytes()) == (name not in changed), name
    index = {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    assert folder.read_json(dst / "model_index.json") == pipeline.model_index | index
    assert check_pipeline(dst).scheduler == scheduler
    assert (dst / "README.md").read_text(encoding="utf-8") == "# Käse"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]


def test_parts_of_a_variant_are_copied_under_plain_names(torch_pipeline, tiny_pipeline, tmp_path):
    src = save(
        torch_pipeline, tiny_pipeline, tmp_path / "src", variant="fp16", max_shard_size=20_000
    )
    pipeline = read_pipeline(src)
    dst = write_pipeline(
        src, tmp_path / "dst", {"transformer": pipeline.components["transformer"].params}
    )
    assert not list(dst.rglob("*fp16*"))
    loaded = PixArtAlphaPipeline.from_pretrained(dst)
    for name in NETWORKS:
        expected = getattr(torch_pipeline, name).state_dict()
        assert same(getattr(loaded, name).state_dict(), expected)


def test_dtypes_on_reading_and_writing(tiny_pipeline, tmp_path):
    half = ml_dtypes.bfloat16
    pipeline = read_pipeline(tiny_pipeline, dtype=half)
    params = params_of(pipeline)
    assert {leaf.dtype for leaf in flatten(params["vae"]).values()} == {np.dtype(half)}
    wide = {name: cast(tree, np.float32) for name, tree in params.items()}
    dst = write_pipeline(tiny_pipeline, tmp_path / "dst", wide, dtype=half)
    for name in NETWORKS:
        expected = {k: v.to(torch.bfloat16) for k, v in state(tiny_pipeline, name).items()}
        assert same(state(dst, name), expected)


def test_fingerprint_survives_the_round_trip(tiny_pipeline):
    for part in read_pipeline(tiny_pipeline).components.values():
        tensors = folder.tensors_from_params(part.params, part.module.KEYMAP, views=True)
        assert files.fingerprint(tensors) == files.fingerprint(part.weights)


def test_absent_parts_and_arguments(source):
    index = source / "model_index.json"
    edit(index, safety_checker=[None, None], requires_safety_checker=False, vae=[None, None])
    assert set(check_pipeline(source).components) == {"transformer", "text_encoder"}


# Refusals on reading. Each damages a copy of the folder and returns the words that the refusal must have.


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
    edit(source / "model_index.json", **dict.fromkeys(NETWORKS, [None, None]))
    return source / "model_index.json", "no networks"


def unsupported(source):
    edit(source / "model_index.json", text_encoder_2=["transformers", "CLIPTextModel"])
    return (
        source / "model_index.json",
        "text_encoder_2 of class transformers.CLIPTextModel",
        ", ".join(folder.COMPONENTS),
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
    monkeypatch.setattr(files.Tensor, "read", lambda self: pytest.fail("data were read"))
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
    after = read_pipeline(source, allow_pickle=True).components["vae"].params
    for path, leaf in flatten(before).items():
        assert flatten(after)[path].tobytes() == leaf.tobytes()
    dst = write_pipeline(source, tmp_path / "dst", {"vae": after}, allow_pickle=True)
    assert same(state(dst, "vae"), torch.load(source / "vae" / "diffusion_pytorch_model.bin"))


def test_variant_and_network_that_are_not_there(tiny_pipeline):
    refused(lambda: check_pipeline(tiny_pipeline, variant="fp16"), "no variant fp16", "plain")
    refused(lambda: read_pipeline(tiny_pipeline, components=["unet"]), tiny_pipeline, "no unet")


# Refusals on writing


def test_nothing_is_written_on_bad_input(tiny_pipeline, tmp_path):
    params = params_of(read_pipeline(tiny_pipeline))
    dst = tmp_path / "dst"

    def write(changed, **options):
        return lambda: write_pipeline(tiny_pipeline, dst, changed, **options)

    refused(write({"unet": params["vae"]}), tiny_pipeline, "no network unet")
    refused(write({"vae": params["transformer"]}), "vae to be written", "missing", "unexpected")
    part = dict(params["transformer"])
    del part["proj_out"]
    refused(write({"transformer": part}), "transformer to be written", "missing: proj_out.bias")
    params["vae"]["encoder"]["conv_in"]["bias"][0] = 1e5
    refused(write(params, dtype=np.float16), "encoder.conv_in.bias", "not finite in float16")
    params["vae"]["encoder"]["conv_in"]["bias"][0] = np.nan
    refused(write(params), "vae/", "encoder.conv_in.bias", "not finite")
    assert not list(tmp_path.iterdir())


def test_target_that_is_not_to_be_lost(tiny_pipeline, tmp_path):
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "thesis.tex").write_text("years")
    for overwrite, words in ((False, "files in it"), (True, "without model_index.json")):
        call = lambda o=overwrite: write_pipeline(tiny_pipeline, dst, {}, overwrite=o)  # noqa: E731
        refused(call, dst, words)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["dst", "dst/thesis.tex"]

    outer = tmp_path / "outer"
    shutil.copytree(tiny_pipeline, outer)
    inner = shutil.copytree(tiny_pipeline, outer / "inner")
    refused(lambda: write_pipeline(inner, outer, {}, overwrite=True), outer, "inside it")


def test_overwriting(source, tmp_path):
    params = read_pipeline(source).components["vae"].params
    (source / "old").write_text("")
    params["encoder"]["conv_in"]["bias"][:] = np.nan
    refused(lambda: write_pipeline(source, source, {"vae": params}, overwrite=True), "not finite")
    assert (source / "old").exists()
    params["encoder"]["conv_in"]["bias"][:] = 2
    write_pipeline(source, source, {"vae": params}, overwrite=True)
    assert not (source / "old").exists()
    assert state(source, "vae")["encoder.conv_in.bias"].eq(2).all()
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
