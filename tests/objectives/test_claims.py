"""The numbers of docs/claims.md; `pytest -s tests/objectives/test_claims.py` prints them.

The teacher is the bundled one at the size it was trained for, and where a student is needed it is a
copy of it, as at the start of training. A finite difference is measured by the root mean square of
an element of the perturbation, since rounding acts on elements: the script's, 1e-2 in the norm of
64 x 64 x 4 latents, is 7.8e-5.
"""

from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import (
    FLOW_WORLD,
    D,
    flat,
    gaussian_params,
    law,
    make_batch,
    mixture_params,
    one_step,
)

from gadjax.assets import resolve
from gadjax.data.prompts import read_prompts
from gadjax.objectives import DMD, GAD, TDM, GADLift, dmd
from gadjax.objectives.base import sample_mean
from gadjax.objectives.common import pseudo_loss, sg
from gadjax.objectives.comparisons import gad_lift
from gadjax.pipelines.pipeline import load_pipeline
from gadjax.training.context import Roles, make_context
from gadjax.training.state import StepSpec
from gadjax.types import Batch, Cond

GRID = (899.0, 674.0, 449.0, 224.0)  # the script's
SCALE = 4.5  # its guidance
STEP = 1e-2 / (64 * 64 * 4) ** 0.5  # its perturbation of an element
HUBER = 1e-3
SAMPLES = 256
HALF = {"float16": jnp.float16, "bfloat16": jnp.bfloat16}


def cosines(a, b):
    """Cosines per sample; 0 if rounding has left nothing."""
    a, b = flat(a), flat(b)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.maximum(lengths, np.finfo(float).tiny)


def ratios(a, b):
    return np.linalg.norm(flat(a), axis=1) / np.linalg.norm(flat(b), axis=1)


def rounded(x, dtype):
    return x.astype(dtype).astype(jnp.float32)


@dataclass(frozen=True, eq=False)
class Bench:
    """The teacher in several precisions, and the points at which the script evaluates it.

    x, t: the student's latents on the grid, as in a rollout of 4 steps; x_tau, tau: the
    diffused ones; v: standard normal directions.
    """

    networks: dict
    params: object
    batch: Batch
    t: jax.Array
    x: jax.Array
    tau: jax.Array
    x_tau: jax.Array
    v: jax.Array

    def first(self, keep):
        """The samples that `keep` indexes."""
        arrays = (self.batch, self.t, self.x, self.tau, self.x_tau, self.v)
        return Bench(
            self.networks, self.params, *jax.tree.map(lambda leaf: leaf[np.asarray(keep)], arrays)
        )

    def wide(self):
        """Everything in float64; under jax.enable_x64."""

        def widen(leaf):
            return leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf

        arrays = (self.batch._replace(key=None), self.t, self.x, self.tau, self.x_tau, self.v)
        return Bench(self.networks, *jax.tree.map(widen, (self.params, *arrays)))

    def evaluate(self, name, x, t, v=None, scale=1):
        """x0 of the student (and the critic), or with scale the teacher's; or its tangent."""
        batch = self.batch
        given = self.params, x, t, v, batch.cond, batch.null
        return compiled(self.networks[name], scale)(*given)


@cache
def compiled(network, scale):
    def run(params, x, t, v, cond, null):
        def f(x):
            return network.guided(params, x, t, cond, null, scale).x0

        return f(x) if v is None else jax.jvp(f, (x,), (v,))[1]

    return jax.jit(run)


