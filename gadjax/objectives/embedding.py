"""Embedding loss: the MMD of student and data in the features of random networks."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gadjax.errors import InputError, check_choice
from gadjax.objectives.base import Context, Needs, TeacherMap
from gadjax.objectives.common import sg
from gadjax.objectives.compose import Addable
from gadjax.types import Params

LAYERS = 3


@dataclass(frozen=True)
class Embedding(Addable):
    """MMD^2 = E k(x, x') - 2 E k(x, y) + E k(y, y'), k(x, y) = E_p phi_p(x) . phi_p(y) / dim.

    x is the student's x0 at its drawn step, y a picture, and phi_p a network with random parameters
    p (arXiv 2604.22379): `networks` of them, drawn anew for every update and shared by its samples.
    Each has 3 convolutions of 3 x 3 and stride 2 with `width` channels, biases and ReLU. Pairs
    of one sample with itself are left out, so that the expectation is 0 where the distributions
    agree; the loss may be negative. It is a term beside another, and knows no captions.
    source: "data", clean latents of pictures; "teacher", the end of the teacher's map from the
      batch's noise in `steps` steps.
    y and phi are stop-gradiented.
    Not here: the paper's architectures and kernel were not at hand; k is linear in the features.
    Cost beside the student: none with "data"; 2 * steps teacher evaluations with "teacher".
    """

    source: str = "data"
    networks: int = 4
    width: int = 32
    steps: int = 8

    def __post_init__(self):
        check_choice("objective.embedding.source", self.source, ("data", "teacher"))
        for name in ("networks", "width", "steps"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"objective.embedding.{name}: found {getattr(self, name)}; expected 1 or more"
                )

    @property
    def map(self) -> TeacherMap:
        """Teacher map from z to its clean end."""
        return TeacherMap("whole", self.steps)

    @property
    def needs(self) -> Needs:
        if self.source == "data":
            return Needs(student=True, images=True, joint=True)
        return Needs(student=True, maps=(self.map,), joint=True)

    def __call__(self, context: Context):
        x0 = context.student[0].x0
        y0 = context.batch.x0 if self.source == "data" else context.maps[self.map][0]
        keys = jax.random.split(context.batch_key("networks"), self.networks)
        params = [random_network(key, x0.shape[-1], self.width, x0.dtype) for key in keys]

        def features(x):
            return jnp.concatenate([embed(p, x) for p in params], axis=1) / len(params) ** 0.5

        loss_B = unbiased_mmd(features(x0), features(sg(y0)), context.base_weight_B)
        return loss_B, {}


def random_network(key, channels: int, width: int, dtype) -> list[Params]:
    """Random parameters of the convolutions, of He's variance, and biases."""
    layers = []
    for layer_key in jax.random.split(key, LAYERS):
        kernel_key, bias_key = jax.random.split(layer_key)
        shape = (3, 3, channels, width)
        kernel = jax.random.normal(kernel_key, shape, dtype) * (2 / (9 * channels)) ** 0.5
        layers.append({"kernel": kernel, "bias": jax.random.normal(bias_key, (width,), dtype)})
        channels = width
    return layers


def embed(params: list[Params], x_BHWC):
    """Features [B, N] of one network, divided by the root of their number."""
    for layer in params:
        x_BHWC = jax.lax.conv_general_dilated(
            x_BHWC, layer["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x_BHWC = jax.nn.relu(x_BHWC + layer["bias"])
    features = x_BHWC.reshape(len(x_BHWC), -1)
    return features / features.shape[1] ** 0.5


def unbiased_mmd(x_BN, y_BN, weight_B):
    """MMD^2 per sample [B], whose mean (weighed by weight_B) has no pair of a sample with itself.

    Args:
      x_BN, y_BN: features of both distributions.
      weight_B: weights of the x, of mean 1; an x of weight 0 is in no pair.
    """
    others = 1 - jnp.eye(len(weight_B), dtype=x_BN.dtype)
    weights_BB = weight_B * others
    weights_BB = weights_BB / jnp.sum(weights_BB, axis=1, keepdims=True)
    same_B = jnp.sum(weights_BB * (x_BN @ x_BN.T), axis=1)
    data_B = jnp.sum(others * (y_BN @ y_BN.T), axis=1) / (len(weight_B) - 1)
    return same_B - 2 * jnp.mean(x_BN @ y_BN.T, axis=1) + data_B
