"""Discriminator of pictures: convolutions with a head after each, whose losses are averaged."""

import jax
import jax.numpy as jnp

from gadjax.errors import InputError
from gadjax.objectives.adversarial import LOSSES
from gadjax.objectives.base import Context, sample_mean
from gadjax.objectives.common import check_count, sg
from gadjax.types import Params

LAYERS = 4
SLOPE = 0.2  # of leaky ReLU below 0


class PixelDiscriminatorTerm:
    """Base of a term whose discriminator looks at `Context.pixels` of the student's x0.

    D has 4 convolutions of 3 x 3 and stride 2, with `width`, 2, 4 and 8 times as many channels and
    leaky ReLU; D_k is the mean over places of a linear map of the channels after convolution k. The
    data's pictures are decoded from their latents too, so that the two halves differ by the
    latents alone.
    """

    width: int
    r1: float

    def fake_logits(self, context: Context):
        """Logits [K, B] of the student's pictures, with gradient to its x0."""
        return logits(context.discriminator_params, context.pixels(context.student[0].x0))

    def discriminator_loss(self, context: Context):
        """Loss per sample [B]: softplus(D_k(x)) + softplus(-D_k(y)), and the penalty `r1`."""
        params = context.discriminator_params
        fake, real = (sg(context.pixels(x)) for x in (context.student[0].x0, context.batch.x0))
        losses_KB = LOSSES["softplus"][1](logits(params, fake), logits(params, real))
        loss_B = jnp.mean(losses_KB, axis=0)
        return loss_B + 0.5 * self.r1 * gradient_penalty(params, real) if self.r1 else loss_B

    def init_discriminator(self, key, width: int) -> Params:
        """Initial parameters of D; its logits start at zero. width: channels of the pictures."""
        return init_layers(key, width, self.width)


def check_pixel_options(name: str, term) -> None:
    """Check a term's options `width` and `r1`. Raises: InputError."""
    check_count(name, "width", term.width, 1)
    if not 0 <= term.r1 < float("inf"):
        raise InputError(f"objective.{name}.r1: found {term.r1}; expected 0 or more")


def init_layers(key, channels: int, width: int) -> Params:
    """Kernels of He's variance, biases and heads of zeros."""
    params = {}
    for k, layer_key in enumerate(jax.random.split(key, LAYERS)):
        out = width * 2**k
        kernel = jax.random.normal(layer_key, (3, 3, channels, out)) * (2 / (9 * channels)) ** 0.5
        params[f"conv_{k}"] = {"kernel": kernel, "bias": jnp.zeros(out)}
        params[f"head_{k}"] = {"kernel": jnp.zeros((out, 1)), "bias": jnp.zeros(1)}
        channels = out
    return params


def logits(params: Params, image_BHWC):
    """Logits [K, B] of pictures, one for each convolution."""
    x, values = image_BHWC, []
    for k in range(LAYERS):
        conv, head = params[f"conv_{k}"], params[f"head_{k}"]
        x = jax.lax.conv_general_dilated(
            x, conv["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.leaky_relu(x + conv["bias"], SLOPE)
        values.append(jnp.mean(x @ head["kernel"] + head["bias"], axis=(1, 2, 3)))
    return jnp.stack(values)


def gradient_penalty(params: Params, image_BHWC):
    """Squared norm [B] of the gradient of the sum of the logits in the pictures (R1)."""
    slope = jax.grad(lambda image: jnp.sum(logits(params, image)))(image_BHWC)
    return slope[0].size * sample_mean(slope**2)
