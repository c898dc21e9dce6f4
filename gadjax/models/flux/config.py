"""Configuration of FLUX.1's transformer (diffusers FluxTransformer2DModel)."""

from dataclasses import dataclass

from gadjax.errors import InputError
from gadjax.models.config import (
    POSITIVE_INTEGER,
    BackboneConfig,
    is_positive,
    read_options,
    refuse,
)

CLASS_NAMES = ("FluxTransformer2DModel",)
PATCH = 2  # side in latents of a token, which the pipeline packs
FIXED = {"patch_size": 1}


@dataclass(frozen=True)
class Config(BackboneConfig):
    """Options of a diffusers config.json that shape the network, under their names there.

    sample_size is no option of the class: the side of the latents that the pipeline draws by
    default, 1024 pixels, or what a folder's config.json says for gadjax.
    """

    sample_size: int = 128
    in_channels: int = 64
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    qk_norm = "rms_norm"  # of MMDiT's blocks

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        return self.in_channels // PATCH**2

    @property
    def feature_blocks(self) -> int:
        return self.num_layers + self.num_single_layers

    @property
    def text_dim(self) -> int:
        return self.joint_attention_dim

    @property
    def pooled_dim(self) -> int:
        return self.pooled_projection_dim

    @classmethod
    def from_dict(cls, cfg: dict) -> "Config":
        """Read a diffusers config.json. Raises: InputError naming the first unsupported key."""
        for key, value in FIXED.items():
            if cfg.get(key, value) != value:
                refuse(key, cfg[key], repr(value))
        given = read_options(cls, cfg, "an option of FLUX", others={*FIXED, "out_channels"})
        axes = given.pop("axes_dims_rope", [16, 56, 56])
        if not isinstance(axes, list | tuple) or not all(is_positive(n, int) for n in axes):
            refuse("axes_dims_rope", axes, "three positive integers")
        for key, value in given.items():
            if key != "guidance_embeds" and not is_positive(value, int):
                refuse(key, value, POSITIVE_INTEGER)
        config = cls(**given, axes_dims_rope=tuple(axes))
        if type(config.guidance_embeds) is not bool:
            refuse("guidance_embeds", config.guidance_embeds, "true or false")
        if len(axes) != 3 or any(n % 2 for n in axes) or sum(axes) != config.attention_head_dim:
            raise InputError(
                f"axes_dims_rope: found {list(axes)}; expected three even numbers whose sum is "
                f"{config.attention_head_dim}, the width of a head"
            )
        if config.in_channels % PATCH**2:
            refuse("in_channels", config.in_channels, f"a multiple of {PATCH**2}: packed latents")
        if config.sample_size % PATCH:
            refuse("sample_size", config.sample_size, f"a multiple of {PATCH}")
        if cfg.get("out_channels") not in (None, config.in_channels):
            raise InputError(
                f"out_channels: found {cfg['out_channels']}; expected {config.in_channels}, as "
                "in_channels"
            )
        return config
