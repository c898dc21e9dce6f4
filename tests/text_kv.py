"""That a text's keys and values, made ahead, say what the text says."""

import jax
import numpy as np


def assert_read_ahead(net, params, args, *expected):
    """net: Functional. args: of its methods, the text third. expected: what "__call__" and
    "features" say of the text itself."""

    @jax.jit
    def told(params, x, t, text, *more):
        text = net.apply(params, text, method="text_kv")
        return [net.apply(params, x, t, text, *more, method=m) for m in ("__call__", "features")]

    for found, wanted in zip(told(params, *args), expected, strict=True):
        assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()
