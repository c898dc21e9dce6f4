"""Configuration of MMDiT, the transformer of SD3 (diffusers SD3Transformer2DModel)."""

from dataclasses import dataclass, fields

from gadjax.errors import InputError

CLASS_NAMES = ("SD3Transformer2DModel",)


@dataclass(frozen=True)
class Config:
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
    def dual_layers(self) -> int:
        """Number of blocks, the first ones, with a second self-attention of the image (SD3.5)."""
        return len(self.dual_attention_layers)

    @classmethod
    def from_dict(cls, cfg: dict) -> "Config":
        """Read a diffusers config.json. Raises: InputError naming the first unsupported key."""
        names = {f.name for f in fields(cls)}  # for other keys null means absent
        # These two only repeat another size; their defaults are diffusers'.
        names |= {"caption_projection_dim", "out_channels"}
        given = {k: v for k, v in cfg.items() if k[:1] != "_" and (k in names or v is not None)}
        caption = given.pop("caption_projection_dim", 1152)
        out = given.pop("out_channels", 16)
        dual = tuple(given.pop("dual_attention_layers", None) or ())
        sizes = [f.name for f in fields(cls) if f.type is int]
        for key, value in given.items():
            if key not in sizes and key != "qk_norm":
                raise InputError(f"{key}: found {value!r}; expected an option of SD3")
            if key in sizes and (type(value) is not int or value < 1):
                raise InputError(f"{key}: found {value!r}; expected a positive integer")
        config = cls(**given, dual_attention_layers=dual)
        if config.qk_norm not in (None, "rms_norm"):
            raise InputError(f"qk_norm: found {config.qk_norm!r}; expected null or 'rms_norm'")
        if config.num_layers < 2:
            raise InputError(f"num_layers: found {config.num_layers}; expected 2 or more")
        if dual != tuple(range(min(len(dual), config.num_layers))):
            raise InputError(
                f"dual_attention_layers: found {list(dual)}; expected the first of "
                f"the {config.num_layers} layers, without a gap"
            )
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
