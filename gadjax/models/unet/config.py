"""Configuration of the U-Net: the supported options of diffusers' UNet2DConditionModel."""

from dataclasses import dataclass, fields
from typing import Any

from gadjax.models.config import (
    POSITIVE_INTEGER,
    BackboneConfig,
    is_positive,
    read_options,
    refuse,
)
from gadjax.models.ignored import IGNORED

CLASS_NAMES = ("UNet2DConditionModel",)

TIME_IDS = 6  # sizes and a corner, two numbers each

# Options of the file's config with one supported value (the default, where the file has none).
FIXED = {
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
PER_BLOCK = {"attention_head_dim": 8, "transformer_layers_per_block": 1}
KINDS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


@dataclass(frozen=True)
class Config(BackboneConfig):
    """Options that shape the network, under diffusers' names; tuples have one entry per block."""

    sample_size: int
    attention_head_dim: tuple[int, ...]  # number of heads, despite its name
    transformer_layers_per_block: tuple[int, ...]
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: int = 2
    in_channels: int = 4
    out_channels: int = 4
    cross_attention_dim: int = 1280
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    @property
    def multiple(self) -> int:
        """Divisor of the height and width of latents: 2^(blocks - 1)."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def text_dim(self) -> int:
        return self.cross_attention_dim

    @property
    def pooled_dim(self) -> int | None:
        """Width of SDXL's pooled prompt embedding; None for the other U-Nets."""
        if self.addition_embed_type is None:
            return None
        return self.projection_class_embeddings_input_dim - TIME_IDS * self.addition_time_embed_dim

    @classmethod
    def from_dict(cls, cfg: dict[str, Any]) -> "Config":
        """Read a diffusers config.json. Raises: InputError naming the first unsupported key."""
        # May be a list; its one supported value is false for all blocks.
        cross, fixed = cfg.get("only_cross_attention"), FIXED
        if isinstance(cross, list | tuple) and not any(cross):
            fixed = FIXED | {"only_cross_attention": cross}
        given = read_options(
            cls,
            cfg,
            f"an option of {CLASS_NAMES[0]}",
            fixed=fixed,
            others=IGNORED[CLASS_NAMES[0]],
            keep_null=True,
        )
        if cfg.get("sample_size") is None:
            refuse("sample_size", None, "the side of the latents")
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        widths = given.get("block_out_channels", cls.block_out_channels)
        if not isinstance(widths, tuple):
            refuse("block_out_channels", widths, "a list")
        for key, default in PER_BLOCK.items():
            value = given.get(key, default)
            given[key] = value if isinstance(value, tuple) else (value,) * len(widths)
        config = cls(**given)
        config._check()
        return config

    def _check(self) -> None:
        widths, groups = self.block_out_channels, self.norm_num_groups
        counts = [f.name for f in fields(self) if f.type is int]
        sized = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
        if self.addition_embed_type is not None:
            if self.addition_embed_type != "text_time":
                refuse("addition_embed_type", self.addition_embed_type, "'text_time' or null")
            counts += sized
        for key in counts:
            if not is_positive(getattr(self, key), int):
                refuse(key, getattr(self, key), POSITIVE_INTEGER)
        for key in ("block_out_channels", *PER_BLOCK):
            value = getattr(self, key)
            if not _counts(value) or len(value) != len(widths):
                refuse(key, value, f"a positive integer for each of {len(widths)} blocks")
        for key, kinds in KINDS.items():
            value = getattr(self, key)
            if len(value) != len(widths) or not set(value) <= set(kinds):
                refuse(key, value, f"{' or '.join(kinds)} for each of {len(widths)} blocks")
        if self.out_channels != self.in_channels:
            refuse("out_channels", self.out_channels, f"{self.in_channels}, as in_channels")
        if any(width % groups for width in widths):
            refuse("norm_num_groups", groups, f"a divisor of block_out_channels {widths}")
        # Half of the channels of a sinusoidal embedding are sines.
        if widths[0] % 2:
            refuse("block_out_channels", widths, "an even number first")
        cross = [kind.startswith("Cross") for kind in self.down_block_types]
        up = [kind.startswith("Cross") for kind in self.up_block_types][::-1]
        cross[-1] = True  # the middle block has the last one's heads
        for width, heads, used in zip(
            widths, self.attention_head_dim, map(max, cross, up), strict=True
        ):
            if used and width % heads:
                refuse("attention_head_dim", self.attention_head_dim, f"divisors of {widths}")
        if self.addition_embed_type is not None:
            if self.addition_time_embed_dim % 2:
                refuse(sized[0], self.addition_time_embed_dim, "an even number")
            if self.pooled_dim < 1:
                most = TIME_IDS * self.addition_time_embed_dim
                refuse(sized[1], getattr(self, sized[1]), f"more than {most}")


def _counts(values) -> bool:
    return all(is_positive(value, int) for value in values)
