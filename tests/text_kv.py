"""Check of a network's KV cache of the prompt against its prompt embeddings."""

import jax
import numpy as np


def assert_text_kv_matches(net, params, args, *expected):
    """Outputs from the KV cache equal those from the prompt embeddings.

    Args:
      net: a Functional with "text_kv".
      params: its parameters.
      args: of its methods, the prompt embeddings third.
      expected: outputs of "__call__" and "features" for the embeddings themselves.
    """

    @jax.jit
    def from_cache(params, x, t, text, *rest):
        text = net.apply(params, text, method="text_kv")
        return [net.apply(params, x, t, text, *rest, method=m) for m in ("__call__", "features")]

    for out, reference in zip(from_cache(params, *args), expected, strict=True):
        assert np.abs(out - reference).max() <= 1e-6 * np.abs(reference).max()
