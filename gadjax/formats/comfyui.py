"""Workflow of ComfyUI for a few-step student: its nodes with the exact noise levels.

The form is that of ComfyUI's API: {id: {"class_type", "inputs"}}, links as [id, output]. It was
written by ComfyUI's source and has not been run there. ComfyUI's noise level is sigma / alpha, and
sigma of a flow. `ManualSigmas` takes plain decimals.
"""

import json
from collections.abc import Sequence
from typing import Any

from gadjax.diffusion.schedules import Flow
from gadjax.formats.diffusers_folder import PipelineFolder
from gadjax.formats.pipeline_classes import FLUX, PIXART, SD, SD3, SDXL, SIGMA, Z_IMAGE
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.formats.scheduler_config import parameterization_from_config, schedule_from_config

COMFYUI, WORKFLOW = "comfyui", "workflow.json"  # form of a LoRA's keys; file
PROMPT = "a lighthouse at dawn, oil on canvas"
# Files of the user's own, by their place.
BASE, TEXT, AUTOENCODER = "BASE.safetensors", "TEXT_ENCODER.safetensors", "VAE.safetensors"
SIGMA_SCALE = 0.13025  # of the latents of PixArt-Sigma and SDXL
# Pipelines whose loaders and conditions are written here; the others need nodes of their own.
# ComfyUI does not have SANA, and is not known to read Lumina 2 under diffusers' names.
WRITTEN = SD, SDXL, PIXART, SIGMA, SD3, FLUX, Z_IMAGE
WIDE = SD3, FLUX, Z_IMAGE  # latents of 16 channels
# Pipeline -> type of its text encoders' loader; the others have "pixart".
TEXT_TYPES = {SD: "stable_diffusion", SDXL: "sdxl", SD3: "sd3", FLUX: "flux", Z_IMAGE: "lumina2"}

Workflow = dict[str, dict[str, Any]]


def noise_levels(folder: PipelineFolder, timesteps: Sequence[float]) -> list[float]:
    """Noise levels of ComfyUI at which the steps start, and the clean end, 0.

    Args:
      folder: the pipeline, for its noise schedule.
      timesteps: times that the steps start from.
    """
    schedule, levels = schedule_from_config(folder.scheduler), []
    for t in timesteps:
        alpha, sigma = schedule.alpha_sigma(t)
        levels.append(float(sigma) if isinstance(schedule, Flow) else float(sigma / alpha))
    return [*levels, 0.0]


def workflow(
    folder: PipelineFolder,
    sampling: SamplingConfig,
    *,
    checkpoint: str = "",
    diffusion_model: str = "",
    lora: str = "",
) -> Workflow | None:
    """Workflow that draws one picture with a few-step student.

    Args:
      folder: the pipeline.
      sampling: with the student's timesteps.
      checkpoint: file of a whole checkpoint in the original names.
      diffusion_model: file of the backbone in diffusers' names, without a checkpoint.
      lora: file of a LoRA on the other two, or on a checkpoint of the user's own.

    Returns: the nodes; None for pipelines that are not in WRITTEN, without timesteps, and for
      classifier-free guidance.
    """
    kind = folder.model_index["_class_name"]
    if kind not in WRITTEN or sampling.timesteps is None:
        return None
    embedded = folder.components[folder.backbone].spec.guidance_embeds
    if sampling.guidance > 1 and not embedded:
        return None
    nodes = _loaders(folder, checkpoint, diffusion_model)
    model = ["model", 0]
    if lora:
        inputs = {"model": model, "lora_name": lora, "strength_model": 1.0}
        nodes["lora"] = _node("LoraLoaderModelOnly", **inputs)
        model = ["lora", 0]
    if kind == SD and parameterization_from_config(folder.scheduler) == "v":
        inputs = {"model": model, "sampling": "v_prediction", "zsnr": False}
        nodes["prediction"] = _node("ModelSamplingDiscrete", **inputs)
        model = ["prediction", 0]
    height, width = 2 * (_side(folder),)
    nodes["prompt"] = _prompt(kind, nodes, height, width)
    conditioning = ["prompt", 0]
    if embedded:
        inputs = {"conditioning": conditioning, "guidance": sampling.guidance}
        nodes["guidance"] = _node("FluxGuidance", **inputs)
        conditioning = ["guidance", 0]
    latent = "EmptySD3LatentImage" if kind in WIDE else "EmptyLatentImage"
    nodes["latent"] = _node(latent, width=width, height=height, batch_size=1)
    levels = ", ".join(f"{x:.8f}" for x in noise_levels(folder, sampling.timesteps))
    nodes["sigmas"] = _node("ManualSigmas", sigmas=levels)
    sampler = "lcm" if sampling.rollout == "fresh_noise" else "euler"
    nodes["sampler"] = _node("KSamplerSelect", sampler_name=sampler)
    nodes["noise"] = _node("RandomNoise", noise_seed=0)
    nodes["guider"] = _node("BasicGuider", model=model, conditioning=conditioning)
    names = {"noise": "noise", "guider": "guider", "sampler": "sampler", "sigmas": "sigmas"}
    links = {key: [name, 0] for key, name in (names | {"latent_image": "latent"}).items()}
    nodes["sample"] = _node("SamplerCustomAdvanced", **links)
    return nodes | _decoding(folder, nodes)


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _side(folder: PipelineFolder) -> int:
    spec = folder.components[folder.backbone].spec
    return spec.sample_size * folder.components["vae"].spec.upscale


