import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax.diffusion.denoiser import Denoiser
from gadjax.diffusion.parameterization import PARAMETERIZATIONS, from_prediction, to_prediction
from gadjax.diffusion.schedules import DDPM, Flow, add_noise
from gadjax.types import Cond, Prediction

B, SHAPE = 3, (3, 4, 5, 2)
ABOUT = dict(rtol=2e-5, atol=2e-5)


def apply(params, x, t, cond):
    """Network that depends on all its inputs, t and cond per sample."""
    assert t.shape == x.shape[:1]
    conditional = jnp.einsum("bld,bl->bd", cond.text, cond.mask) @ params["text"]
    shift = conditional + jnp.outer(t / 1000, params["time"])
    return jnp.tanh(x @ params["mix"] + shift[:, None, None])


def drawn(seed, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {"mix": drawn(1, (2, 2)), "text": drawn(2, (6, 2)), "time": drawn(3, (2,))}
COND = Cond(drawn(4, (B, 7, 6)), jnp.ones((B, 7)).at[0, 4:].set(0))
NULL = Cond(drawn(5, (B, 7, 6)), jnp.ones((B, 7)).at[:, 2:].set(0))
X, T = drawn(6), jnp.array([20.0, 431.0, 880.0])


@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
@pytest.mark.parametrize("schedule", [DDPM(), Flow()], ids=["ddpm", "flow"])
def test_call_converts_the_raw_output(kind, schedule):
    actual = Denoiser(apply, schedule, kind)(PARAMS, X, T, COND)
    raw = apply(PARAMS, X, T, COND)
    expected = to_prediction(kind, raw, X, *schedule.alpha_sigma(T))
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_scalar_time():
    denoiser = Denoiser(apply, DDPM(), "eps")
    for one in (431, 431.0, jnp.asarray(431.0), np.float64(431)):
        for a, b in zip(
            denoiser(PARAMS, X, one, COND),
            denoiser(PARAMS, X, jnp.full(B, 431.0), COND),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_output_dtype_is_that_of_the_latents():
    denoiser = Denoiser(lambda *a: apply(*a).astype(jnp.bfloat16), DDPM(), "eps")
    pair = denoiser(PARAMS, X, T, COND)
    assert pair.x0.dtype == pair.eps.dtype == jnp.float32
    # x_t itself is not rounded to bfloat16 on the way to x0.
    alpha, sigma = (v[:, None, None, None] for v in DDPM().alpha_sigma(T))
    np.testing.assert_allclose(alpha * pair.x0 + sigma * pair.eps, X, atol=1e-5)
    with jax.enable_x64(True):
        assert denoiser(PARAMS, X.astype(jnp.float64), T, COND).x0.dtype == jnp.float64


@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.5, np.array([0.5, 1.0, 7.0], np.float32)])
def test_guidance(kind, scale):
    denoiser = Denoiser(apply, DDPM(), kind)
    actual = denoiser.guided(PARAMS, X, T, COND, NULL, scale)
    conditional, unconditional = denoiser(PARAMS, X, T, COND), denoiser(PARAMS, X, T, NULL)
    w = scale[:, None, None, None] if isinstance(scale, np.ndarray) else scale
    for a, c, u in zip(actual, conditional, unconditional, strict=True):
        np.testing.assert_allclose(a, u + w * (c - u), rtol=1e-4, atol=1e-4)


def test_guidance_with_scalar_time_and_traced_scale():
    denoiser = Denoiser(apply, DDPM(), "eps")
    by_time = denoiser.guided(PARAMS, X, 431.0, COND, NULL, 3.0)
    jitted = jax.jit(lambda w: denoiser.guided(PARAMS, X, jnp.full(B, 431.0), COND, NULL, w))
    for a, b in zip(by_time, jitted(jnp.full(B, 3.0)), strict=True):
        np.testing.assert_allclose(a, b, **ABOUT)


def test_guidance_scale_0_or_1_evaluates_one_half():
    sizes = []

    def counted(params, x, t, cond):
        sizes.append(len(x))
        return apply(params, x, t, cond)

    denoiser = Denoiser(counted, DDPM(), "eps")
    short = denoiser.guided(PARAMS, X, T, COND, NULL, 1)
    long = denoiser.guided(PARAMS, X, T, COND, NULL, jnp.ones(B))
    assert sizes == [B, 2 * B]
    for a, b in zip(short, long, strict=True):
        np.testing.assert_allclose(a, b, **ABOUT)


