"""No key of a configuration is dropped unless it is listed, with its reason."""

import inspect
import json
import logging
from pathlib import Path

import diffusers
import pytest
import transformers

from gadjax.formats.schedulers import sampler_from_config
from gadjax.models.ignored import IGNORED, warn_unknown_keys
from gadjax.models.registry import COMPONENTS, read_network

PUBLISHED = json.loads(Path(__file__).parents[1].joinpath("published.json").read_text())
# Class -> the repository and part whose configuration is changed.
BASES = {
    "UNet2DConditionModel": ("stable-diffusion-xl-base-1.0", "unet"),
    "PixArtTransformer2DModel": ("PixArt-XL-2-512x512", "transformer"),
    "Transformer2DModel": ("PixArt-XL-2-512x512", "transformer"),
    "SanaTransformer2DModel": ("Sana_600M_512px", "transformer"),
    "SD3Transformer2DModel": ("stable-diffusion-3.5-medium", "transformer"),
    "FluxTransformer2DModel": ("FLUX.1-dev", "transformer"),
    "Flux2Transformer2DModel": ("FLUX.2-klein-base-4B", "transformer"),
    "CLIPTextModel": ("stable-diffusion-xl-base-1.0", "text_encoder"),
    "CLIPTextModelWithProjection": ("stable-diffusion-xl-base-1.0", "text_encoder_2"),
    "T5EncoderModel": ("PixArt-XL-2-512x512", "text_encoder"),
    "Gemma2Model": ("Sana_600M_512px", "text_encoder"),
    "ZImageTransformer2DModel": ("Z-Image", "transformer"),
    "Lumina2Transformer2DModel": ("Lumina-Image-2.0", "transformer"),
    "Qwen3Model": ("Z-Image", "text_encoder"),
    "Qwen3ForCausalLM": ("Z-Image", "text_encoder"),
    "AutoencoderKL": ("stable-diffusion-xl-base-1.0", "vae"),
    "AutoencoderDC": ("Sana_600M_512px", "vae"),
    "AutoencoderKLFlux2": ("FLUX.2-klein-base-4B", "vae"),
}


def keys_of(name):
    """Options of the class, from its signature."""
    if hasattr(diffusers, name):
        kind = diffusers.PixArtTransformer2DModel if name[0] == "T" else getattr(diffusers, name)
        return set(inspect.signature(kind.__init__).parameters) - {"self"}
    return set(getattr(transformers, name).config_class().to_dict())


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_key_of_a_network_is_used_or_listed(name):
    repository, part = BASES[name]
    base = PUBLISHED[repository][f"{part}/config.json"]
    family, spec, _ = read_network(Path(part), name, base)
    for key in sorted(keys_of(name) - set(IGNORED[name])):
        try:
            changed = family.config.from_dict(base | {key: "something else"})
        except Exception:  # the key is read
            continue
        assert changed != spec, key


SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS = {
    "DPMSolverMultistepScheduler": SCALED,
    "DDIMScheduler": SCALED | {"clip_sample": False},
    "EulerDiscreteScheduler": SCALED | {"timestep_spacing": "leading"},
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchLCMScheduler": {},
    "PNDMScheduler": SCALED | {"skip_prk_steps": True},
    "LCMScheduler": {},
    "SCMScheduler": {"prediction_type": "trigflow"},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_key_of_a_scheduler_is_read_or_listed(name):
    read = set()

    class Watched(dict):
        def get(self, key, default=None):
            read.add(key)
            return super().get(key, default)

    sampler_from_config(Watched(SCHEDULERS[name], _class_name=name))
    keys = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"}
    assert keys - read <= set(IGNORED[name])
    assert set(IGNORED[name]) <= keys


def test_unknown_keys_of_a_text_encoder_are_named_once(caplog):
    config = {"d_model": 4, "mystery": 3, "nothing": None, "_own": 1, "dropout_rate": 0.1}
    for _ in range(2):
        warn_unknown_keys("T5EncoderModel", config, ["d_model"])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("config.json: mystery: no options of T5EncoderModel")


@pytest.mark.parametrize("repository", PUBLISHED)
def test_published_text_encoders_have_no_unknown_keys(repository, caplog):
    for path, config in PUBLISHED[repository].items():
        if path.startswith("text_encoder"):
            read_network(Path(path), config["architectures"][0], config)
    assert not caplog.records
