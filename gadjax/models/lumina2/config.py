"""Configuration of Lumina-Image 2.0's transformer (diffusers Lumina2Transformer2DModel)."""

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
from gadjax.models.zimage.config import PATCH, read_axes

CLASS_NAMES = ("Lumina2Transformer2DModel",)
TIME_DIM = 1024  # width of the time embedding, in networks that are as wide


@dataclass(frozen=True)
class Config(BackboneConfig):
    """Options of a diffusers config.json that shape the network, under their names there."""

    sample_size: int = 128
    in_channels: int = 16
    hidden_size: int = 2304
    num_layers: int = 26
    num_refiner_layers: int = 2
    num_attention_heads: int = 24
    num_kv_heads: int = 8
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    axes_dim_rope: tuple[int, ...] = (32, 32, 32)
    axes_lens: tuple[int, ...] = (300, 512, 512)
    cap_feat_dim: int = 1024

    # What Z-Image's network asks of its options besides; see there.
    multiple = 1
    first_position = 0
    rounds_angles = False
    activates_time = True
    rope_theta = 10_000.0
    t_scale = 1.0

    dim = property(lambda self: self.hidden_size)
    n_layers = property(lambda self: self.num_layers)
    n_refiner_layers = property(lambda self: self.num_refiner_layers)
    n_heads = property(lambda self: self.num_attention_heads)
    kv_heads = property(lambda self: self.num_kv_heads)
    axes_dims = property(lambda self: self.axes_dim_rope)
    time_dim = property(lambda self: min(self.hidden_size, TIME_DIM))
    time_hidden = property(lambda self: self.time_dim)
    feature_blocks = property(lambda self: self.num_layers)
    text_dim = property(lambda self: self.cap_feat_dim)

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward's hidden layer."""
        width = 4 * self.hidden_size
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return -(-width // self.multiple_of) * self.multiple_of

    @classmethod
    def from_dict(cls, cfg: dict) -> "Config":
        """Read a diffusers config.json. Raises: InputError naming the first unsupported key."""
        others = "patch_size", "out_channels", "scaling_factor"
        given = read_options(cls, cfg, "an option of Lumina 2", others=others, keep_null=True)
        if cfg.get("patch_size", PATCH) != PATCH:
            refuse("patch_size", cfg["patch_size"], repr(PATCH))
        given |= read_axes(cfg, "axes_dim_rope", "axes_lens")
        for key, value in given.items():
            if key in ("norm_eps", "ffn_dim_multiplier"):
                if not (is_positive(value, int, float) or key[0] == "f" and value is None):
                    refuse(key, value, POSITIVE_NUMBER)
            elif not key.startswith("axes") and not is_positive(value, int):
                refuse(key, value, POSITIVE_INTEGER)
        config = cls(**given)
        if config.sample_size % PATCH:
            refuse("sample_size", config.sample_size, f"a multiple of {PATCH}")
        if config.num_attention_heads % config.num_kv_heads:
            expected = f"a divisor of num_attention_heads {config.num_attention_heads}"
            refuse("num_kv_heads", config.num_kv_heads, expected)
        if sum(config.axes_dims) * config.n_heads != config.dim:
            raise InputError(
                f"axes_dim_rope: found {list(config.axes_dims)}; expected numbers whose sum is "
                f"hidden_size {config.dim} / num_attention_heads {config.n_heads}"
            )
        if cfg.get("out_channels") not in (None, config.in_channels):
            expected = f"{config.in_channels}, as in_channels"
            refuse("out_channels", cfg["out_channels"], expected)
        return config
