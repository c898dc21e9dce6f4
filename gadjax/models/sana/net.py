"""Sana's denoiser: linear self-attention; convolutions provide the positions.

Follows diffusers' SanaTransformer2DModel and its pipelines' scaling of t and of the guidance scale.
Parameters are cast to the compute dtype at use.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from gadjax.errors import InputError
from gadjax.models import layers
from gadjax.models.config import BackboneConfig, read_options, refuse
from gadjax.models.module import Keys, scan_through, stack
from gadjax.models.sana.blocks import Attention, GLUMBConv, RMSNorm
from gadjax.types import TextKV

CLASS_NAMES = ("SanaTransformer2DModel",)
TIME_CHANNELS = 256
OUT_EPS = 1e-6  # the last norm does not follow norm_eps

# Options of the file's config with one supported value (the default, where the file has none).
FIXED = {"norm_elementwise_affine": False, "dropout": 0.0}


@dataclass(frozen=True)
class Config(BackboneConfig):
    """Options of a diffusers config.json that shape the network, under their names there."""

    in_channels: int = 32
    out_channels: int = 32
    num_attention_heads: int = 70
    attention_head_dim: int = 32
    num_layers: int = 20
    num_cross_attention_heads: int = 20
    cross_attention_head_dim: int = 112
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    attention_bias: bool = False
    sample_size: int = 32
    patch_size: int = 1
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    guidance_embeds: bool = False
    guidance_embeds_scale: float = 0.1
    qk_norm: str | None = None
    timestep_scale: float = 1.0

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def feature_blocks(self) -> int:
        return self.num_layers

    @property
    def last_time(self) -> float:
        return 1.0 if self.guidance_embeds else 1000.0

    @property
    def text_dim(self) -> int:
        return self.caption_channels

    @classmethod
    def from_dict(cls, cfg: dict) -> "Config":
        """Read a diffusers config.json. Raises: InputError naming the first unsupported key."""
        for key, value in FIXED.items():
            if cfg.get(key, value) != value:  # null too
                refuse(key, cfg[key], repr(value))
        others = {*FIXED, "cross_attention_dim"}  # the latter is the width
        given = read_options(cls, cfg, "an option of Sana", others=others)
        if cfg.get("out_channels", 32) is None:
            given["out_channels"] = given.get("in_channels", 32)
        config = cls(**given)
        if config.qk_norm not in (None, "rms_norm_across_heads"):
            refuse("qk_norm", config.qk_norm, "null or 'rms_norm_across_heads'")
        cross = cfg.get("cross_attention_dim", 2240)
        if cross != config.dim:
            raise InputError(
                f"cross_attention_dim: found {cross}; expected {config.dim}, the model's width"
            )
        if config.interpolation_scale is not None and config.dim % 4:
            raise InputError(
                f"interpolation_scale: found {config.interpolation_scale} at a width of "
                f"{config.dim}; expected a width that is a multiple of 4"
            )
        return config


def build(config: Config, *, dtype=jnp.float32, remat: bool = True) -> Callable:
    """Constructor of the network, called with Keys.

    Args:
      config: the network's options.
      dtype: of the computation; parameters are initialised in float32.
      remat: rematerialisation of every block, see `checkpointed`.
    """
    return lambda rngs: Sana(config, dtype=dtype, remat=remat, rngs=rngs)


class TimeEmbedding(nnx.Module):
    """Embedding of the timestep and, in Sprint, of the guidance scale, and its six projections.

    The scales of diffusers' pipelines are applied here: t by timestep_scale (SanaPipeline), the
    guidance scale by guidance_embeds_scale, and then t is not scaled (SanaSprintPipeline).
    """

    def __init__(self, c: Config, *, dtype, rngs: Keys):
        def mlp():
            return layers.Mlp(TIME_CHANNELS, c.dim, c.dim, jax.nn.silu, dtype=dtype, rngs=rngs)

        self.guided = c.guidance_embeds
        if self.guided:
            self.timestep_embedder, self.guidance_embedder = mlp(), mlp()
        else:
            self.emb = nnx.Dict(timestep_embedder=mlp())  # one level deeper in the files too
        self.linear = layers.Linear(c.dim, 6 * c.dim, dtype=dtype, rngs=rngs)
        self.scale = c.guidance_embeds_scale if self.guided else c.timestep_scale

    def __call__(self, t_B, guidance_B) -> tuple[jax.Array, jax.Array]:
        """Modulation [B, 6, D], and the embedding [B, D] from which it is projected.

        Raises: InputError for a missing or unexpected guidance scale, or one of another shape.
        """
        shape = None if guidance_B is None else jnp.shape(guidance_B)
        expected_shape = t_B.shape if self.guided else None
        if shape != expected_shape:
            given, expected = (
                "nothing" if s is None else f"an array {s}" for s in (shape, expected_shape)
            )
            raise InputError(f"guidance: found {given}; expected {expected}")
        if self.guided:
            embedded_BD = self.timestep_embedder(layers.timestep_sinusoid(t_B, TIME_CHANNELS))
            embedded_BD += self.guidance_embedder(
                layers.timestep_sinusoid(guidance_B * self.scale, TIME_CHANNELS)
            )
        else:
            embedded_BD = self.emb["timestep_embedder"](
                layers.timestep_sinusoid(t_B * self.scale, TIME_CHANNELS)
            )
        modulation_BE = self.linear(jax.nn.silu(embedded_BD))
        return modulation_BE.reshape(t_B.shape[0], 6, -1), embedded_BD


class Block(nnx.Module):
    """Modulated linear self-attention, plain cross-attention, modulated convolutions."""

    def __init__(self, c: Config, *, dtype, rngs: Keys):
        options = {"qk_norm": c.qk_norm is not None, "dtype": dtype, "rngs": rngs}
        heads, cross = c.num_attention_heads, c.num_cross_attention_heads
        self.attn1 = Attention(
            c.dim, heads, c.attention_head_dim, bias=c.attention_bias, linear=True, **options
        )
        self.attn2 = Attention(
            c.dim, cross, c.cross_attention_head_dim, bias=True, linear=False, **options
        )
        self.ff = GLUMBConv(c.dim, int(c.mlp_ratio * c.dim), dtype=dtype, rngs=rngs)
        self.scale_shift_table = layers.modulation_table(rngs, 6, c.dim)
        self.eps = c.norm_eps

    def __call__(self, x_BND, grid, modulation_B6D, text, bias) -> jax.Array:
        """Tokens [B, N, D] after the block.

        Args:
          x_BND: tokens of the image.
          grid: (H, W) in patches, whose product is N.
          modulation_B6D: shift, scale and gate of the self-attention and of the convolutions.
          text: projected prompt embeddings [B, L, D], or their KV cache.
          bias: of the cross-attention's logits.
        """
        table = self.scale_shift_table[...].astype(x_BND.dtype) + modulation_B6D
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(table, 6, axis=1)
        normed = layers.layer_norm(x_BND, self.eps) * (1 + scale1) + shift1
        x_BND = x_BND + gate1 * self.attn1(normed)
        # No norm and no gate here: the weights were trained so.
        x_BND = x_BND + self.attn2(x_BND, text, bias)
        normed = layers.layer_norm(x_BND, self.eps) * (1 + scale2) + shift2
        out_BHWD = self.ff(normed.reshape(len(normed), *grid, -1))
        return x_BND + gate2 * out_BHWD.reshape(x_BND.shape)


class Sana(nnx.Module):
    """Sana denoiser; see `__call__`."""

    def __init__(self, config: Config, *, dtype, remat: bool, rngs: Keys):
        c, dim = config, config.dim
        self.patch_embed = layers.PatchProjection(
            c.in_channels, dim, c.patch_size, dtype=dtype, rngs=rngs
        )
        self.time_embed = TimeEmbedding(c, dtype=dtype, rngs=rngs)
        self.caption_projection = layers.Mlp(
            c.caption_channels, dim, dim, layers.gelu_tanh, dtype=dtype, rngs=rngs
        )
        self.caption_norm = RMSNorm(dim)
        self.blocks = stack(lambda r: Block(c, dtype=dtype, rngs=r), c.num_layers, rngs)
        self.scale_shift_table = layers.modulation_table(rngs, 2, dim)
        self.proj_out = layers.Linear(dim, c.patch_size**2 * c.out_channels, dtype=dtype, rngs=rngs)
        self.config, self.remat = c, remat

    def __call__(
        self,
        x_BHWC: jax.Array,
        t_B: jax.Array,
        text: jax.Array | TextKV,
        mask_BL: jax.Array,
        guidance_B: jax.Array | None = None,
    ) -> jax.Array:
        """Raw output for noisy latents.

        Args:
          x_BHWC: latents; H and W multiples of the patch size, otherwise free.
          t_B: timesteps of the scheduler, in [0, 1000); for Sprint in [0, 1].
          text: prompt embeddings [B, L, D], or their KV cache from `text_kv`.
          mask_BL: attention mask: 1 for the tokens of the prompt, 0 for padding.
          guidance_B: guidance scale to embed, as users give it (such as 4.5); Sprint only.

        Returns: [B, H, W, out_channels] in the compute dtype.
        Raises: InputError for a size the patch does not divide, for Sprint without guidance, and
          for any other with it.
        """
        counts = (self.config.num_layers,)
        (x_BND,), embedded_BD = self._trunk(counts, x_BHWC, t_B, text, mask_BL, guidance_B)
        table = self.scale_shift_table[...].astype(x_BND.dtype) + embedded_BD[:, None]
        shift, scale = jnp.split(table, 2, axis=1)
        x_BND = self.proj_out(layers.layer_norm(x_BND, OUT_EPS) * (1 + scale) + shift)
        return layers.unpatchify(x_BND, *x_BHWC.shape[1:3], self.config.patch_size)

    def features(self, x_BHWC, t_B, text, mask_BL, guidance_B=None, *, blocks=()):
        """Tokens [B, N, D] after the first half of the blocks; arguments as `__call__`.

        blocks: rising block numbers from 0: a tuple of the tokens after each, in one pass.
        """
        counts = [block + 1 for block in blocks] or [(self.config.num_layers + 1) // 2]
        tokens, _ = self._trunk(counts, x_BHWC, t_B, text, mask_BL, guidance_B)
        return tuple(tokens) if blocks else tokens[0]

    def text_kv(self, text_BLD: jax.Array) -> TextKV:
        """KV cache of a prompt for the cross-attention of all layers."""
        return layers.text_kv(self.blocks, self.caption_norm(self.caption_projection(text_BLD)))

    def _trunk(self, counts, x_BHWC, t_B, text, mask_BL, guidance_B):
        """Tokens after each of `counts` blocks, and the embedding that modulates them."""
        modulation_B6D, embedded_BD = self.time_embed(t_B, guidance_B)
        bias, grid = layers.mask_bias(mask_BL), self._grid(x_BHWC)
        text = (
            text if isinstance(text, TextKV) else self.caption_norm(self.caption_projection(text))
        )

        def call(block, x, text):
            return block(x, grid, modulation_B6D, text, bias)

        x_BND = self._tokens(x_BHWC)
        return scan_through(self.blocks, x_BND, counts, call, self.remat, text), embedded_BD

    def _grid(self, x_BHWC) -> tuple[int, int]:
        """Height and width in patches."""
        return tuple(n // self.config.patch_size for n in x_BHWC.shape[1:3])

    def _tokens(self, x_BHWC) -> jax.Array:
        """Patch tokens; only the models beyond 1024 pixels add position embeddings."""
        c, tokens_BND = self.config, self.patch_embed(x_BHWC)
        if c.interpolation_scale is None:
            return tokens_BND
        # The sum is in float32 and then rounded once.
        wide = jnp.promote_types(tokens_BND.dtype, jnp.float32)
        base = c.sample_size // c.patch_size
        scale = c.interpolation_scale
        table = layers.sincos_positions(*self._grid(x_BHWC), c.dim, base, scale, wide)
        return (tokens_BND + table).astype(tokens_BND.dtype)
