"""Single files of a student: read by diffusers' own loaders, and a workflow with exact levels."""

import json
import math

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from families import LENGTH
from safetensors import safe_open
from safetensors.torch import load_file
from workdirs import make_workdir

from gadjax import load
from gadjax.cli.main import main
from gadjax.formats.diffusers_folder import read_pipeline
from gadjax.formats.sampling_config import GADJAX_JSON
from gadjax.formats.single_file import has_original_names
from gadjax.pipelines.sampling import clean_latent, initial_noise

TIMES = {
    "sd15": (999.0, 499.0),
    "sdxl": (999.0, 500.0),
    "sd3": (1000.0, 857.69, 602.15, 8.93),
    "sd35": (1000.0, 857.69, 602.15, 8.93),
    "sd2_v": (999.0, 500.0),
    "sana": (999.67, 749.62),
    "flux_dev": (1000.0, 750.0),
}
EMBEDDED = {"flux_dev": 3.5}  # guidance
ORIGINAL = {"sd15", "sdxl", "sd3", "sd35"}


@pytest.fixture(scope="module")
def exported(folders, tmp_path_factory):
    """Family -> folder of the single files of its student, made when it is first asked for."""
    made = {}

    def get(family):
        if family not in made:
            folder, times = tmp_path_factory.mktemp(family), TIMES[family]
            student = {"steps": len(times), "guidance": EMBEDDED.get(family, 1.0)}
            options = {"student": student, "data": {"length": LENGTH.get(family, 77)}}
            make_workdir(folder / "run", folders(family), timesteps=times, **options)
            flags = "--workdir", str(folder / "run"), "--out", str(folder / "out"), "--single-file"
            assert main(["export", *flags]) == 0
            made[family] = folder / "out", folder / "run"
        return made[family]

    return get


def states(pipe):
    networks = {n: x for n, x in pipe.components.items() if isinstance(x, torch.nn.Module)}
    return {name: network.state_dict() for name, network in networks.items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", TIMES)
def test_the_backbone_in_diffusers_names(exported, folders, family):
    """The export's check has drawn with it; its keys and values are those of the merged folder."""
    out, run = exported(family)
    assert json.loads((out / GADJAX_JSON).read_text())["verified"]["max_difference"] <= 1e-4
    merged = run.parent / "merged"
    assert main(["export", "--workdir", str(run), "--out", str(merged)]) == 0
    folder = read_pipeline(merged)
    part = folder.components[folder.backbone]
    tensors = load_file(out / "out.safetensors")
    expected = {}
    for file in part.weights.files:
        expected |= load_file(file)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    card = (out / "README.md").read_text()
    assert f'pipe.{folder.backbone}.load_state_dict(load_file("out/out.safetensors"))' in (
        card.replace("'", '"')
    )
    assert (out / "out-checkpoint.safetensors").exists() == (family in ORIGINAL)
    assert has_original_names(folder) == (family in ORIGINAL)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(ORIGINAL))
def test_the_checkpoint_in_the_original_names(exported, folders, family):
    """Every network as diffusers' single-file loader reads it: those of the folder, to the bit."""
    out, _ = exported(family)
    folder = folders(family)
    theirs = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    backbone = "unet" if hasattr(theirs, "unet") else "transformer"
    getattr(theirs, backbone).load_state_dict(load_file(out / "out.safetensors"))
    kind = getattr(diffusers, type(theirs).__name__)
    # diffusers takes the projection of SD3's first encoder for the identity, as it is there.
    given = {"text_encoder": theirs.text_encoder} if family.startswith("sd3") else {}
    pipe = kind.from_single_file(
        str(out / "out-checkpoint.safetensors"),
        config=str(folder),
        local_files_only=True,
        torch_dtype=torch.float32,
        **given,
    )
    expected, found = states(theirs), states(pipe)
    assert found.keys() == expected.keys()
    for name, state in expected.items():
        assert found[name].keys() == state.keys(), name
        for key, value in state.items():
            assert torch.equal(found[name][key], value), f"{name}: {key}"
    if family == "sd15":
        pipe.scheduler = theirs.scheduler
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        images = [
            p("red circle", generator=g, num_inference_steps=2, output_type="np").images
            for p, g in zip((pipe, theirs), generators, strict=True)
        ]
        np.testing.assert_array_equal(*images)