@pytest.fixture(scope="module")
def bench():
    folder = resolve("asset:shapes_teacher")
    pipeline, params = load_pipeline(folder)
    prompts = read_prompts(resolve("asset:shapes_test_prompts.txt"))
    encode = jax.jit(pipeline.encode_text)

    def encode_prompts(prompts):
        text = encode(params, *pipeline.tokens(prompts, 16))
        return Cond(text.text, text.mask)

    batch = Batch(
        cond=jax.tree.map(
            lambda leaf: leaf[np.arange(SAMPLES) % len(leaf)], encode_prompts(prompts)
        ),
        null=jax.tree.map(lambda leaf: jnp.repeat(leaf, SAMPLES, 0), encode_prompts([""])),
        noise=jax.random.normal(jax.random.key(1), (SAMPLES, *pipeline.latent)),
        key=jax.random.split(jax.random.key(0), SAMPLES),
        stratum=jnp.arange(SAMPLES, dtype=jnp.int32) + 2 * (jnp.arange(SAMPLES) // len(prompts)),
    )
    step_spec = StepSpec(pipeline.denoiser, TDM(), (*GRID, -1.0), SCALE, {}, 0.99)

    @jax.jit
    def asked(batch, student):
        context = make_context(step_spec, TDM().needs, Roles(student, student, student), batch)
        x_tau, tau_B, _ = TDM().renoised(context)
        return context.t_B, context.x_BHWC, tau_B, x_tau

    networks = {"float32": pipeline.denoiser}
    for name, dtype in (HALF | {"float64": jnp.float64}).items():
        with jax.enable_x64(name == "float64"):
            networks[name] = load_pipeline(folder, dtype=dtype)[0].denoiser
    student = jax.tree.map(jnp.asarray, params["transformer"])
    places = asked(batch, student)
    v = jax.random.normal(jax.random.key(2), batch.noise.shape)
    return Bench(networks, student, batch, *places, v)


@pytest.mark.slow
def test_a_the_scripts_student_difference_is_not_along_d(bench):
    """S(x_tau + d, tau) - S(x_k, t_k) against S(x_tau + d, tau) - S(x_tau, tau) and J_S d."""
    print("\n(a) t_k, |script's| / |same point's|, cosine of each with J_S d")
    for t in GRID[::-1]:
        with jax.enable_x64(True):
            b = bench.first(bench.t == t).wide()
            d = STEP * b.v
            there, here = (b.evaluate("float64", x, b.tau) for x in (b.x_tau + d, b.x_tau))
            script, same = there - b.evaluate("float64", b.x, b.t), there - here
            exact = b.evaluate("float64", b.x_tau, b.tau, d)
        ratio, cosine = np.median(ratios(script, same)), cosines(script, exact)
        error, right = cosine.std() / len(cosine) ** 0.5, cosines(same, exact)
        print(f"    {t:.0f}  {ratio:8.0f}  {cosine.mean():+.3f} +- {error:.3f}  {right.mean():.6f}")
        assert ratio > 1000 and right.min() > 0.9999
        assert abs(cosine.mean()) < 4 * error < 0.2


def test_b_the_perturbation_is_below_the_resolution_of_half_precision():
    """x' = round(x + d) for x ~ N(0, 1) in the script's size: 64 x 64 x 4, |d| = 1e-2."""
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(16, 64 * 64 * 4)).astype(np.float32)
    d = rng.normal(size=raw.shape).astype(np.float32)
    d *= 1e-2 / np.linalg.norm(d, axis=1, keepdims=True)
    print("\n(b) elements changed, norm of the change, cosine with d")
    actual = {}
    for name, dtype in (HALF | {"float32": jnp.float32}).items():
        x = raw.astype(dtype).astype(np.float32)
        change = (x + d).astype(dtype).astype(np.float32) - x
        share, cosine = (change != 0).mean(), cosines(change, d).mean()
        norm = np.linalg.norm(change, axis=1).mean()
        print(f"    {name:9} {share:7.2%}  {norm:.2e}  {cosine:.3f}")
        actual[name] = share, cosine
    assert actual["float16"][0] < 0.2 and actual["float16"][1] < 0.6
    assert actual["bfloat16"][0] < 0.03 and actual["bfloat16"][1] < 0.25
    assert actual["float32"][0] > 0.999 and actual["float32"][1] > 0.999


@pytest.mark.slow
def test_c_rounding_of_the_networks_output_against_exact_tangents(bench):
    """(S(round(x + h v)) - S(round(x))) / h of a network in half precision, x0 in float32."""
    b = bench.first(bench.t == 449)
    with jax.enable_x64(True):
        w = b.wide()
        exact = np.asarray(w.evaluate("float64", w.x, w.t, w.v))
    print("\n(c) at t = 449, J_S v as jax.jvp: cosine with float64's, relative error")
    tangents = {}
    for name in ("float32", *HALF):
        actual = b.evaluate(name, b.x, b.t, b.v)
        tangents[name] = cosines(actual, exact).mean()
        print(f"    {name:9} {tangents[name]:.6f}  {ratios(actual - exact, exact).mean():.1e}")
    print("    finite difference, h of the script's size (rms of an element): cosine, |fd| / |jvp|")
    cosine = {}
    for factor in (1, 10, 100, 1000, 10_000):
        h, line = factor * STEP, ""
        for name in ("float32", *HALF):
            dtype = HALF.get(name, jnp.float32)
            base = rounded(b.x, dtype)
            moved = rounded(base + h * b.v, dtype)
            actual = (b.evaluate(name, moved, b.t) - b.evaluate(name, base, b.t)) / h
            cosine[name, factor] = cosines(actual, exact).mean()
            line += f"  {name} {cosine[name, factor]:.3f} {ratios(actual, exact).mean():.2f}"
        print(f"    {1e-2 * factor:5g} ({h:.1e}){line}")
    assert all(value > 0.99 for value in tangents.values())
    assert cosine["float32", 1] > 0.99
    assert abs(cosine["float16", 1]) < 0.2 and abs(cosine["bfloat16", 1]) < 0.1
    assert cosine["float16", 1000] > 0.9


