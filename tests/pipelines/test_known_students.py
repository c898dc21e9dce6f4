"""Published LoRAs: recognised by their names, with the steps and strength of their cards."""

from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
from safetensors.numpy import save_file

from gadjax import load
from gadjax.cli.main import main
from gadjax.errors import InputError
from gadjax.formats.lora_names import layers_of
from gadjax.formats.orbax_folder import open_folder
from gadjax.formats.pipeline_classes import PIPELINES
from gadjax.formats.sampling_config import GADJAX_JSON, SamplingConfig
from gadjax.io.untrusted import read_json
from gadjax.models.params import flatten
from gadjax.pipelines import parity
from gadjax.pipelines.diffusers_calls import Variant, draw_in_diffusers
from gadjax.pipelines.known_students import (
    PUBLISHED_STUDENTS,
    published_loras,
    published_student,
    recognised,
)
from gadjax.pipelines.model import Model
from gadjax.pipelines.pipeline import load_pipeline, make_pipeline, resized
from gadjax.pipelines.sampling import draw, initial_noise, sampler_and_times
from gadjax.training.lora_start import read_factors

NAMES = {
    "lcm-lora-sdxl/pytorch_lora_weights.safetensors": "lcm-sdxl",
    "x/lcm-lora-sdv1-5": "lcm-sd1.5",
    "Hyper-SD15-1step-lora.safetensors": "hyper-sd1.5-1",
    "Hyper-SDXL-8steps-lora.safetensors": "hyper-sdxl-8",
    "hyper-sdxl-8steps-cfg-lora.safetensors": "hyper-sdxl-8-cfg",
    "Hyper-SD15-12steps-CFG-lora.safetensors": "hyper-sd1.5-12-cfg",
    "Hyper-SD3-4steps-CFG-lora.safetensors": "hyper-sd3-4-cfg",
    "Hyper-FLUX.1-dev-8steps-lora.safetensors": "hyper-flux-8",
    "FLUX.1-Turbo-Alpha/diffusion_pytorch_model.safetensors": "flux-turbo-alpha",
    "sdxl_lightning_4step_lora.safetensors": "lightning-sdxl-4",
    "dmd2_sdxl_4step_lora_fp16.safetensors": "dmd2-sdxl",
    "sd15/pcm_sd15_smallcfg_2step_converted.safetensors": "pcm-sd1.5-2",
    "pcm_sdxl_normalcfg_16step_converted.safetensors": "pcm-sdxl-16-cfg",
    "pcm_sdxl_lcmlike_lora_converted.safetensors": "pcm-sdxl-lcmlike",
    "TDM_sd3_lora/pytorch_lora_weights.safetensors": "tdm-sd3",
    "my_style.safetensors": None,
    "notHyper-SD15-1step-lora.safetensors": None,
    "Hyper-SD15-1step-lora.safetensors.bak": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_files_are_recognised_by_their_names(name):
    assert recognised(Path(name)) == NAMES[name]


def test_a_student_whose_latents_grow_is_refused():
    with pytest.raises(InputError, match="found an SwD student, whose latents grow"):
        recognised(Path("swd-medium-4-steps/adapter_model.safetensors"))
    with pytest.raises(InputError, match="found an SwD student, whose latents grow"):
        recognised(Path("swd-flux/adapter_model.safetensors"))


def test_strengths_and_conflicts():
    tdm, style = Path("TDM_sd3_lora"), Path("style.safetensors")
    assert published_loras([(tdm, 1.0), (style, 0.5)]) == (((tdm, 0.125), (style, 0.5)), "tdm-sd3")
    assert published_loras([(style, 2.0)], "tdm-sd3") == (((style, 0.25),), "tdm-sd3")
    assert published_loras([], "tdm-sd3") == ((), "tdm-sd3")
    assert published_loras([(style, 1.0)]) == (((style, 1.0),), None)
    with pytest.raises(InputError, match="found lcm-sdxl and tdm-sd3, which are sampled in other"):
        published_loras([(tdm, 1.0), (Path("lcm-lora-sdxl"), 1.0)])


# Of the cards, and of diffusers' schedulers.
GRIDS = {
    "lcm-sd1.5": (999, 759, 499, 259),
    "hyper-sd1.5-2": (999, 499),
    "hyper-sd1.5-8": (999, 874, 749, 624, 499, 374, 249, 124),
    "hyper-sd1.5-1": (999,),
    "pcm-sd1.5-4": (999, 749, 499, 249),
    "lightning-sdxl-4": (999, 749, 499, 249),
    "dmd2-sdxl": (999, 749, 499, 249),
    "tdm-sd3": (999.83, 947.17, 856.9, 666.37),
    "hyper-sd3-4-cfg": (1000, 857.69, 602.15, 8.93),
    "hyper-flux-8": (1000, 956.72, 904.53, 840.35, 759.51, 654.57, 512.84, 310.9),
    "flux-turbo-alpha": (1000, 956.72, 904.53, 840.35, 759.51, 654.57, 512.84, 310.9),
}
FAMILY = {"sd1.5": "sd15", "sdxl": "sdxl", "sd3": "sd3", "flux": "flux_dev"}
GUIDANCE = {"hyper-sd3-4-cfg": 3, "hyper-flux-8": 3.5, "flux-turbo-alpha": 3.5}


@pytest.mark.parametrize("name", GRIDS)
def test_their_steps(folders, name):
    family = next(value for key, value in FAMILY.items() if key in name)
    pipeline = make_pipeline(open_folder(folders(family), components=()))
    if family == "flux_dev":  # whose grid goes by the size: that of 1024 x 1024
        pipeline = resized(pipeline, (128 * pipeline.upscale, 128 * pipeline.upscale))
    pipeline, sampling = published_student(name, pipeline)
    _, times = sampler_and_times(pipeline, sampling)
    np.testing.assert_allclose(times[:-1], GRIDS[name], atol=0.01)
    assert sampling.guidance == GUIDANCE.get(name, 1)


def test_hypers_lora_of_one_step_takes_more(folders):
    """The grids of its card; each step has TCD's whole share of new noise."""
    pipeline = make_pipeline(open_folder(folders("sd15"), components=()))
    pipeline, sampling = published_student("hyper-sd1.5-1", pipeline)
    grids = {4: [999, 759, 499, 259], 8: [999, 879, 759, 639, 499, 379, 259, 139]}
    for steps, grid in grids.items():
        sampler, times = sampler_and_times(pipeline, replace(sampling, steps=steps))
        assert times[:-1].tolist() == grid
        assert sampler.sample_fn.keywords == {"eta": 1.0} and sampler.stochastic


@pytest.mark.parametrize(
    "family,name", [("flux_schnell", "hyper-flux-8"), ("flux_dev", "flux-schnell")]
)
def test_the_other_flux_is_refused(folders, family, name):
    pipeline = make_pipeline(open_folder(folders(family), components=()))
    with pytest.raises(InputError, match=f"found a FLUX.1 .* its input; expected .* for {name}"):
        published_student(name, pipeline)


def test_every_student_is_of_a_supported_pipeline():
    for name, student in PUBLISHED_STUDENTS.items():
        assert student.family in PIPELINES, name
        assert student.timesteps is None or len(student.timesteps) == student.steps, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lightning-sdxl-4", "lightning-sdxl-one-step"])
def test_lightning_is_eulers_trailing_steps_in_diffusers(folders, name):
    """As its card draws it: EulerDiscreteScheduler with timestep_spacing trailing."""
    folder = folders("sdxl")
    pipeline, params = load_pipeline(folder)
    pipeline, sampling = published_student(name, pipeline)
    sampling = replace(sampling, length=77)
    prompts = ["a red circle", "green square"]
    noise = initial_noise(0, 2, pipeline.latent)
    with parity._EXACT():
        ours = draw(Model("x", pipeline, params, sampling), prompts, noise) / 2 + 0.5
    changes = dict(PUBLISHED_STUDENTS[name].changes)

    def prepare(pipe):
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(
            pipe.scheduler.config, timestep_spacing="trailing", **changes
        )

    variant = Variant("StableDiffusionXLPipeline", prepare)
    plain = SamplingConfig(sampling.steps, None, 1.0, 77)
    theirs = draw_in_diffusers(folder, plain, prompts, noise, variant)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.fixture
def hyper(tmp_path):
    """A LoRA of SD1.5 under the name of a published one of two steps."""
    stem, rng = "lora_unet_mid_block_attentions_0_proj_in", np.random.default_rng(0)
    shapes = {"down": (2, 24, 1, 1), "up": (24, 2, 1, 1)}
    tensors = {
        f"{stem}.lora_{part}.weight": rng.normal(size=shape).astype(np.float32)
        for part, shape in shapes.items()
    }
    path = tmp_path / "Hyper-SD15-2steps-lora.safetensors"
    save_file(tensors, path)
    return path


def test_a_lora_brings_its_students_steps(folders, hyper, tmp_path, caplog):
    folder = folders("sd15")
    model = load(folder, lora=[hyper])
    assert model.sampling.steps == 2 and model.sampling.guidance == 1
    assert sampler_and_times(model.pipeline, model.sampling)[1][:-1].tolist() == [999, 499]
    assert "taken for hyper-sd1.5-2, sampled as its card says" in caplog.text
    # A preset that is named goes before the file's name.
    assert load(folder, lora=[hyper], student_preset="lcm-sd1.5").sampling.steps == 4
    out = tmp_path / "merged"
    assert main(["lora", "merge", str(folder), str(hyper), "--out", str(out)]) == 0
    scheduler = read_json(out / "scheduler" / "scheduler_config.json")
    assert scheduler["_class_name"] == "DDIMScheduler"
    assert scheduler["timestep_spacing"] == "trailing"
    assert read_json(out / GADJAX_JSON)["steps"] == 2
    merged, ours = load(out), flatten(model.params["unet"])
    assert merged.sampling == model.sampling
    for path, value in flatten(merged.params["unet"]).items():
        np.testing.assert_array_equal(value, ours[path])
    assert parity.compare_pictures(out, ["a red circle"]) <= 1e-4


@pytest.mark.parametrize("preset,strength", [("hyper-sd1.5-2", 1.0), (None, 1.0)])
def test_the_weight_multiplies_the_strength(folders, hyper, preset, strength):
    half = load(folders("sd15"), lora=[f"{hyper}:0.5"], student_preset=preset)
    assert half.loras == ((hyper, 0.5 * strength),)


def test_a_folder_without_its_scheduler_is_not_written(folders, hyper, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(folders("sd15")), str(out), "--lora", str(hyper)]) == 2
    assert "found the LoRA of hyper-sd1.5-2, which has its own scheduler" in capsys.readouterr().err
    assert not out.exists()


def test_a_start_has_the_published_strength(folders, tmp_path):
    pipeline = make_pipeline(open_folder(folders("sd3"), components=()))
    stem = "transformer.transformer_blocks.0.attn.to_q"
    width = layers_of(pipeline.folder.components["transformer"])[stem.split(".", 1)[1]].shape
    tensors = {"lora_A": np.ones((2, width[1])), "lora_B": np.ones((width[0], 2))}
    tensors = {f"{stem}.{key}.weight": x.astype(np.float32) for key, x in tensors.items()}
    scales = {}
    for name in ("Hyper-SD3-4steps-CFG-lora", "mine"):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        factors = read_factors(tmp_path / f"{name}.safetensors", pipeline, "student.init")
        (scales[name],) = (f.scale for f in factors.values())
    assert list(scales.values()) == [0.125, 1.0]
