"""Rules of diffusers' pipeline classes that are not in their folders: values as in diffusers.

One test for each row of the table in docs/models.md."""

import inspect
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from checkpoints import edit, refused

from gadjax.formats.diffusers_folder import check_pipeline
from gadjax.formats.orbax_folder import abstract_folder
from gadjax.formats.pipeline_classes import PASSES_SIGMAS, PIPELINES, SD, UNSCALED
from gadjax.formats.sampling_config import GADJAX_JSON
from gadjax.formats.schedulers import sampler_from_config
from gadjax.pipelines import parity
from gadjax.pipelines.pipeline import abstract_pipeline, load_pipeline

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NOTHING = dict.fromkeys(("unet", "vae", "text_encoder", "tokenizer"))


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of a small Stable Diffusion."""
    return shutil.copytree(folders("sd15"), tmp_path / "sd15")


def scheduler_of(folder, index, **config):
    """The folder under another scheduler; the file may name another class than model_index.json."""
    edit(folder / "model_index.json", scheduler=["diffusers", index])
    config = {"_class_name": index, **BETAS} | config
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, **NOTHING).scheduler
    return check_pipeline(folder).scheduler, theirs


def same_walk(ours, theirs, steps):
    theirs.set_timesteps(steps)
    times = sampler_from_config(ours).times(steps)[:-1]
    expected = list(dict.fromkeys(theirs.timesteps.tolist()))  # PNDM takes its second time twice
    np.testing.assert_array_equal(times, expected)


@pytest.mark.parametrize(
    ("index", "file"),
    [("DDIMScheduler", "PNDMScheduler"), ("PNDMScheduler", "DDIMScheduler")],
)
def test_the_schedulers_class_is_the_indexs(folder, index, file):
    more = {"skip_prk_steps": True, "use_flow_sigmas": True, "clip_sample": False}
    ours, theirs = scheduler_of(folder, index, _class_name=file, **more)
    assert ours["_class_name"] == type(theirs).__name__ == index
    assert abstract_folder(folder).scheduler == ours
    same_walk(ours, theirs, 7)


STEPPERS = {
    "PNDMScheduler": {"skip_prk_steps": True},
    "DDIMScheduler": {},
    "DPMSolverMultistepScheduler": {"timestep_spacing": "leading"},
    "EulerDiscreteScheduler": {"timestep_spacing": "leading"},
}


@pytest.mark.parametrize("index", STEPPERS)
@pytest.mark.parametrize("offset", [{}, {"steps_offset": 0}, {"steps_offset": 3}])
def test_stable_diffusions_offset_is_one(folder, index, offset):
    ours, theirs = scheduler_of(folder, index, **STEPPERS[index], **offset)
    same_walk(ours, theirs, 10)
    assert theirs.config.steps_offset == 1


@pytest.mark.parametrize("clip", [{}, {"clip_sample": True}])
def test_stable_diffusion_does_not_clip(folder, clip):
    ours, theirs = scheduler_of(folder, "DDIMScheduler", **clip)
    assert theirs.config.clip_sample is False
    same_walk(ours, theirs, 4)  # a clipping one would be refused


def test_other_pipelines_keep_both(tiny_pipeline, tmp_path):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "tiny")
    edit(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    ours = check_pipeline(folder).scheduler
    assert "steps_offset" not in ours or ours["steps_offset"] == 0
    refused(lambda: abstract_pipeline(folder), "clip_sample: found True")


def test_values_listed_as_defaults_are_dropped(folder):
    """Defaults listed by another class are not values of the config."""
    listed = {"_use_default_values": ["set_alpha_to_one"], "set_alpha_to_one": False}
    ours, theirs = scheduler_of(folder, "DDIMScheduler", **listed)
    assert theirs.config.set_alpha_to_one is True and "set_alpha_to_one" not in ours


def test_a_networks_listed_defaults_are_dropped(folder):
    """Of diffusers' classes; transformers' know no such list."""
    for part, key in (("unet", "norm_eps"), ("text_encoder", "layer_norm_eps")):
        edit(folder / part / "config.json", **{key: 0.1, "_use_default_values": [key]})
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    ours = check_pipeline(folder).components
    assert ours["unet"].spec.norm_eps == theirs.unet.config.norm_eps == 1e-5
    assert ours["text_encoder"].spec.layer_norm_eps == 0.1
    assert theirs.text_encoder.config.layer_norm_eps == 0.1
    for part, file in (("unet", "config.json"), ("scheduler", "scheduler_config.json")):
        edit(folder / part / file, _use_default_values=3)
        refused(lambda: check_pipeline(folder), "_use_default_values: found 3; expected a list")
        edit(folder / part / file, _use_default_values=None)


@pytest.mark.parametrize(
    ("version", "side"), [("0.6.0", 64), ("0.9.0.dev0", 8), ("0.10.2", 8), (None, 8)]
)
def test_the_sample_size_of_old_configs(folder, version, side):
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text())
    del config["_diffusers_version"]
    path.write_text(json.dumps(config | ({"_diffusers_version": version} if version else {})))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    assert theirs.unet.config.sample_size == side
    assert load_pipeline(folder)[0].latent[:2] == (side, side)


def test_an_autoencoders_shift_is_sd3s_alone(folder, folders, tmp_path):
    edit(folder / "vae" / "config.json", shift_factor=0.3)
    assert load_pipeline(folder)[0].folder.components["vae"].spec.shift_factor == 0
    three = abstract_pipeline(folders("sd3"))[0].folder.components["vae"].spec
    assert three.shift_factor == 0.0609
    pipeline, params = load_pipeline(folder)
    x = np.random.default_rng(0).standard_normal((1, *pipeline.latent), np.float32)
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    latents = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    image = vae.decode(latents / vae.config.scaling_factor).sample  # as StableDiffusionPipeline
    ours = pipeline.decode(params["vae"], x)
    expected = image.detach().clamp(-1, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-5)


FAMILIES = (
    "sd15",
    "sdxl",
    "sana",
    "sana_sprint",
    "sd3",
    "z_image",
    "lumina2",
    "flux_dev",
    "flux2_klein",
    "PixArtAlphaPipeline",
    "SIGMA",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_guidance_and_length_are_the_calls_defaults(folders, family, tiny_pipeline, tmp_path):
    if family in ("PixArtAlphaPipeline", "SIGMA"):
        folder = shutil.copytree(tiny_pipeline, tmp_path / "tiny")
        kind = family.replace("SIGMA", "PixArtSigmaPipeline")
        edit(folder / "model_index.json", _class_name=kind)
    else:
        folder = folders(family)
    pipeline, _ = abstract_pipeline(folder)
    kind = getattr(diffusers, pipeline.folder.model_index["_class_name"])
    defaults = {name: p.default for name, p in inspect.signature(kind.__call__).parameters.items()}
    assert pipeline.sampling.steps == defaults["num_inference_steps"]
    # Z-Image's guidance is cond + s (cond - null).
    assert pipeline.sampling.guidance == defaults["guidance_scale"] + (family == "z_image")
    assert pipeline.sampling.length == defaults.get("max_sequence_length", 77)


def test_one_ddim_step_of_pixart_is_its_x0(tiny_pipeline, tmp_path):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "tiny")
    edit(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    options = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 500}
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler", **options)
    (folder / GADJAX_JSON).write_text(json.dumps({"steps": 1, "guidance": 1.0, "length": 8}))
    assert parity.compare_pictures(folder, parity.PROMPTS[:1]) <= 1e-4


def test_a_pipeline_of_another_class_is_refused(folder):
    known = set(PIPELINES) - {SD}
    for kind in ("StableDiffusionImg2ImgPipeline", None):
        edit(folder / "model_index.json", _class_name=kind)
        refused(lambda: abstract_pipeline(folder), "model_index.json, _class_name: found", *known)
    edit(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    refused(lambda: abstract_pipeline(folder), "addition_embed_type None", "XLPipeline alone")


def test_encoders_of_another_class_are_refused(folder, folders, tmp_path):
    """A CLIP with a projection returns its pooled vector first."""
    projected = ["transformers", "CLIPTextModelWithProjection"]
    edit(folder / "model_index.json", text_encoder=projected)
    words = "text_encoder: found 'CLIPTextModelWithProjection'; expected CLIPTextModel"
    refused(lambda: abstract_pipeline(folder), words)
    other = shutil.copytree(folders("sdxl"), tmp_path / "sdxl")
    edit(other / "model_index.json", text_encoder_2=["transformers", "CLIPTextModel"])
    words = "text_encoder_2: found 'CLIPTextModel'; expected CLIPTextModelWithProjection"
    refused(lambda: abstract_pipeline(other), words)


def test_sana_pipelines_need_their_network(folders, tmp_path):
    for family, kind in (("sana", "SanaSprintPipeline"), ("sana_sprint", "SanaPipeline")):
        folder = shutil.copytree(folders(family), tmp_path / family)
        scheduler = check_pipeline(folder).scheduler["_class_name"]
        edit(folder / "model_index.json", _class_name=kind)
        words = (
            f"scheduler: found '{scheduler}' of a {kind}; expected SCMScheduler of SanaSprintPip"
        )
        refused(lambda: abstract_pipeline(folder), words)  # noqa: B023
        other = "SCMScheduler" if family == "sana" else "DDIMScheduler"
        edit(folder / "model_index.json", scheduler=["diffusers", other])
        file = folder / "scheduler" / "scheduler_config.json"
        file.write_text(
            json.dumps(
                {"prediction_type": "trigflow"} if family == "sana" else {"clip_sample": False}
            )
        )
        refused(lambda: abstract_pipeline(folder), f"found a {kind} with guidance_embeds")  # noqa: B023


@pytest.mark.parametrize("family", ["sana", "sd3"])
def test_pipelines_that_scale_no_latents_are_refused_with_euler(folders, family, tmp_path):
    folder = shutil.copytree(folders(family), tmp_path / family)
    edit(folder / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    refused(lambda: abstract_pipeline(folder), "scheduler: found EulerDiscreteScheduler; expected")


@pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"])
def test_pipelines_that_scale_latents_are_refused_with_a_flow_s_scheduler(folder, scheduler):
    """diffusers stops with an AttributeError at the first step."""
    edit(folder / "model_index.json", scheduler=["diffusers", scheduler])
    refused(lambda: abstract_pipeline(folder), f"scheduler: found {scheduler}; expected another")
    assert not hasattr(getattr(diffusers, scheduler), "scale_model_input")


def test_flux_needs_a_scheduler_that_takes_its_sigmas(folders, tmp_path):
    folder = shutil.copytree(folders("flux_schnell"), tmp_path / "flux")
    edit(folder / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    words = "scheduler: found 'DPMSolverMultistepScheduler'; expected FlowMatchEulerDiscrete"
    refused(lambda: abstract_pipeline(folder), words, "which take the sigmas that FluxPipeline")


# Class -> shift of a published scheduler_config.json, and the sigmas of four steps.
GRIDS = {
    "StableDiffusion3Pipeline": (3.0, (1, 0.8577, 0.6022, 0.0089)),
    "FluxPipeline": (1.0, (1, 0.75, 0.5, 0.25)),
    "Lumina2Pipeline": (6.0, (1, 0.9474, 0.8571, 0.6667)),
    "ZImagePipeline": (3.0, (1, 0.9, 0.75, 0.5)),
}


def own_sigmas(kind, n):
    """Sigmas that a pipeline of this class passes its scheduler, by its source; None for none."""
    source = inspect.getsource(getattr(diffusers, kind).__call__)
    own = "np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)" in source
    return np.linspace(1, 1 / n, n) if own or "get_default_z_image_sigmas(" in source else None


@pytest.mark.parametrize("kind", UNSCALED)
def test_a_flow_s_grid_is_that_of_the_pipeline_s_class(kind):
    """One file, two grids: the shift acts on a pipeline's own sigmas once, else twice."""
    shift, four = GRIDS.get(kind, (2.5, None))
    assert (own_sigmas(kind, 4) is not None) == (kind in PASSES_SIGMAS)
    for name in ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"):
        config = {"_class_name": name, "shift": shift}
        theirs, ours = (
            getattr(diffusers, name).from_config(config),
            sampler_from_config(config, kind),
        )
        for n in (1, 2, 4, 8, 28, 50):
            sigmas = own_sigmas(kind, n)
            theirs.set_timesteps(n) if sigmas is None else theirs.set_timesteps(sigmas=sigmas)
            np.testing.assert_allclose(ours.times(n) / 1000, theirs.sigmas.numpy(), rtol=1e-6)
        if four:
            np.testing.assert_allclose(ours.times(4)[:-1] / 1000, four, atol=5e-5)


