"""Families of networks: everything that the rest of gadjax asks of a port, as typed records.

The module of a family ends in `FAMILY`, one of the records here; `registry.COMPONENTS` finds it.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from gadjax.models.keymap import KeyMap, Original
from gadjax.models.module import Keys
from gadjax.models.text.prompts import PromptEncoder, TextComponents
from gadjax.types import Cond

Apply = Callable[..., Any]  # of a Functional


@dataclass(frozen=True, eq=False, kw_only=True)
class Family:
    """Port of one or more classes of diffusers or transformers.

    Attributes:
      class_names: names of these classes, as in model_index.json and config.json.
      config: dataclass of the options that shape the network; `from_dict` reads a config.json and
        raises InputError naming an unsupported key.
      build: (config, *, dtype, remat) -> constructor of the nnx module, for `module.functional`.
      keymap: mapping to the keys of the weight files, or (config) -> mapping where it depends on
        the configuration which layers are stacked.
      rules: (regex of a parameter's path, its sharding); see `parallel.sharding.shardings`.
      frozen: regexes of the paths of parameters that the files have and training does not change.
    """

    class_names: tuple[str, ...]
    config: type
    build: Callable[..., Callable[[Keys], nnx.Module]]
    keymap: KeyMap | Callable[[Any], KeyMap]
    rules: tuple[tuple[str, PartitionSpec], ...]
    frozen: tuple[str, ...] = ()

    def keymap_of(self, config: Any) -> KeyMap:
        """Key map of a network with these options."""
        return self.keymap if isinstance(self.keymap, KeyMap) else self.keymap(config)


@dataclass(frozen=True, eq=False, kw_only=True)
class TextEncoder(Family):
    """Family of text encoders: token ids (and attention mask) -> hidden states."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Autoencoder(Family):
    """Family of autoencoders; the network has the methods "encode" and "decode".

    Attributes:
      scale: (raw latents, config) -> latents of the denoiser.
      unscale: the inverse of `scale`.
      torch_codec: network of diffusers -> the same with the port's latents, where it has others.
    """

    scale: Callable[[jax.Array, Any], jax.Array]
    unscale: Callable[[jax.Array, Any], jax.Array]
    torch_codec: Callable[[Any], Any] = lambda network: network


@dataclass(frozen=True, eq=False, kw_only=True)
class Backbone(Family):
    """Family of backbones. Its `config` is a `config.BackboneConfig`.

    Attributes:
      extras: (config, samples, height, width, pooled) -> `Cond.extras` for images of this size in
        pixels; None without any.
      predictor: (apply, config) -> (params, x_BHWC, t_B, cond) -> raw output [B, H, W, C].
      features: (apply) -> (params, x_BHWC, t_B, cond) -> features [B, N, D] of the middle of the
        network, for discriminators; with `Config.feature_blocks` as `Denoiser.features` with blocks
        too.
      prompts: (text components, config) -> prompt encoder of the family's pipeline.
      torch_inputs: (config, cond) -> arguments of the class in diffusers beside latents, timesteps
        and prompt embeddings, as torch's tensors.
      torch_call: (network, config, x_BHWC, t_B, cond) -> raw output [B, H, W, C] of the class in
        diffusers, where its pipeline calls it otherwise than with these: on packed latents, or at
        another unit of time.
      original: (names of modules in diffusers, config) -> modules of the original release by their
        names there, for adapters that others trained; None where files have diffusers' names.
      guided_norm: axis of the raw output along which classifier-free guidance keeps the norm of the
        conditional output; None: none.
      text_kv: name of the method that computes a prompt's KV cache; None where the prompt
        embeddings change from layer to layer.
      no_sequence_sharding: reason why a mesh must not split a sample's positions; empty where it
        may.
    """

    extras: Callable[..., dict[str, jax.Array] | None]
    predictor: Callable[[Apply, Any], Callable[..., jax.Array]]
    features: Callable[[Apply], Callable[..., jax.Array]]
    prompts: Callable[[TextComponents, Any], PromptEncoder]
    torch_inputs: Callable[[Any, Cond], Mapping[str, Any]] = lambda config, cond: {}
    torch_call: Callable[..., Any] | None = None
    original: Callable[[Collection[str], Any], Mapping[str, Original]] | None = None
    guided_norm: int | None = None
    text_kv: str | None = None
    no_sequence_sharding: str = ""

    def call_torch(self, network: Any, config: Any, x_BHWC: Any, t_B: Any, cond: Cond) -> Any:
        """Raw output [B, H, W, C] of the class in diffusers, called as its pipeline does.

        Args:
          network: of diffusers.
          config: the network's options.
          x_BHWC, t_B, cond: inputs of the predictor, as torch's tensors.
        """
        if self.torch_call is not None:
            return self.torch_call(network, config, x_BHWC, t_B, cond)
        out = network(
            x_BHWC.permute(0, 3, 1, 2),
            encoder_hidden_states=cond.text,
            timestep=t_B,
            **self.torch_inputs(config, cond),
        )
        return out.sample.permute(0, 2, 3, 1)
