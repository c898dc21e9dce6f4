"""Configuration of Z-Image's transformer (diffusers ZImageTransformer2DModel)."""

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

CLASS_NAMES = ("ZImageTransformer2DModel",)
PATCH = 2
STEPS = 1000  # t of pure noise
TIME_DIM = 256  # width of the time embedding, in networks that are as wide

# Options of the file's config with one supported value.
FIXED = {"all_patch_size": [PATCH], "all_f_patch_size": [1], "qk_norm": True}


@dataclass(frozen=True)
class Config(BackboneConfig):
    """Options of a diffusers config.json that shape the network, under their names there.

    sample_size is no option of the class: the side of the latents that the pipeline draws by
    default, 1024 pixels, or what a folder's config.json says for gadjax.
    """

    sample_size: int = 128
    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    norm_eps: float = 1e-5
    cap_feat_dim: int = 2560
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1024, 512, 512)

    # What the network's class asks of its options besides; Lumina 2 answers otherwise.
    multiple = 32  # both streams are padded to multiples of it, with learned tokens
    first_position = 1  # of the caption
    rounds_angles = True  # of rotations, to float32
    time_hidden = 1024  # width of the time embedding's hidden layer
    activates_time = False  # before the blocks' projections

    @property
    def kv_heads(self) -> int:
        return self.n_heads

    @property
    def feature_blocks(self) -> int:
        return self.n_layers

    @property
    def text_dim(self) -> int:
        return self.cap_feat_dim

    @property
    def time_dim(self) -> int:
        return min(self.dim, TIME_DIM)

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward's hidden layer."""
        return int(self.dim / 3 * 8)

    @classmethod
    def from_dict(cls, cfg: dict) -> "Config":
        """Read a diffusers config.json. Raises: InputError naming the first unsupported key."""
        for key, value in FIXED.items():
            if cfg.get(key, value) != value:
                refuse(key, cfg[key], repr(value))
        others = {*FIXED, "n_kv_heads"}
        given = read_options(cls, cfg, "an option of Z-Image", others=others)
        given |= read_axes(cfg, "axes_dims", "axes_lens")
        for key, value in given.items():
            if key in ("norm_eps", "rope_theta", "t_scale"):
                if not is_positive(value, int, float):
                    refuse(key, value, POSITIVE_NUMBER)
            elif not key.startswith("axes") and not is_positive(value, int):
                refuse(key, value, POSITIVE_INTEGER)
        config = cls(**given)
        if config.sample_size % PATCH:
            refuse("sample_size", config.sample_size, f"a multiple of {PATCH}")
        if config.dim % config.n_heads:
            refuse("n_heads", config.n_heads, f"a divisor of dim {config.dim}")
        heads = cfg.get("n_kv_heads", 30)
        if heads != config.n_heads:
            refuse("n_kv_heads", heads, f"{config.n_heads}, as n_heads")
        width = config.dim // config.n_heads
        if sum(config.axes_dims) != width:
            raise InputError(
                f"axes_dims: found {list(config.axes_dims)}; expected numbers whose sum is "
                f"{width}, the width of a head"
            )
        return config


def read_axes(cfg: dict, dims: str, lens: str) -> dict[str, tuple[int, ...]]:
    """Read the widths and lengths of the three axes of positions, where the config has them.

    Args:
      cfg: content of a config.json.
      dims, lens: the two options.

    Raises: InputError for another number of axes, or numbers that are no such thing.
    """
    for key in (dims, lens):
        value = cfg.get(key, [2, 2, 2])
        integers = isinstance(value, list) and all(is_positive(number, int) for number in value)
        if not integers or len(value) != 3 or key == dims and any(n % 2 for n in value):
            even = " even" * (key == dims)
            refuse(key, value, f"three positive{even} numbers")
    return {key: tuple(cfg[key]) for key in (dims, lens) if key in cfg}
