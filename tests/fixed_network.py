"""A network that NumPy, JAX and so diffusers' schedulers evaluate alike."""

import numpy as np

SHAPE = (2, 4, 3, 4)
NOISE = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
MIX = (np.random.default_rng(1).normal(size=(4, 4)) / 2).astype(np.float32)
TOLERANCE = 5e-6


def network(xp, x, t):
    """A fixed network: tanh of a linear map of x, shifted with t. The same in NumPy and JAX."""
    return xp.tanh(x @ MIX + xp.sin(t / 200))


def assert_close(actual, expected):
    assert np.abs(np.asarray(actual) - expected).max() <= TOLERANCE * np.abs(expected).max()
