"""Configuration of MMDiT, the transformer of SD3 (diffusers SD3Transformer2DModel)."""

from dataclasses import dataclass

from gadjax.errors import InputError
from gadjax.models.config import (
    POSITIVE_INTEGER,
    BackboneConfig,
    is_positive,
    read_options,
    refuse,
)

CLASS_NAMES = ("SD3Transformer2DModel",)


@dataclass(frozen=True)
class Config(BackboneConfig):
    """Options of a diffusers config.json that shape the network, under their names there."""

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def feature_blocks(self) -> int:
        return self.num_layers

    @property
    def text_dim(self) -> int:
        return self.joint_attention_dim

    @property
    def pooled_dim(self) -> int:
        return self.pooled_projection_dim

    @property
    def dual_layers(self) -> int:
        """Number of blocks, the first ones, with a second self-attention of the image (SD3.5)."""
        return len(self.dual_attention_layers)

    @classmethod
    def from_dict(cls, cfg: dict) -> "Config":
        """Read a diffusers config.json. Raises: InputError naming the first unsupported key."""
        # These two only repeat another size; their defaults are diffusers'.
        others = ("caption_projection_dim", "out_channels")
        given = read_options(cls, cfg, "an option of SD3", others=others, keep_null=True)
        caption, out = cfg.get(others[0], 1152), cfg.get(others[1], 16)
        dual = tuple(given.pop("dual_attention_layers", None) or ())
        for key, value in given.items():
            if key != "qk_norm" and not is_positive(value, int):
                refuse(key, value, POSITIVE_INTEGER)
        config = cls(**given, dual_attention_layers=dual)
        if config.qk_norm not in (None, "rms_norm"):
            refuse("qk_norm", config.qk_norm, "null or 'rms_norm'")
        if config.num_layers < 2:
            refuse("num_layers", config.num_layers, "2 or more")
        if dual != tuple(range(min(len(dual), config.num_layers))):
            layers = f"the first of the {config.num_layers} layers, without a gap"
            refuse("dual_attention_layers", list(dual), layers)
        if config.dim % 4:
            raise InputError(
                f"attention_head_dim: found a width of {config.dim}; expected a multiple of 4"
            )
        if caption != config.dim:
            raise InputError(
                f"caption_projection_dim: found {caption}; expected {config.dim}, the model's width"
            )
        if out not in (None, config.in_channels):
            raise InputError(
                f"out_channels: found {out}; expected {config.in_channels}, as in_channels"
            )
        return config