def _loaders(folder: PipelineFolder, checkpoint: str, diffusion_model: str) -> Workflow:
    """Nodes "model", "clip" and "vae"; a checkpoint's node is all three."""
    kind, count = folder.model_index["_class_name"], len(folder.text_encoders)
    if checkpoint or not diffusion_model and kind in (SD, SDXL, SD3):
        return {"model": _node("CheckpointLoaderSimple", ckpt_name=checkpoint or BASE)}
    text = TEXT_TYPES.get(kind, "pixart")
    names = {f"clip_name{n + 1}": TEXT.replace("R.", f"R_{n + 1}.") for n in range(count)}
    clip = {
        1: lambda: _node("CLIPLoader", clip_name=TEXT, type=text),
        2: lambda: _node("DualCLIPLoader", **names, type=text),
        3: lambda: _node("TripleCLIPLoader", **names),
    }[count]()
    return {
        "model": _node("UNETLoader", unet_name=diffusion_model or BASE, weight_dtype="default"),
        "clip": clip,
        "vae": _node("VAELoader", vae_name=AUTOENCODER),
    }


def _link(nodes: Workflow, name: str) -> list:
    """Output of a loader: of its node, or of the checkpoint's."""
    return [name, 0] if name in nodes else ["model", {"clip": 1, "vae": 2}[name]]


def _prompt(kind: str, nodes: Workflow, height: int, width: int) -> dict[str, Any]:
    clip = _link(nodes, "clip")
    if kind != SDXL:
        return _node("CLIPTextEncode", clip=clip, text=PROMPT)
    # Without the sizes ComfyUI conditions on 768 x 768.
    sizes = {"width": width, "height": height, "target_width": width, "target_height": height}
    crop = {"crop_w": 0, "crop_h": 0}
    return _node("CLIPTextEncodeSDXL", clip=clip, **sizes, **crop, text_g=PROMPT, text_l=PROMPT)


def _decoding(folder: PipelineFolder, nodes: Workflow) -> Workflow:
    """Nodes from the latent to the file."""
    part, latent, extra = folder.components[folder.backbone], ["sample", 0], {}
    scale = folder.components["vae"].spec.scaling_factor
    pixart = folder.model_index["_class_name"].startswith("PixArt")
    # ComfyUI takes a PixArt without size conditions for Sigma, whose latents have another scale.
    if pixart and not part.spec.size_conditioned and scale != SIGMA_SCALE:
        inputs = {"samples": latent, "multiplier": SIGMA_SCALE / scale}
        extra["scale"] = _node("LatentMultiply", **inputs)
        latent = ["scale", 0]
    decode = _node("VAEDecode", samples=latent, vae=_link(nodes, "vae"))
    save = _node("SaveImage", images=["decode", 0], filename_prefix="gadjax")
    return extra | {"decode": decode, "save": save}


def workflow_json(nodes: Workflow) -> str:
    """Text of a workflow's file."""
    return json.dumps(nodes, indent=2) + "\n"