@pytest.mark.slow
@pytest.mark.parametrize("family", TIMES)
def test_the_header(exported, family):
    out, _ = exported(family)
    with safe_open(out / "out.safetensors", "pt") as file:
        texts = file.metadata()
    architectures = {
        "sd15": "stable-diffusion-v1",
        "sdxl": "stable-diffusion-xl-v1-base",
        "sd3": "stable-diffusion-3-medium",
        "sd35": "stable-diffusion-3.5-medium",
        "sd2_v": "stable-diffusion-v2-768-v",
        "flux_dev": "flux-1-dev",
    }
    assert texts.get("modelspec.architecture") == architectures.get(family)
    assert texts["modelspec.title"] == "out" and texts["modelspec.sai_model_spec"] == "1.0.1"
    assert f"{len(TIMES[family])} steps from timesteps" in texts["modelspec.usage_hint"]
    guidance = f"guidance {EMBEDDED[family]:g}" if family in EMBEDDED else "without guidance"
    assert guidance in texts["modelspec.usage_hint"]
    prediction = {"sd15": "epsilon", "sdxl": "epsilon", "sd2_v": "v"}
    assert texts.get("modelspec.prediction_type") == prediction.get(family)


def links(nodes):
    return [x for n in nodes.values() for x in n["inputs"].values() if isinstance(x, list)]


@pytest.mark.slow
@pytest.mark.parametrize("family", TIMES)
def test_the_workflow(exported, family):
    out, _ = exported(family)
    if family == "sana":  # ComfyUI has none
        assert not (out / "workflow.json").exists()
        return
    nodes = json.loads((out / "workflow.json").read_text())
    assert all(name in nodes and type(slot) is int for name, slot in links(nodes))
    used = {name for name, _ in links(nodes)}
    assert used == nodes.keys() - {"save"}  # nothing hangs loose
    kinds = {node["class_type"] for node in nodes.values()}
    loader = "CheckpointLoaderSimple" if family in ORIGINAL else "UNETLoader"
    assert loader in kinds and ("ModelSamplingDiscrete" in kinds) == (family == "sd2_v")
    sigmas = [float(x) for x in nodes["sigmas"]["inputs"]["sigmas"].split(",")]
    assert len(sigmas) == len(TIMES[family]) + 1 and sigmas[-1] == 0
    if family in ("sd15", "sdxl"):  # scaled-linear betas, as published tables have it
        assert sigmas[0] == pytest.approx(14.614641, abs=2e-5)
    if family.startswith("sd3"):
        np.testing.assert_allclose(sigmas[:-1], np.array(TIMES[family]) / 1000, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sd35"])
def test_the_workflows_steps_are_the_students(exported, family):
    """ComfyUI's rules of the Euler sampler, written out, give gadjax's latent."""
    out, run = exported(family)
    nodes = json.loads((out / "workflow.json").read_text())
    assert nodes["sampler"]["inputs"]["sampler_name"] == "euler"
    sigmas = [float(x) for x in nodes["sigmas"]["inputs"]["sigmas"].split(",")]
    model = load(run)
    pipeline = model.pipeline
    params, network = model.params, jax.jit(pipeline.denoiser.raw)
    cond = pipeline.encode_text(params, *pipeline.tokens(["red circle"], model.sampling.length))
    z = jnp.asarray(initial_noise(3, 1, pipeline.latent))
    flow = family == "sd35"
    x = z * (1 if flow else math.sqrt(1 + sigmas[0] ** 2))  # at its largest level
    backbone = params[pipeline.backbone]
    for t, sigma, following in zip(TIMES[family], sigmas, sigmas[1:], strict=False):
        scale = 1 if flow else math.sqrt(1 + sigma**2)
        output = network(backbone, x / scale, jnp.full(1, t), cond)
        denoised = x - sigma * output  # of a flow's velocity, too
        x = x + (x - denoised) / sigma * (following - sigma)
    expected = clean_latent(pipeline, backbone, model.sampling, z, cond, cond)
    np.testing.assert_allclose(x, expected, rtol=0, atol=2e-5 * float(np.abs(expected).max()))


def test_it_is_not_exported_both_ways(tmp_path, capsys):
    flags = "--workdir", str(tmp_path), "--out", str(tmp_path / "out"), "--lora", "--single-file"
    assert main(["export", *flags]) == 2
    assert "--single-file: found it with --lora" in capsys.readouterr().err
