"""Names of FLUX.2's modules in the original release."""

from collections.abc import Collection

from gadjax.models.flux.original import DOUBLE as FLUX1_DOUBLE
from gadjax.models.flux.original import original_modules
from gadjax.models.flux2.config import Config
from gadjax.models.keymap import Original

OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
}
DOUBLE = {name: rows for name, rows in FLUX1_DOUBLE.items() if "attn" in name} | {
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
SINGLE = {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}


def original(names: Collection[str], config: Config) -> dict[str, Original]:
    """Original modules with the modules in diffusers that their rows are.

    Args:
      names: of the modules in diffusers.
      config: the network's options.
    """
    return original_modules(names, config, OUTER, DOUBLE, SINGLE)