@pytest.mark.slow
def test_d_the_gradient_of_the_script(bench):
    """Effect of descent on its derivative term on m = S(x_k, t_k), against (J_T - J_F) d.

    F is the unguided teacher, as at the start of training. The other student value, S(x_tau + d),
    gets the opposite gradient.
    """
    print("\n(d) cosine of the move of m with delta, Huber saturated, |gradient| / |TDM's|")
    few, actual = bench.first(np.arange(0, SAMPLES, len(GRID))), {}
    for name in ("float64", "float32", *HALF):
        with jax.enable_x64(name == "float64"):
            b = few.wide() if name == "float64" else few
            if name == "float64":
                teacher, fake = (b.evaluate(name, b.x_tau, b.tau, b.v, s) for s in (SCALE, 1))
                delta = np.asarray(teacher - fake)
            actual[name] = script_gradient(b, name, delta)
        print("    {:9} {:+.3f}  {:.2f}  {:.2f}".format(name, *actual[name]))
    assert actual["float64"][0] < -0.7 and abs(actual["float16"][0]) < 0.1


def script_gradient(b, name, delta, h=1e-2):
    dtype = HALF.get(name, b.x.dtype)
    x, x_tau = (u.astype(dtype).astype(u.dtype) for u in (b.x, b.x_tau))
    moved = (x_tau + STEP * b.v).astype(dtype).astype(x.dtype)
    m = b.evaluate(name, x, b.t)
    there, fake = (b.evaluate(name, u, b.tau) for u in (moved, x_tau))
    teacher_there, teacher = (b.evaluate(name, u, b.tau, scale=SCALE) for u in (moved, x_tau))
    dT, dF = (teacher_there - teacher) / h, (there - fake) / h

    def loss(m):
        ds = (there - m) / h
        error = ds - sg(ds + dT - dF)
        scale = sample_mean(jnp.abs(sg(ds) - dT)) + 1e-8
        return (sample_mean(jnp.sqrt(error**2 + HUBER**2) - HUBER) / scale).sum()

    def base(m):
        norm = sample_mean(jnp.abs(sg(m) - teacher))
        return pseudo_loss(m, fake - teacher, norm, HUBER).sum()

    gradient = jax.grad(loss)(m)
    cosine = cosines(-gradient, delta).mean()
    error = np.abs(np.asarray(dT - dF))
    saturated = (error > 2 * HUBER).mean()  # H' over 0.89
    return cosine, saturated, np.median(ratios(gradient, jax.grad(base)(m)))


def significance(gradients):
    """Root mean square over the parameters of mean / standard error: 1 where the mean is 0."""
    gradients = np.asarray(gradients, np.float64)
    error = gradients.std(0) / len(gradients) ** 0.5
    return np.sqrt(np.mean((gradients.mean(0) / error) ** 2))


def linear_world():
    """A one-step student x0 = A z and a critic that knows its law."""
    world = one_step(FLOW_WORLD)
    student = world.student_params(scale=0.4)
    student["step0"]["bias"] = jnp.zeros(D)
    return world, student, law(student["step0"]["matrix"])