PUBLISHED_DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0}
QWENS = PUBLISHED_DYNAMIC | {"max_image_seq_len": 8192, "max_shift": 0.9, "shift_terminal": 0.02}
# Class -> scheduler_config.json, and the sigmas of four steps by the number of tokens.
DYNAMIC = {
    "FluxPipeline": (
        PUBLISHED_DYNAMIC,
        {4096: (1, 0.9045, 0.7595, 0.5128), 1024: (1, 0.8492, 0.6525, 0.3849)},
    ),
    "Flux2KleinPipeline": (
        PUBLISHED_DYNAMIC,
        {4096: (1, 0.9674, 0.9081, 0.7672), 1024: (1, 0.9581, 0.8840, 0.7175), 4356: ()},
    ),
    "QwenImagePipeline": (
        QWENS,
        {4096: (1, 0.7667, 0.4556, 0.02), 6889: (1, 0.7810, 0.4755, 0.02), 35: ()},
    ),
    "ZImagePipeline": (PUBLISHED_DYNAMIC | {"time_shift_type": "linear"}, {4096: (), 1000: ()}),
}


@pytest.mark.parametrize("kind", DYNAMIC)
def test_a_dynamic_shift_follows_from_the_size(kind):
    """And from the number of steps, in FLUX.2."""
    config, sizes = DYNAMIC[kind]
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler"} | config
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    module, c = inspect.getmodule(getattr(diffusers, kind)), theirs.config
    for tokens, four in sizes.items():
        ours = sampler_from_config(config, kind, tokens)
        for n in (2, 4, 9, 50):
            if kind == "Flux2KleinPipeline":
                mu = module.compute_empirical_mu(tokens, n)
            else:
                lengths = c.base_image_seq_len, c.max_image_seq_len
                mu = module.calculate_shift(tokens, *lengths, c.base_shift, c.max_shift)
            theirs.set_timesteps(sigmas=own_sigmas(kind, n), mu=mu)
            np.testing.assert_allclose(ours.times(n) / 1000, theirs.sigmas.numpy(), 2e-6, 1e-7)
        if four:
            np.testing.assert_allclose(ours.times(4)[:-1] / 1000, four, atol=5e-5)


