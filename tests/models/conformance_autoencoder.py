"""Conformance suite of autoencoders; see `conformance`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conformance import (
    MAX_BFLOAT16_ERROR,
    MAX_ERROR,
    NetworkCase,
    NetworkSuite,
    Size,
    relative,
    torch_reference,
)

from gadjax.models.params import cast


def nchw(x):
    """torch's tensor of images [B, H, W, C]."""
    return torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy())


def nhwc(x):
    """Images [B, H, W, C] from torch's tensor."""
    return x.detach().numpy().transpose(0, 2, 3, 1)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@dataclass(frozen=True, eq=False, kw_only=True)
class AutoencoderCase(NetworkCase):
    """An autoencoder's family, and what its suite needs to know besides.

    Attributes:
      torch_encode: (torch's network, images) -> mean and log-variance, None without one.
      tiny: network that is differentiated, initialised, and compared in bfloat16.
      remat_blocks: blocks of `tiny` that its decoder's rematerialisation recomputes.
      step: of central differences; a short one for networks with kinks.
      tolerance: of the derivatives.
    """

    sizes: Mapping[str, Size]
    torch_encode: Callable[[torch.nn.Module, torch.Tensor], tuple]
    tiny: Size
    remat_blocks: int
    step: float
    tolerance: float

    def shapes(self, size: Size, batch: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a method's input: images of "encode", latents of "decode"."""
        cfg, height, width = size
        config = self.config(cfg)
        image = batch, config.upscale * height, config.upscale * width, config.in_channels
        return {"encode": image, "decode": (batch, height, width, config.latent_channels)}

    @torch.no_grad()
    def torch_outputs(self, model, image, latent) -> list[np.ndarray]:
        """Mean, log-variance if any, and decoded latent of torch's network."""
        encoded = self.torch_encode(model, nchw(image))
        outputs = *encoded, model.decode(nchw(latent)).sample
        return [nhwc(x) for x in outputs if x is not None]


class AutoencoderSuite(NetworkSuite):
    """Tests of an autoencoder."""

    case: ClassVar[AutoencoderCase]

    def test_encode_and_decode_are_those_of_diffusers(self, size):
        case, cfg, model = self.case, self.case.sizes[size].config, torch_reference(self.case, size)
        apply, shapes = case.network(cfg).apply, case.shapes(case.sizes[size], 2)
        image, latent = normal(1, *shapes["encode"]), normal(2, *shapes["decode"])

        @jax.jit
        def run(params, image, latent):
            encoded = apply(params, image, method="encode")
            return encoded, apply(params, latent, method="decode")

        outputs = (mean, _), decoded = run(case.params(model, cfg), image, latent)
        assert mean.shape == latent.shape and decoded.shape == image.shape
        outputs, expected = jax.tree.leaves(outputs), case.torch_outputs(model, image, latent)
        errors = [relative(*both) for both in zip(outputs, expected, strict=True)]
        print(size, *(f"{error:.2e}" for error in errors))
        assert max(errors) <= MAX_ERROR

    @pytest.mark.parametrize("method", ["encode", "decode"])
    def test_derivatives_are_those_of_central_differences(self, method):
        """The tangent, and the gradient of its square, in the input and all parameters."""
        case, cfg = self.case, self.case.tiny.config
        x, u, v = (
            normal(seed, *case.shapes(case.tiny, 1)[method]).astype(np.float64) for seed in range(3)
        )
        # All arithmetic outside `run` is numpy's: jax would compile it shape by shape.
        params = case.params(case.random_torch_network(cfg), cfg, np.float64)
        along = jax.tree.map(lambda p: 0.1 * np.cos(p), params)
        with jax.enable_x64(True):
            apply = case.network(cfg, dtype=jnp.float64, remat=True).apply

            def energy(params, x):
                def network(x):
                    return jnp.concatenate(jax.tree.leaves(apply(params, x, method=method)), -1)

                value, tangent = jax.jvp(network, (x,), (v,))
                return jnp.sum(tangent**2), (value, tangent)

            run = jax.jit(jax.value_and_grad(energy, (0, 1), has_aux=True))
            (_, (_, tangent)), (slopes, slope_x) = jax.device_get(run(params, x))

            def difference(along_params, along_x):
                def at(h):
                    point = jax.tree.map(lambda p, d: p + h * d, params, along_params)
                    return jax.device_get(run(point, x + h * along_x)[0])

                ahead, behind = at(case.step), at(-case.step)
                return jax.tree.map(lambda a, b: (a - b) / (2 * case.step), ahead, behind)

            fixed = jax.tree.map(np.zeros_like, params)
            slope = sum(jax.tree.leaves(jax.tree.map(np.vdot, slopes, along)))
            errors = (
                relative(tangent, difference(fixed, v)[1][0]),
                relative(slope + np.vdot(slope_x, u), difference(along, u)[0]),
            )
        print(f"{method}: jvp {errors[0]:.2e}, gradient of jvp {errors[1]:.2e}")
        assert max(errors) <= case.tolerance

    @pytest.mark.parametrize("remat", [True, False])
    def test_remat_recomputes_every_block(self, remat):
        case, network = self.case, self.case.network(self.case.tiny.config, remat=remat)
        latent = jax.ShapeDtypeStruct(case.shapes(case.tiny, 1)["decode"], jnp.float32)
        decode = partial(network.apply, method="decode")
        equations = jax.make_jaxpr(decode)(network.abstract, latent).eqns
        count = sum(equation.primitive.name.startswith("remat") for equation in equations)
        assert count == remat * case.remat_blocks

    def test_bfloat16_is_close(self):
        case, cfg = self.case, self.case.tiny.config
        model, shapes = case.random_torch_network(cfg), case.shapes(case.tiny, 1)
        image, latent = normal(1, *shapes["encode"]), normal(1, *shapes["decode"])
        apply = case.network(cfg, dtype=jnp.bfloat16).apply
        params = cast(case.params(model, cfg), jnp.bfloat16)

        @jax.jit
        def run(params, image, latent):
            mean, _ = apply(params, image, method="encode")
            return mean, apply(params, latent, method="decode")

        mean, *_, decoded = case.torch_outputs(model, image, latent)
        for out, expected in zip(run(params, image, latent), (mean, decoded), strict=True):
            assert out.dtype == jnp.bfloat16
            assert relative(out, expected) <= MAX_BFLOAT16_ERROR

    @pytest.mark.slow
    def test_fresh_parameters_are_usable(self):
        case, network = self.case, self.case.network(self.case.tiny.config)

        @jax.jit
        def run(key, image):
            params = network.init(key)
            mean, _ = network.apply(params, image, method="encode")
            return mean, network.apply(params, mean, method="decode")

        image = normal(1, *case.shapes(case.tiny, 1)["encode"])
        for out in run(jax.random.key(0, impl="rbg"), image):
            assert np.isfinite(out).all() and np.abs(out).max() > 0