@pytest.mark.slow
def test_g_the_score_form_has_no_gradient_on_average():
    """E[(J_F - J_T)(x_t) v . d x_t / d A], v independent of the rest, is 0.

    A finite step leaves h / 2 of the Laplacian of F - T, which is another loss. eps-networks, as
    the paper has them; the teacher is a mixture.
    """
    world, student, critic = linear_world()
    teacher = mixture_params() | {"means": 0.7 * mixture_params()["means"]}

    @jax.jit
    def run(batch):
        context = world.context(DMD(), batch, student, critic, teacher)
        t = 1000 * (0.1 + 0.8 * context.uniform("t"))
        alpha, sigma = (a[:, None, None, None] for a in world.schedule.alpha_sigma(t))
        x_t = alpha * context.student[0].x0 + sigma * context.normal("eps")

        def gap(x):
            return context.critic(x, t).eps - context.teacher(x, t).eps

        def along(f, v):
            return lambda x: jax.jvp(f, (x,), (jnp.broadcast_to(v, x.shape),))[1]

        v = context.normal("v")
        units = jnp.eye(D).reshape(D, *x_t.shape[1:])
        kinds = {
            "exact": along(gap, v)(x_t),
            "h = 0.01": (gap(x_t + 0.01 * v) - gap(x_t)) / 0.01,
            "h = 0.5": (gap(x_t + 0.5 * v) - gap(x_t)) / 0.5,
            "Laplacian / 2": sum(along(along(gap, e), e)(x_t) for e in units) / 2,
            "DMD": gap(x_t),
        }
        z = batch.noise.reshape(-1, D)
        return {
            name: jnp.einsum("bi,bj->bij", (alpha * g).reshape(-1, D), z).reshape(-1, D * D)
            for name, g in kinds.items()
        }

    parts = [jax.device_get(run(make_batch(65536, seed, text_scale=0.0))) for seed in range(3)]
    print("\n(g) mean gradient in standard errors (1: none), three batches of 65536")
    size = {name: [significance(part[name]) for part in parts] for name in parts[0]}
    for name, values in size.items():
        print(f"    {name:14}", *(f"{value:6.2f}" for value in values))
    means = [
        np.mean([part[name] for part in parts], (0, 1)) for name in ("h = 0.5", "Laplacian / 2")
    ]
    cosine = cosines(*(mean[None] for mean in means))[0]
    print(f"    cosine of the mean gradients of h = 0.5 and of the Laplacian: {cosine:.3f}")
    for name in ("exact", "h = 0.01"):
        assert 0.7 < np.mean(np.square(size[name])) ** 0.5 < 1.4
    assert min(size["DMD"]) > 20 and min(size["h = 0.5"]) > 2 and cosine > 0.8


@pytest.mark.slow
def test_gauge_distribution_terms_do_not_turn_the_noise_and_gad_does(monkeypatch):
    """Component of d L / d A along A W, W skew, by which a student rotates its noise: A e^W.

    Zero on average for DMD and for its tangent, whatever the teacher, where each sample's
    normaliser is left out; with it their directions are no longer a gradient in x0.
    """
    (world, student, critic), teacher = linear_world(), gaussian_params()
    matrix = np.asarray(student["step0"]["matrix"], float)
    batch = make_batch(65536, text_scale=0.0)

    def significances(term):
        @jax.jit
        def run(batch):
            context = world.context(term, batch, student, critic, teacher)
            value, dots = context.student

            def loss(x0, dx0):
                moved = None if dots is None else dots._replace(x0=dx0)
                return term(replace(context, student=(value._replace(x0=x0), moved)))[0].sum()

            tangent = jnp.zeros_like(value.x0)[None] if dots is None else dots.x0
            v = tangent if dots is None else context.direction_JNHWC
            slopes = jax.grad(loss, (0, 1))(value.x0, tangent)
            pairs = (slopes[0], batch.noise), (slopes[1][0], v[0])
            flat = [[u.reshape(-1, D) for u in pair] for pair in pairs]
            return sum(jnp.einsum("bi,bj->bij", *pair) for pair in flat)

        along = np.einsum("ki,bkj->bij", matrix, np.asarray(run(batch), np.float64))
        upper = np.triu_indices(D, 1)
        return [significance((along + sign * along.swapaxes(1, 2))[:, *upper]) for sign in (-1, 1)]

    terms = {"GAD": GAD("clean", 16), "DMD": DMD(), "its tangent": GADLift()}
    print("\n(gauge) mean gradient along A W in standard errors: W skew, W symmetric")
    actual = {name: significances(term) for name, term in terms.items()}
    for module in (dmd, gad_lift):
        monkeypatch.setattr(module, "mean_abs", lambda x: jnp.ones(len(x)))
    plain = {f"{name}, plain": significances(terms[name]) for name in ("DMD", "its tangent")}
    for name, (skew, symmetric) in (actual | plain).items():
        print(f"    {name:18} {skew:6.2f} {symmetric:6.2f}")
    assert all(skew < 1.6 and symmetric > 20 for skew, symmetric in plain.values())
    assert all(actual[name][0] < 0.1 * actual[name][1] for name in ("DMD", "its tangent"))
    assert actual["GAD"][0] > 20