def test_dynamic_shifts_without_a_known_rule_are_refused():
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler"} | PUBLISHED_DYNAMIC
    for kind in ("Lumina2Pipeline", "StableDiffusion3Pipeline", "SanaPipeline"):
        refused(lambda: sampler_from_config(config, kind, 64), "use_dynamic_shifting: found True")  # noqa: B023
    refused(lambda: sampler_from_config(config, "FluxPipeline"), "use_dynamic_shifting: found True")
    refused(lambda: sampler_from_config(QWENS | config, "QwenImagePipeline", 64).times(1), "steps")
    equal = config | {"base_image_seq_len": 4096}
    refused(lambda: sampler_from_config(equal, "FluxPipeline", 64), "max_image_seq_len: found 4096")
    huge = config | {"max_shift": 1e6}
    refused(lambda: sampler_from_config(huge, "FluxPipeline", 64), "max_shift: found 1000000.0")
    wrong = config | {"shift_terminal": 1.5}
    refused(lambda: sampler_from_config(wrong, "FluxPipeline", 64), "shift_terminal: found 1.5")


def test_lumina2_divides_times_by_the_number_of_its_training_timesteps():
    """Its network is given t / 1000 here, whatever the file says."""
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 500}
    for kind in ("FluxPipeline", "Flux2KleinPipeline", "ZImagePipeline"):
        assert sampler_from_config(config, kind, 64).times(2)[0] == 500
    expected = "num_train_timesteps: found 500; expected 1000"
    refused(lambda: sampler_from_config(config, "Lumina2Pipeline", 64), expected)


@pytest.mark.parametrize("kind", sorted(set(PIPELINES) - set(UNSCALED)))
def test_a_flow_s_scheduler_has_no_grid_in_other_classes(kind):
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    refused(lambda: sampler_from_config(config, kind), f"of a {kind}; expected one of Sana")
