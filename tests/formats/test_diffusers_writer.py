import shutil

import numpy as np
from checkpoints import params_of, refused, state

from gadjax.formats.diffusers_folder import check_pipeline, read_pipeline
from gadjax.formats.diffusers_writer import write_pipeline
from gadjax.io.untrusted import read_json


def test_one_network_replaced(tiny_pipeline, tmp_path):
    src, dst = shutil.copytree(tiny_pipeline, tmp_path / "src"), tmp_path / "dst"
    (src / "LICENSE.md").write_text("terms")
    pipeline = read_pipeline(src, components=["transformer"])
    assert pipeline.components["vae"].params is None
    params = pipeline.components["transformer"].params
    params["pos_embed"]["proj"]["bias"][:] = 3
    scheduler = pipeline.scheduler | {"_class_name": "EulerDiscreteScheduler", "beta_end": 0.5}
    write_pipeline(pipeline, dst, {"transformer": params}, scheduler=scheduler)
    assert state(dst, "transformer")["pos_embed.proj.bias"].eq(3).all()
    changed = {"scheduler/scheduler_config.json", "model_index.json"}
    changed |= {"transformer/diffusion_pytorch_model.safetensors"}
    for path in src.rglob("*"):
        name = str(path.relative_to(src))
        if path.is_file():
            assert (path.read_bytes() == (dst / name).read_bytes()) == (name not in changed), name
    index = {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    assert read_json(dst / "model_index.json") == pipeline.model_index | index
    assert check_pipeline(dst).scheduler == scheduler
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]


def test_nothing_is_written_on_bad_input(tiny_pipeline, tmp_path):
    pipeline = read_pipeline(tiny_pipeline)
    params = params_of(pipeline)
    dst = tmp_path / "dst"

    def write(changed, **options):
        return lambda: write_pipeline(pipeline, dst, changed, **options)

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


def test_target_is_protected(tiny_pipeline, tmp_path):
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "thesis.tex").write_text("years")
    pipeline = check_pipeline(tiny_pipeline)
    for overwrite, words in ((False, "files in it"), (True, "without model_index.json")):
        call = lambda o=overwrite: write_pipeline(pipeline, dst, {}, overwrite=o)  # noqa: E731
        refused(call, dst, words)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["dst", "dst/thesis.tex"]

    outer = tmp_path / "outer"
    shutil.copytree(tiny_pipeline, outer)
    inner = check_pipeline(shutil.copytree(tiny_pipeline, outer / "inner"))
    refused(lambda: write_pipeline(inner, outer, {}, overwrite=True), outer, "inside it")


def test_overwriting(source, tmp_path):
    pipeline = read_pipeline(source)
    params = pipeline.components["vae"].params
    (source / "old").write_text("")
    params["encoder"]["conv_in"]["bias"][:] = np.nan
    refused(lambda: write_pipeline(pipeline, source, {"vae": params}, overwrite=True), "not finite")
    assert (source / "old").exists()
    params["encoder"]["conv_in"]["bias"][:] = 2
    write_pipeline(pipeline, source, {"vae": params}, overwrite=True)
    assert not (source / "old").exists()
    assert state(source, "vae")["encoder.conv_in.bias"].eq(2).all()
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
