"""Pictures of pipelines with LoRAs, of backbone and text encoders: those of diffusers."""

import families
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from families import LENGTH

from gadjax import load
from gadjax.errors import InputError
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.pipelines.adapted import adapted_model
from gadjax.pipelines.diffusers_calls import Variant, draw_in_diffusers
from gadjax.pipelines.model import Model
from gadjax.pipelines.sampling import draw, initial_noise

peft = pytest.importorskip("peft")
# transformers 5.24 asks for a version of peft that is not published; it is asked for text encoders.
integration = pytest.importorskip("transformers.integrations.peft")
integration.MIN_PEFT_VERSION = "0.18.0"
PROMPTS = ("a red circle above the blue square", "")
SPRINT = {"guidance": 4.5, "steps": 2}


def save_adapters(folder, path, seed, text=True):
    """Random adapters on all attentions of a pipeline's networks, saved by diffusers."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    arguments = {}
    torch.manual_seed(seed)
    for name in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        network = getattr(pipe, name, None)
        of_text = name.startswith("text")
        if network is None or of_text and not (text and "CLIP" in type(network).__name__):
            continue
        targets = ["q_proj", "out_proj", "fc2"] if of_text else ["to_q", "to_v", "to_out.0"]
        config = peft.LoraConfig(
            r=2, lora_alpha=2, target_modules=targets, init_lora_weights="gaussian"
        )
        network.add_adapter(config)
        for key, value in network.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(value, std=0.2)
        arguments[f"{name}_lora_layers"] = peft.utils.get_peft_model_state_dict(network)
    pipe.save_lora_weights(path, **arguments)
    return path


def theirs(folder, sampling, noise, prepare):
    kind = type(DiffusionPipeline.from_pretrained(folder)).__name__
    return draw_in_diffusers(folder, sampling, PROMPTS, noise, Variant(kind, prepare))


@pytest.mark.slow
@pytest.mark.parametrize("family", families.LOADERS)
def test_a_lora_draws_the_same_in_both(folders, family, tmp_path):
    """Fused and not, at a weight of .7."""
    folder = folders(family)
    path = save_adapters(folder, tmp_path / "lora", 1)
    model = adapted_model(folder, [(path, 0.7)])
    options = {"steps": 3, "guidance": 3.0} | (SPRINT if "sprint" in family else {})
    sampling = SamplingConfig(**options, length=LENGTH.get(family, 77))
    noise = initial_noise(0, len(PROMPTS), model.pipeline.latent)
    ours = draw(Model("x", model.pipeline, model.params, sampling), PROMPTS, noise) / 2 + 0.5

    def fused(pipe):
        pipe.load_lora_weights(path)
        # FLUX.1's default leaves out the text encoder, whose adapters then stay at a weight of 1.
        parts = [name for name in pipe._lora_loadable_modules if getattr(pipe, name, None)]
        pipe.fuse_lora(parts, lora_scale=0.7)

    def unfused(pipe):
        pipe.load_lora_weights(path, adapter_name="a")
        pipe.set_adapters(["a"], [0.7])

    for prepare in (fused, unfused):
        assert np.abs(ours - theirs(folder, sampling, noise, prepare)).max() <= 1e-4
    plain = theirs(folder, sampling, noise, lambda pipe: None)
    assert np.abs(ours - plain).max() > 1e-2


def test_two_loras_at_once(folders, tmp_path):
    folder, sampling = folders("sana"), SamplingConfig(3, None, 3.0, LENGTH["sana"])
    one, two = (save_adapters(folder, tmp_path / str(seed), seed) for seed in (1, 2))
    model = load(folder, lora=[f"{one}:0.5", f"{two / 'pytorch_lora_weights.safetensors'}:-1"])
    noise = initial_noise(0, len(PROMPTS), model.pipeline.latent)
    ours = draw(Model("x", model.pipeline, model.params, sampling), PROMPTS, noise) / 2 + 0.5

    def prepare(pipe):
        pipe.load_lora_weights(one, adapter_name="one")
        pipe.load_lora_weights(two, adapter_name="two")
        pipe.set_adapters(["one", "two"], [0.5, -1.0])

    assert np.abs(ours - theirs(folder, sampling, noise, prepare)).max() <= 1e-4
    assert model.fingerprint != load(folder).fingerprint != load(folder, lora=[one]).fingerprint


def test_a_lora_of_another_pipeline_is_refused(folders, tmp_path):
    path = save_adapters(folders("sana"), tmp_path / "lora", 1)
    with pytest.raises(InputError, match="tensors that belong to no module of the pipeline"):
        load(folders("sd15"), lora=[path])
    with pytest.raises(InputError, match="missing.safetensors: found No such file"):
        load(folders("sd15"), lora=[tmp_path / "missing.safetensors"])
