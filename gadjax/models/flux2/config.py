"""Configuration of FLUX.2-klein's transformer (diffusers Flux2Transformer2DModel)."""

from dataclasses import dataclass

from gadjax.errors import InputError
from gadjax.models.config import (
    POSITIVE_INTEGER,
    POSITIVE_NUMBER,
    BackboneConfig,
    is_positive,
    read_options,
    refuse,
)

CLASS_NAMES = ("Flux2Transformer2DModel",)
AXES = 4  # of positions: picture, row, column, token of the text
NUMBERS = "mlp_ratio", "rope_theta", "eps"


@dataclass(frozen=True)
class Config(BackboneConfig):
    """Options of a diffusers config.json that shape the network, under their names there.

    The class's defaults are those of FLUX.2-dev. sample_size is no option of the class: the side of
    the latents, which the autoencoder has patchified, that the pipeline draws by default: 1024
    pixels, or what a folder's config.json says for gadjax.
    """

    sample_size: int = 64
    in_channels: int = 128
    num_layers: int = 8
    num_single_layers: int = 48
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    joint_attention_dim: int = 15360
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 2000
    eps: float = 1e-6

    token_side = 1

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def hidden_dim(self) -> int:
        """Width of a feed-forward's hidden layer."""
        return int(self.dim * self.mlp_ratio)

    @property
    def feature_blocks(self) -> int:
        return self.num_layers + self.num_single_layers

    @property
    def text_dim(self) -> int:
        return self.joint_attention_dim

    @classmethod
    def from_dict(cls, cfg: dict) -> "Config":
        """Read a diffusers config.json. Raises: InputError naming the first unsupported key."""
        # FLUX.2-dev embeds its guidance scale, and reads the prompt with another text encoder.
        for key, default, value in (("patch_size", 1, 1), ("guidance_embeds", True, False)):
            if cfg.get(key, default) != value:
                refuse(key, cfg.get(key, default), repr(value))
        others = {"patch_size", "guidance_embeds", "out_channels"}
        given = read_options(cls, cfg, "an option of FLUX.2", others=others)
        axes = given.pop("axes_dims_rope", [32] * AXES)
        if not isinstance(axes, list | tuple) or not all(is_positive(n, int) for n in axes):
            refuse("axes_dims_rope", axes, f"{AXES} positive integers")
        for key, value in given.items():
            kinds = (int, float) if key in NUMBERS else (int,)
            if not is_positive(value, *kinds):
                refuse(key, value, POSITIVE_NUMBER if key in NUMBERS else POSITIVE_INTEGER)
        config = cls(**given, axes_dims_rope=tuple(axes))
        if len(axes) != AXES or any(n % 2 for n in axes) or sum(axes) != config.attention_head_dim:
            raise InputError(
                f"axes_dims_rope: found {list(axes)}; expected {AXES} even numbers whose sum is "
                f"{config.attention_head_dim}, the width of a head"
            )
        if config.timestep_guidance_channels % 2:
            refuse(
                "timestep_guidance_channels", config.timestep_guidance_channels, "an even number"
            )
        if cfg.get("out_channels") not in (None, config.in_channels):
            raise InputError(
                f"out_channels: found {cfg['out_channels']}; expected {config.in_channels}, as "
                "in_channels"
            )
        return config
