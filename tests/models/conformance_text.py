"""Conformance suite of text encoders; see `conformance`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conformance import (
    MAX_BFLOAT16_ERROR,
    MAX_ERROR,
    SENSITIVE,
    NetworkCase,
    NetworkSuite,
    relative,
    torch_reference,
)

from gadjax.models.params import cast


class TextSize(NamedTuple):
    """A small text encoder, and prompts for it: tokens of each, and their length when padded."""

    config: dict[str, Any]
    lengths: tuple[int, ...]
    total: int


@dataclass(frozen=True, eq=False, kw_only=True)
class TextEncoderCase(NetworkCase):
    """A text encoder's family, and what its suite needs to know besides.

    Attributes:
      torch_outputs: (torch's network, token ids, mask if any) -> its outputs, in our order.
      arguments: (config, ids_BL, mask_BL, padded on the right) -> arguments of each call that is
        compared; the last has a mask with an effect.
      tiny: network that is initialised, and whose output in bfloat16 is compared.
    """

    sizes: Mapping[str, TextSize]
    torch_outputs: Callable[..., Sequence[np.ndarray]]
    arguments: Callable[..., Sequence[tuple]] = field(
        default=lambda cfg, ids, mask: [(ids * mask, mask)]
    )
    tiny: TextSize

    def inputs(self, size: TextSize) -> Sequence[tuple]:
        """Arguments of the calls that are compared: token ids, and a mask if any."""
        cfg, lengths, total = size
        shape = len(lengths), total
        ids = np.random.default_rng(1).integers(3, cfg["vocab_size"], shape).astype(np.int32)
        mask = (np.arange(total) < np.array(lengths)[:, None]).astype(np.int32)
        return self.arguments(cfg, ids, mask)


@torch.no_grad()
def last_hidden_state(model, ids, mask):
    """The one output of most of transformers' encoders, in a list."""
    return [model(torch.from_numpy(ids).long(), torch.from_numpy(mask)).last_hidden_state.numpy()]


class TextEncoderSuite(NetworkSuite):
    """Tests of a text encoder."""

    case: ClassVar[TextEncoderCase]

    def test_outputs_are_those_of_transformers(self, size):
        """At every position, those of padding too."""
        case, cfg, model = self.case, self.case.sizes[size].config, torch_reference(self.case, size)
        params, apply = case.params(model, cfg), jax.jit(case.network(cfg).apply)
        for ids, *mask in case.inputs(case.sizes[size]):
            outputs = jax.tree.leaves(apply(params, ids, *mask))
            assert all(out.dtype == jnp.float32 for out in outputs)
            expected = case.torch_outputs(model, ids, *mask)
            errors = [relative(*both) for both in zip(outputs, expected, strict=True)]
            print(size, "masked" if mask else "", *(f"{error:.1e}" for error in errors))
            assert max(errors) <= MAX_ERROR
        without_mask = jax.tree.leaves(apply(params, ids, np.ones_like(*mask)))
        assert relative(outputs[0], without_mask[0]) > SENSITIVE

    def test_bfloat16_is_close(self):
        case, cfg = self.case, self.case.tiny.config
        model, (arguments, *_) = case.random_torch_network(cfg), case.inputs(case.tiny)
        network = case.network(cfg, dtype=jnp.bfloat16, remat=False)
        params = cast(case.params(model, cfg), jnp.bfloat16)
        outputs = jax.tree.leaves(jax.jit(network.apply)(params, *arguments))
        for out, expected in zip(outputs, case.torch_outputs(model, *arguments), strict=True):
            assert out.dtype == jnp.bfloat16
            assert relative(out, expected) <= MAX_BFLOAT16_ERROR

    @pytest.mark.slow
    def test_fresh_parameters_are_usable(self):
        network = self.case.network(self.case.tiny.config, remat=False)
        params = jax.jit(network.init)(jax.random.key(0))
        for out in jax.tree.leaves(network.apply(params, *self.case.inputs(self.case.tiny)[0])):
            assert np.isfinite(out).all() and out.std() > 0
