"""Rotations of heads against diffusers' functions, and their defining property."""

import jax.numpy as jnp
import numpy as np
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

from gadjax.models.rotary import axis_rotation, grid_rotation, rotate_pairs

AXES, THETA = (4, 6, 8), 10_000


def heads(*shape):
    return np.random.default_rng(0).standard_normal((*shape, sum(AXES)), np.float32)


def rotation(rows, columns):
    parts = zip((range(1), rows, columns), AXES, strict=True)
    return grid_rotation(*(axis_rotation(p, dim, THETA) for p, dim in parts))


def test_a_grid_s_rotation_is_that_of_diffusers():
    x, rows, columns = heads(2, 15, 3), range(3), range(60, 65)
    ids = torch.tensor([(0, r, c) for r in rows for c in columns])
    table = FluxPosEmbed(THETA, AXES)(ids)
    expected = apply_rotary_emb(torch.tensor(x), table, sequence_dim=1).numpy()
    np.testing.assert_allclose(rotate_pairs(x, rotation(rows, columns)), expected, atol=2e-7)


def test_products_depend_on_differences_of_positions_alone():
    q, k = heads(1, 6, 1), heads(1, 6, 1)[:, ::-1]
    here, there = ((range(2), range(3)), (range(-7, -5), range(40, 43)))
    products = [
        jnp.einsum("bnhk,bmhk->nm", *(rotate_pairs(x, rotation(*at)) for x in (q, k)))
        for at in (here, there)
    ]
    np.testing.assert_allclose(*products, rtol=0, atol=2e-5)
    assert np.abs(products[0] - jnp.einsum("bnhk,bmhk->nm", q, k)).max() > 0.1


def test_each_sample_may_have_positions_of_its_own():
    x = jnp.asarray(heads(2, 6, 1))
    one, two = rotation(range(2), range(3)), rotation(range(5, 7), range(3))
    both = rotate_pairs(x, jnp.stack([one, two], axis=1))
    expected = jnp.concatenate([rotate_pairs(x[:1], one), rotate_pairs(x[1:], two)])
    np.testing.assert_array_equal(both, expected)
    assert rotate_pairs(x.astype(jnp.bfloat16), one).dtype == jnp.bfloat16