@pytest.mark.parametrize("guidance_embedded", [False, True])
@pytest.mark.parametrize("scale", [0, 1, 3.0, jnp.array([0.0, 1.0, 3.0])], ids=str)
def test_guided_fn_caches_the_text(scale, guidance_embedded):
    read = []

    def text_kv(params, text):
        read.append(len(text))
        return {"read": text}

    def reads(params, x, t, cond):
        text = cond.text["read"] if isinstance(cond.text, dict) else cond.text
        x = x * cond.extras["guidance"][:, None, None, None] if guidance_embedded else x
        return apply(params, x, t, cond._replace(text=text))

    denoiser = Denoiser(reads, DDPM(), "eps", guidance_embedded=guidance_embedded, text_kv=text_kv)
    guided_fn = denoiser.guided_fn(PARAMS, COND, NULL, scale)
    for t in (T, 431.0):
        actual, expected = guided_fn(X, t), denoiser.guided(PARAMS, X, t, COND, NULL, scale)
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(a, b)
    alone = guidance_embedded or isinstance(scale, int)
    assert read == [B if alone else 2 * B]


def test_guidance_uses_extras_of_both_halves():
    def reads(params, x, t, cond):
        return x * cond.extras["size"][:, None, None, None]

    conditional, unconditional = (Cond(*COND[:2], {"size": jnp.full(B, v)}) for v in (2.0, 1.0))
    actual = Denoiser(reads, Flow(), "x0").guided({}, X, T, conditional, unconditional, 3.0)
    np.testing.assert_allclose(actual.x0, 4 * X, rtol=1e-6)


@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
@pytest.mark.parametrize("schedule", [DDPM(), Flow()], ids=["ddpm", "flow"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32])
def test_denoising_loss(kind, schedule, dtype):
    x0, eps, t = drawn(7), drawn(8), T.astype(dtype)
    alpha, sigma = schedule.alpha_sigma(t)
    target = from_prediction(kind, Prediction(x0, eps), alpha, sigma)
    perfect = Denoiser(lambda *_: target, schedule, kind)
    np.testing.assert_array_equal(
        perfect.denoising_loss({}, Prediction(x0, eps), t, COND), np.zeros(B)
    )
    actual = Denoiser(apply, schedule, kind).denoising_loss(PARAMS, Prediction(x0, eps), t, COND)
    raw = apply(PARAMS, add_noise(schedule, x0, eps, t), T, COND)
    np.testing.assert_allclose(actual, ((raw - target) ** 2).mean((1, 2, 3)), rtol=1e-5)


def test_guidance_scale_up_to_one_disables_guidance():
    """An embedded guidance is passed on whatever it is."""
    for guidance_embedded in (False, True):
        denoiser = Denoiser(None, None, "eps", guidance_embedded=guidance_embedded)
        actual = [denoiser.guidance_scale(number) for number in (-1, 0, 0.5, 1, 1.5)]
        assert actual == ([-1, 0, 0.5, 1, 1.5] if guidance_embedded else [1, 1, 1, 1, 1.5])


def test_a_default_scale_is_embedded_where_none_is_named():
    """In plain evaluations and features; a guided evaluation names its own."""

    def reads(params, x, t, cond, **options):
        return x * cond.extras["guidance"][:, None, None, None] + options.get("added", 0)

    plain = Denoiser(reads, DDPM(), "eps", reads, guidance_embedded=True)
    denoiser = plain.with_default_guidance(2.0).with_default_guidance(3.5)
    x, cond = np.ones((2, 1, 1, 3), np.float32), Cond(None, None)
    assert np.all(denoiser.raw({}, x, 1.0, cond) == 3.5)
    assert np.all(denoiser.features({}, x, np.ones(2), cond, added=1) == 4.5)
    named = Cond(None, None, {"guidance": np.full(2, 7.0)})
    assert np.all(denoiser.features({}, x, np.ones(2), named) == 7)
    assert np.all(denoiser.guided_raw({}, x, 1.0, cond, cond, 5.0) == 5)
    assert np.all(denoiser.guided_raw({}, x, 1.0, cond, cond, None) == 3.5)
    target = Prediction(x, x)
    told = cond._replace(extras={"guidance": np.full(2, 3.5, np.float32)})
    loss = denoiser.denoising_loss({}, target, 500.0, cond)
    alone = Denoiser(reads, DDPM(), "eps").denoising_loss({}, target, 500.0, told)
    np.testing.assert_allclose(loss, alone, rtol=1e-6)
    without = Denoiser(reads, DDPM(), "eps")
    assert without.with_default_guidance(3.5) is without
