"""A random pipeline and a config that trains it in seconds: for tests, and for scripts."""

from pathlib import Path


def build_pipeline():
    """A PixArtAlphaPipeline of diffusers with every parameter random, in float32."""
    import torch
    from diffusers import (
        DPMSolverMultistepScheduler,
        PixArtAlphaPipeline,
        PixArtTransformer2DModel,
    )
    from families import t5, vae_kl

    torch.set_num_threads(1)
    tokenizer, text_encoder = t5(20, ("red", "green", "blue", "circle", "square", "above"))
    vae = vae_kl()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=8,
        caption_channels=20,
        use_additional_conditions=False,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for network in (text_encoder, vae, transformer):
            for parameter in network.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(
            beta_schedule="linear", beta_start=1e-4, beta_end=0.02
        ),
    )


def write_pipeline(folder: Path) -> Path:
    """The same as a folder of diffusers."""
    build_pipeline().save_pretrained(folder)
    return folder


def config_file(path: Path, **changes) -> Path:
    """Write a config file: the default config with nested changes."""
    path.write_text(
        "from gadjax.training.config import changed_config, default_config\n\n"
        f"def get_config():\n    return changed_config(default_config(), {changes!r})\n"
    )
    return path


# A run of seconds.
CONFIG = """
from gadjax.training.config import default_config

def get_config(variant="all"):
    config = default_config()
    config.teacher = {teacher!r}
    config.guidance = 2.0
    config.student.steps, config.student.timesteps = 2, (900, 400)
    config.objective = {{"tdm": {{}}}}
    if variant == "regression":
        config.objective = {{"regression": {{"steps": 1}}}}
    if variant == "all":
        config.objective = {{"dmd": {{}}, "gad": {{"steps": 1}}, "anchor": {{"steps": 1}}}}
    config.steps, config.batch = 4, 8
    config.remat = "none"
    config.optim.lr = 1e-3
    config.critic.lr = 1e-3
    config.data.update(prompts={prompts!r}, length=8)
    config.checkpoint.every = 2
    config.log.every = 1
    config.preview.every = 0
    return config
"""


def write_config(folder: Path, pipeline: Path) -> Path:
    """A config file that trains on a pipeline's folder, and its prompts; variants: all, tdm,
    regression."""
    prompts = folder / "prompts.txt"
    prompts.write_text("red circle\ngreen square\nblue circle above red square\n")
    path = folder / "tiny.py"
    path.write_text(CONFIG.format(teacher=str(pipeline), prompts=str(prompts)))
    return path
