"""PixArt-alpha's denoiser: a transformer over patches, modulated by a shared time projection.

Follows diffusers' PixArtTransformer2DModel. Parameters are cast to the compute dtype at use.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from gadjax.errors import InputError
from gadjax.models import layers
from gadjax.models.config import BackboneConfig, read_options
from gadjax.models.ignored import IGNORED
from gadjax.models.module import Keys, scan_through, stack
from gadjax.types import TextKV

# The second is the name in the published repositories.
CLASS_NAMES = ("PixArtTransformer2DModel", "Transformer2DModel")
TIME_CHANNELS = 256
OUT_EPS = 1e-6  # the last norm does not follow norm_eps

# Options of the file's config with one supported value (the default, where the file has none).
FIXED = {
    "norm_type": "ada_norm_single",
    "activation_fn": "gelu-approximate",
    "attention_type": "default",
    "norm_elementwise_affine": False,
    "double_self_attention": False,
    "only_cross_attention": False,
    "num_vector_embeds": None,
    "dropout": 0.0,
}
OTHER_OPTIONS = {*IGNORED[CLASS_NAMES[0]], "cross_attention_dim"}  # the latter is the width


@dataclass(frozen=True)
class Config(BackboneConfig):
    """Options of a diffusers config.json that shape the network, under their names there."""

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    num_layers: int = 28
    in_channels: int = 4
    out_channels: int = 8
    patch_size: int = 2
    sample_size: int = 128
    caption_channels: int = 4096
    attention_bias: bool = True
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    use_additional_conditions: bool | None = None

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def feature_blocks(self) -> int:
        return self.num_layers

    @property
    def text_dim(self) -> int:
        return self.caption_channels

    @property
    def position_scale(self) -> float:
        """Interpolation scale of position embeddings; by default large grids map to 64 latents."""
        if self.interpolation_scale is None:
            return max(self.sample_size // 64, 1)
        return self.interpolation_scale

    @property
    def size_conditioned(self) -> bool:
        """Micro-conditioning: the network takes resolution and aspect ratio as inputs."""
        if self.use_additional_conditions is None:
            return self.sample_size == 128
        return self.use_additional_conditions

    @classmethod
    def from_dict(cls, cfg: dict) -> "Config":
        """Read a diffusers config.json. Raises: InputError naming the first unsupported key."""
        given = read_options(cls, cfg, "an option of PixArt", fixed=FIXED, others=OTHER_OPTIONS)
        if cfg.get("_class_name") == "Transformer2DModel" and "norm_type" not in cfg:
            raise InputError("norm_type: found nothing; expected 'ada_norm_single'")
        if cfg.get("caption_channels") is None:
            raise InputError("caption_channels: found none; expected the text encoder's width")
        if cfg.get("out_channels", 8) is None:
            given["out_channels"] = given.get("in_channels", 4)
        config = cls(**given)
        cross = cfg.get("cross_attention_dim", 1152)
        if cross != config.dim:
            raise InputError(
                f"cross_attention_dim: found {cross}; expected {config.dim}, the model's width"
            )
        if config.dim % (12 if config.size_conditioned else 4):
            raise InputError(
                f"attention_head_dim: found a width of {config.dim}; expected a multiple of 4, "
                "and of 12 with use_additional_conditions"
            )
        return config


def build(config: Config, *, dtype=jnp.float32, remat: bool = True) -> Callable:
    """Constructor of the network, called with Keys.

    Args:
      config: the network's options.
      dtype: of the computation; parameters are initialised in float32.
      remat: rematerialisation of every block, see `checkpointed`.
    """
    return lambda rngs: PixArt(config, dtype=dtype, remat=remat, rngs=rngs)


class PatchEmbed(nnx.Module):
    """Patch tokens of latents of any size, with position embeddings."""

    def __init__(self, c: Config, *, dtype, rngs: Keys):
        self.proj = layers.PatchProjection(
            c.in_channels, c.dim, c.patch_size, dtype=dtype, rngs=rngs
        )
        self.base, self.scale = c.sample_size // c.patch_size, c.position_scale

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        tokens_BND = self.proj(x_BHWC)
        h, w = (n // self.proj.patch for n in x_BHWC.shape[1:3])
        # The sum is in float32 and then rounded once.
        wide = jnp.promote_types(tokens_BND.dtype, jnp.float32)
        table = layers.sincos_positions(h, w, tokens_BND.shape[-1], self.base, self.scale, wide)
        return (tokens_BND + table).astype(tokens_BND.dtype)


class TimeSizeEmbedding(nnx.Module):
    """Embedding of the timestep and, if `size_conditioned`, of resolution and aspect ratio."""

    def __init__(self, dim: int, size_conditioned: bool, *, dtype, rngs: Keys):
        def mlp(out):
            return layers.Mlp(TIME_CHANNELS, out, out, jax.nn.silu, dtype=dtype, rngs=rngs)

        self.timestep_embedder = mlp(dim)
        if size_conditioned:
            self.resolution_embedder = mlp(dim // 3)
            self.aspect_ratio_embedder = mlp(dim // 3)
        self.size_conditioned = size_conditioned

    def __call__(self, t_B: jax.Array, added_cond: dict[str, jax.Array] | None) -> jax.Array:
        time_BD = self.timestep_embedder(layers.timestep_sinusoid(t_B, TIME_CHANNELS))
        if not self.size_conditioned:
            return time_BD
        added_cond = added_cond or {}
        sizes = []
        for name, count in (("resolution", 2), ("aspect_ratio", 1)):
            value, shape = added_cond.get(name), (t_B.shape[0], count)
            if value is None or value.shape != shape:
                given = "nothing" if value is None else f"shape {value.shape}"
                raise InputError(f"added_cond[{name!r}]: found {given}; expected an array {shape}")
            features = layers.timestep_sinusoid(value.reshape(-1), TIME_CHANNELS)
            sizes.append(getattr(self, f"{name}_embedder")(features).reshape(t_B.shape[0], -1))
        return time_BD + jnp.concatenate(sizes, axis=-1)


class AdaLayerNormSingle(nnx.Module):
    """adaLN-single: the modulation [B, 6, D] that all blocks share, and its input vector [B, D]."""

    def __init__(self, dim: int, size_conditioned: bool, *, dtype, rngs: Keys):
        self.emb = TimeSizeEmbedding(dim, size_conditioned, dtype=dtype, rngs=rngs)
        self.linear = layers.Linear(dim, 6 * dim, dtype=dtype, rngs=rngs)

    def __call__(self, t_B: jax.Array, added_cond) -> tuple[jax.Array, jax.Array]:
        embedded_BD = self.emb(t_B, added_cond)
        modulation_BE = self.linear(jax.nn.silu(embedded_BD))
        return modulation_BE.reshape(*embedded_BD.shape[:1], 6, -1), embedded_BD


class Block(nnx.Module):
    """Modulated self-attention, plain cross-attention, modulated feed-forward."""

    def __init__(self, c: Config, *, dtype, rngs: Keys):
        def attn():
            return layers.Attention(
                c.dim,
                c.num_attention_heads,
                c.attention_head_dim,
                bias=c.attention_bias,
                dtype=dtype,
                rngs=rngs,
            )

        self.attn1, self.attn2 = attn(), attn()
        self.ff = layers.Mlp(c.dim, 4 * c.dim, c.dim, layers.gelu_tanh, dtype=dtype, rngs=rngs)
        self.scale_shift_table = layers.modulation_table(rngs, 6, c.dim)
        self.eps = c.norm_eps

    def __call__(self, x_BND, modulation_B6D, text, bias, remat: bool) -> jax.Array:
        """Tokens [B, N, D] after the block.

        Args:
          x_BND: tokens.
          modulation_B6D: shift, scale and gate of the self-attention and of the feed-forward.
          text: projected prompt embeddings [B, L, D], or their KV cache.
          bias: of the cross-attention's logits.
          remat: whether reverse mode recomputes the block entirely; see `Mlp.gated_residual`.
        """
        table = self.scale_shift_table[...].astype(x_BND.dtype) + modulation_B6D
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(table, 6, axis=1)
        normed = layers.layer_norm(x_BND, self.eps) * (1 + scale1) + shift1
        x_BND = x_BND + gate1 * self.attn1(normed)
        # No norm and no gate here: the weights were trained so.
        x_BND = x_BND + self.attn2(x_BND, text, bias)
        normed = layers.layer_norm(x_BND, self.eps) * (1 + scale2) + shift2
        return self.ff.gated_residual(x_BND, gate2, normed, remat)


class PixArt(nnx.Module):
    """PixArt denoiser; see `__call__`."""

    def __init__(self, config: Config, *, dtype, remat: bool, rngs: Keys):
        c, dim = config, config.dim
        self.pos_embed = PatchEmbed(c, dtype=dtype, rngs=rngs)
        self.adaln_single = AdaLayerNormSingle(dim, c.size_conditioned, dtype=dtype, rngs=rngs)
        self.caption_projection = layers.Mlp(
            c.caption_channels, dim, dim, layers.gelu_tanh, dtype=dtype, rngs=rngs
        )
        self.blocks = stack(lambda r: Block(c, dtype=dtype, rngs=r), c.num_layers, rngs)
        self.scale_shift_table = layers.modulation_table(rngs, 2, dim)
        self.proj_out = layers.Linear(dim, c.patch_size**2 * c.out_channels, dtype=dtype, rngs=rngs)
        self.depth, self.patch, self.remat = c.num_layers, c.patch_size, remat

    def __call__(
        self,
        x_BHWC: jax.Array,
        t_B: jax.Array,
        text: jax.Array | TextKV,
        mask_BL: jax.Array,
        added_cond: dict[str, jax.Array] | None = None,
    ) -> jax.Array:
        """Raw output for noisy latents.

        Args:
          x_BHWC: latents; H and W multiples of the patch size, otherwise free.
          t_B: timesteps in [0, 1000), integer or fractional.
          text: prompt embeddings [B, L, D], or their KV cache from `text_kv`.
          mask_BL: attention mask: 1 for the tokens of the prompt, 0 for padding.
          added_cond: {"resolution": [B, 2] (height, width in pixels), "aspect_ratio": [B, 1]};
            an input of networks with `Config.size_conditioned` alone, which need it.

        Returns: [B, H, W, out_channels] in the compute dtype; with a learned variance the
          noise is the first half of the channels.
        Raises: InputError for a size the patch does not divide, or without a needed `added_cond`.
        """
        (x_BND,), embedded_BD = self._trunk((self.depth,), x_BHWC, t_B, text, mask_BL, added_cond)
        table = self.scale_shift_table[...].astype(x_BND.dtype) + embedded_BD[:, None]
        shift, scale = jnp.split(table, 2, axis=1)
        x_BND = self.proj_out(layers.layer_norm(x_BND, OUT_EPS) * (1 + scale) + shift)
        return layers.unpatchify(x_BND, *x_BHWC.shape[1:3], self.patch)

    def features(self, x_BHWC, t_B, text, mask_BL, added_cond=None, *, blocks=()):
        """Tokens [B, N, D] after the first half of the blocks; arguments as `__call__`.

        blocks: rising block numbers from 0: a tuple of the tokens after each, in one pass.
        """
        counts = [block + 1 for block in blocks] or [(self.depth + 1) // 2]
        tokens, _ = self._trunk(counts, x_BHWC, t_B, text, mask_BL, added_cond)
        return tuple(tokens) if blocks else tokens[0]

    def text_kv(self, text_BLD: jax.Array) -> TextKV:
        """KV cache of a prompt for the cross-attention of all layers."""
        return layers.text_kv(self.blocks, self.caption_projection(text_BLD))

    def _trunk(self, counts, x_BHWC, t_B, text, mask_BL, added_cond):
        """Tokens after each of `counts` blocks, and the embedding that modulates them."""
        modulation_B6D, embedded_BD = self.adaln_single(t_B, added_cond)
        bias = layers.mask_bias(mask_BL)
        text = text if isinstance(text, TextKV) else self.caption_projection(text)

        def call(block, x, text):
            return block(x, modulation_B6D, text, bias, self.remat is True)

        x_BND = self.pos_embed(x_BHWC)
        return scan_through(self.blocks, x_BND, counts, call, self.remat, text), embedded_BD
