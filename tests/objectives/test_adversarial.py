"""Logits by hand, gaussians with a known discriminator, and full runs of `gadjax train`."""

import shutil
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import train_runs
from closed_form import (
    DDPM_WORLD,
    FLOW_WORLD,
    SHAPE,
    D,
    World,
    gaussian_params,
    later_steps,
    make_batch,
    one_step,
)
from jax.sharding import PartitionSpec as P
from PIL import Image
from programs import run_python
from several import flags_for
from tiny_run import config_file

from gadjax.checkpoints import restore
from gadjax.errors import InputError
from gadjax.models import pixart
from gadjax.objectives import DMD, GAD, TERMS, Adversarial, build
from gadjax.parallel.sharding import path_name
from gadjax.training.compile import compile_steps
from gadjax.training.config import read_config
from gadjax.training.context import Roles, make_context
from gadjax.training.setup import prepare
from gadjax.training.state import create_state
from gadjax.training.steps import critic_step, student_step

TOKENS, WIDTH, B = 2, 12, 8
MIX = np.random.default_rng(9).normal(size=(2 * D + 2, TOKENS * WIDTH)) / 3


def seeing(world: World) -> World:
    """The world with features: x, the networks' x0, alpha and sigma, mixed into two tokens."""

    def features(params, x_BHWC, t_B, cond):
        x0 = world.denoiser(params, x_BHWC, t_B, cond).x0
        alpha_sigma = jnp.stack(world.schedule.alpha_sigma(t_B), axis=1)
        features = jnp.concatenate([x_BHWC.reshape(-1, D), x0.reshape(-1, D), alpha_sigma], axis=1)
        return (features @ MIX.astype(features.dtype)).reshape(-1, TOKENS, WIDTH)

    world = World(world.schedule, world.kind, world.times)
    object.__setattr__(world, "denoiser", replace(world.denoiser, features=features))
    return world


DDPM, FLOW, ONE = seeing(DDPM_WORLD), seeing(FLOW_WORLD), seeing(one_step(FLOW_WORLD))


def some_head(term, dtype=jnp.float32):
    """Parameters of a head with non-zero logits."""
    rng = np.random.default_rng(4)
    head = term.init_discriminator(jax.random.key(0), WIDTH)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) / 4, dtype), head)


def pictures(samples, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(5).normal(1, 0.5, (samples, *SHAPE)), dtype)


def logits_by_hand(world, context, params, head, x0):
    """Logits by the docstring's formula, differentiable in everything."""
    span = world.schedule.last - world.schedule.clean
    t = jnp.floor(context.uniform("t") * span) + world.schedule.clean + 1
    alpha, sigma = (v[:, None, None, None] for v in world.schedule.alpha_sigma(t))
    x = alpha * x0 + sigma * context.normal("eps")
    x = world.denoiser.features(params, x, t, context.batch.cond)
    x = x - x.sum(2, keepdims=True) / WIDTH
    x = x / jnp.sqrt((x**2).sum(2, keepdims=True) / WIDTH + 1)
    x = jnp.einsum("bnd,dh->bnh", x, head["linear_1"]["kernel"]) + head["linear_1"]["bias"]
    x = x / 2 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    token_logits = (
        jnp.einsum("bnh,ho->bno", x, head["linear_2"]["kernel"]) + head["linear_2"]["bias"]
    )
    return (token_logits[:, 0, 0] + token_logits[:, 1, 0]) / 2


BY_HAND = {
    "softplus": (
        lambda fake: jnp.log(1 + jnp.exp(-fake)),
        lambda fake, real: jnp.log(1 + jnp.exp(fake)) + jnp.log(1 + jnp.exp(-real)),
    ),
    "hinge": (
        lambda fake: -fake,
        lambda fake, real: jnp.maximum(1 + fake, 0) + jnp.maximum(1 - real, 0),
    ),
}


@pytest.mark.parametrize(
    "world,features,loss",
    [(DDPM, "critic", "hinge"), (FLOW, "teacher", "softplus")],
    ids=["critic, hinge", "teacher, softplus"],
)
def test_losses_and_their_gradients(world, features, loss):
    """The student's gradient flows through x0 and the features' input; the discriminator's reaches
    the head, scaled by a hundredth the network of the features, and never the student."""
    term = Adversarial(features, loss, hidden=6)
    with jax.enable_x64(True):
        batch = make_batch(B, dtype=float)._replace(x0=pictures(B, float))
        nets = {
            "student": world.student_params(bend=0.4, dtype=float),
            "network": gaussian_params(3, dtype=float),
            "head": some_head(term, float),
        }

        def context(nets, other=None):
            shown = {"critic": other, "teacher": other} | {features: nets["network"]}
            roles = Roles(nets["student"], shown["teacher"], shown["critic"], nets["head"])
            return make_context(world.step_spec(term), term.needs, roles, batch)

        def ours(nets):
            actual = context(nets)
            loss_B, metrics = term(actual)
            return jnp.stack([loss_B.mean(), term.discriminator_loss(actual).mean()]), metrics

        def theirs(nets):
            actual = context(nets)
            names = world.denoiser(nets["student"], actual.x_BHWC, actual.t_B, batch.cond).x0
            logits = partial(logits_by_hand, world, actual, nets["network"], nets["head"])
            fake, real = logits(names), logits(batch.x0)
            student, discriminator = BY_HAND[loss]
            means = student(fake).mean(), discriminator(fake, real).mean()
            return jnp.stack(means), {"logit": fake.mean()}

        def both(f):
            return *f(nets), jax.jacrev(lambda nets: f(nets)[0])(nets)

        a, b = jax.device_get((jax.jit(lambda: both(ours))(), jax.jit(lambda: both(theirs))()))
    np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
    assert a[1].keys() == b[1].keys()
    assert float(a[1]["logit"]) == pytest.approx(float(b[1]["logit"]), rel=1e-5)
    share = {
        "student": {"student": 1, "network": 1, "head": 1},
        "discriminator": {"student": 0, "network": 0.01, "head": 1},
    }
    for row, shares in enumerate(share.values()):
        for role, expected in shares.items():
            actual, full = (jax.tree.leaves(x[2][role]) for x in (a, b))
            assert any(np.any(y[row]) for y in full), role
            for x, y in zip(actual, full, strict=True):
                size = np.abs(y[row]).max()
                # The times are float32 inside the step.
                np.testing.assert_allclose(x[row], expected * y[row], rtol=1e-4, atol=1e-6 * size)


def test_clamped_logits_have_no_gradient_beyond_the_bound():
    batch, head = make_batch(B)._replace(x0=pictures(B)), some_head(Adversarial(hidden=6))

    def losses(clamp, head):
        term = Adversarial(hidden=6, clamp=clamp)
        roles = Roles(DDPM.student_params(), None, gaussian_params(3), head)
        context = make_context(DDPM.step_spec(term), term.needs, roles, batch)
        return jnp.stack([term(context)[0], term.discriminator_loss(context)], axis=1)

    plain = np.asarray(jax.jit(partial(losses, 0.0))(head), float)
    fake = -np.log(np.expm1(plain[:, 0]))  # of softplus(-fake)
    bound = float(np.median(np.abs(fake)))
    run = jax.jit(lambda head: (losses(bound, head), jax.jacrev(partial(losses, bound))(head)))
    clamped, slopes = jax.device_get(run(head))
    expected = np.log1p(np.exp(-np.clip(fake, -bound, bound)))
    np.testing.assert_allclose(clamped[:, 0], expected, rtol=1e-4)
    np.testing.assert_array_equal(slopes["linear_2"]["bias"][:, 0, 0] != 0, np.abs(fake) < bound)
    real = -np.log(np.expm1(plain[:, 1] - np.log1p(np.exp(fake))))
    fake, real = np.clip([fake, real], -bound, bound)
    expected = np.log1p(np.exp(fake)) + np.log1p(np.exp(-real))
    np.testing.assert_allclose(clamped[:, 1], expected, rtol=1e-4)
    assert np.abs(plain - clamped).max(0).min() > 1e-3  # both are bounded


def test_a_critic_step_trains_the_head_and_the_critic():
    """The head, and the critic if the features are the critic's; nothing of a frozen teacher."""
    plain = dict.fromkeys(("student", "critic", "discriminator"), optax.sgd(1.0))
    batch, teacher = make_batch(B)._replace(x0=pictures(B)), gaussian_params()
    old, new = {}, {}
    for name in ("alone", "critic", "teacher"):
        total = 1.0 * DMD()
        old[name] = {"student": FLOW.student_params(), "critic": gaussian_params(3)}
        if name != "alone":
            term = Adversarial(name, hidden=6)
            total, old[name]["discriminator"] = total + 0.3 * term, some_head(term)
        step_spec = FLOW.step_spec(total, optimizers=plain)
        state, metrics = jax.jit(partial(critic_step, step_spec))(
            create_state(old[name], plain), {"teacher": teacher}, batch
        )
        new[name] = jax.device_get(state.params)

    def same(a, b):
        a, b = jax.tree.leaves(a), jax.tree.leaves(b)
        return [np.allclose(x, y, rtol=1e-6, atol=1e-6) for x, y in zip(a, b, strict=True)]

    for name in ("critic", "teacher"):
        assert all(same(new[name]["student"], old[name]["student"]))
        assert not any(same(new[name]["discriminator"], old[name]["discriminator"]))
    assert all(same(new["teacher"]["critic"], new["alone"]["critic"]))
    assert not any(same(new["critic"]["critic"], new["alone"]["critic"]))
    names = ("loss", "loss_B", "grad_norm", "bad")
    assert set(metrics) == {f"{r}/{m}" for r in ("critic", "discriminator") for m in names}


def test_a_detached_first_step_has_no_weight():
    term, batch = Adversarial("teacher", hidden=6), make_batch(B)._replace(x0=pictures(B))
    roles = Roles(FLOW.student_params(), gaussian_params(), discriminator=some_head(term))

    @jax.jit
    def both():
        context = make_context(FLOW.step_spec(term), term.needs, roles, batch)
        cut = replace(context, detach_first_step=True)
        total = 1.0 * term
        return [(total(c)[0], total.discriminator_loss(c)) for c in (context, cut)]

    full, cut = both()
    for a, b in zip(full, cut, strict=True):
        np.testing.assert_allclose(b, a * later_steps(B), rtol=1e-5)


def data(batch, number, mean, spread):
    """Batch with new samples of N(mean, diag spread^2), without text."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(batch.key)
    initial_params, second = (
        jax.vmap(lambda k, i=i: jax.random.normal(jax.random.fold_in(k, i), SHAPE))(keys)
        for i in (7, 8)
    )
    x0 = mean.reshape(SHAPE) + spread.reshape(SHAPE) * second
    return batch._replace(key=keys, noise=initial_params, x0=x0)


FAKE = np.linspace(-0.5, 0.5, D), np.linspace(0.5, 1.2, D)  # mean, standard deviation
REAL = FAKE[0] + 0.5, FAKE[1][::-1].copy()
AT = 0.401  # sigma, and alpha is what is left


@pytest.mark.slow
def test_it_learns_the_optimal_discriminator_of_two_gaussians():
    """Its loss converges to that of the exact log-ratio of the densities at one t, the sigmoid of
    its logit to the probability of real; if the two are equal, its logits converge to zero."""
    term = Adversarial("teacher", low=0.4, high=0.4, hidden=64)
    rate = optax.cosine_decay_schedule(2e-2, 400, 0.01)
    optimizers = {"student": optax.sgd(0.0), "discriminator": optax.adam(rate)}
    step_spec = ONE.step_spec(term, optimizers=optimizers)
    # x0 = mean + spread z, exactly.
    student = {"step0": {"matrix": jnp.diag(jnp.float32(FAKE[1])), "bias": jnp.float32(FAKE[0])}}
    student["step0"]["bend"] = jnp.zeros(D)
    batch, teacher = make_batch(256, text_scale=0.0), gaussian_params()
    head = jax.tree.map(lambda p: p / 3, some_head(term))  # equality is not where it starts

    @jax.jit
    def trained(head, real):
        def update(state, number):
            state, _ = critic_step(
                step_spec, state, {"teacher": teacher}, data(batch, number, *real)
            )
            return state, None

        start = create_state({"student": student, "discriminator": head}, optimizers)
        state, _ = jax.lax.scan(update, start, jnp.arange(400))
        head = state.params["discriminator"]
        many = data(make_batch(8192, text_scale=0.0), 1000, *real)
        roles = Roles(student, teacher, discriminator=head)
        context = make_context(step_spec, term.needs, roles, many)
        fake, noise = context.student[0].x0, AT * context.normal("eps")
        features = [(1 - AT) * x0 + noise for x0 in (fake, many.x0)]
        return term.discriminator_loss(context).mean(), features, jnp.exp(-term(context)[0])

    def density(x, mean, spread):
        x, variance = x.reshape(-1, D).astype(float), ((1 - AT) * spread) ** 2 + AT**2
        return -0.5 * ((x - (1 - AT) * mean) ** 2 / variance + np.log(variance)).sum(1)

    loss, features, share = jax.device_get(trained(head, REAL))
    ratio = [density(x, *REAL) - density(x, *FAKE) for x in features]
    best = np.logaddexp(0, ratio[0]).mean() + np.logaddexp(0, -ratio[1]).mean()
    off = np.abs(share - 1 / (1 + np.exp(-ratio[0]))).mean()
    print(f"loss {loss:.4f}, of the exact log-ratio {best:.4f}, of none {2 * np.log(2):.4f}")
    print(f"share of the real off by {off:.4f}")
    assert best - 0.01 < loss < best + 0.05 and off < 0.06

    loss, _, share = jax.device_get(trained(head, FAKE))
    print(f"equal: loss {loss:.4f}, share off by {np.abs(share - 0.5).mean():.4f}")
    assert abs(loss - 2 * np.log(2)) < 0.01 and np.abs(share - 0.5).mean() < 0.03


@pytest.mark.slow
def test_a_student_learns_the_data_from_it_alone():
    """Mean and covariance of its samples converge to those of the data."""
    # At little noise, where covariances show most.
    updates, term = 800, Adversarial("teacher", "hinge", low=0.05, high=0.3, hidden=64)
    rates = {"student": 0.01, "discriminator": 0.04}
    optimizers = {
        role: optax.adam(optax.cosine_decay_schedule(rate, updates, 0.02), b1=0.0, b2=0.95)
        for role, rate in rates.items()
    }
    step_spec = ONE.step_spec(1.0 * term, optimizers=optimizers, ema=0.98)
    batch, teacher = make_batch(128, text_scale=0.0), gaussian_params()

    @jax.jit
    def run(state):
        def update(state, number):
            now = partial(data, batch, mean=REAL[0], spread=REAL[1])
            state, _ = critic_step(step_spec, state, {"teacher": teacher}, now(2 * number))
            state, metrics = student_step(
                step_spec, state, {"teacher": teacher}, now(2 * number + 1)
            )
            return state, metrics["adversarial/logit"]

        return jax.lax.scan(update, state, jnp.arange(updates))

    head = term.init_discriminator(jax.random.key(0), WIDTH)
    student = ONE.student_params(scale=0.5)
    state, logit = run(create_state({"student": student, "discriminator": head}, optimizers))

    def apart(params):
        step = jax.tree.map(np.asarray, params["step0"])
        covariance = step["matrix"] @ step["matrix"].T - np.diag(REAL[1] ** 2)
        return np.linalg.norm(step["bias"] - REAL[0]), np.linalg.norm(covariance)

    before, after = apart(student), apart(state.ema)
    print(f"mean off by {before[0]:.3f} -> {after[0]:.3f}, cov. {before[1]:.3f} -> {after[1]:.3f}")
    assert np.isfinite(logit).all()
    assert after[0] < 0.1 * before[0] and after[1] < 0.25 * before[1]


@pytest.mark.slow
def test_it_combines_with_dmd_and_gad():
    total = DMD() + 0.01 * Adversarial(hidden=6) + 0.5 * GAD(steps=1)
    total.check(DDPM_WORLD.times[:-1])
    optimizers = dict.fromkeys(("student", "critic", "discriminator"), optax.adam(1e-2))
    params = {
        "student": DDPM.student_params(),
        "critic": gaussian_params(3),
        "discriminator": total.init_discriminator(jax.random.key(0), WIDTH),
    }
    step_spec = DDPM.step_spec(total, optimizers=optimizers, microbatches=2)
    teacher, batch = gaussian_params(), make_batch(B)._replace(x0=pictures(B))

    @jax.jit
    def run(state):
        def update(state, _):
            state, metrics = critic_step(step_spec, state, {"teacher": teacher}, batch)
            state, more = student_step(step_spec, state, {"teacher": teacher}, batch)
            return state, metrics | more

        return jax.lax.scan(update, state, None, 2)

    state, metrics = run(create_state(params, optimizers))
    expected = {"loss/dmd", "loss/adversarial", "loss/gad", "adversarial/logit", "critic/loss"}
    assert expected | {"discriminator/loss", "discriminator/bad"} <= set(metrics)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state, metrics)))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(state.params["discriminator"]))


@pytest.mark.parametrize(
    "options,words",
    [
        ({"features": "student"}, r"adversarial.features: found 'student'; expected 'critic' or"),
        ({"loss": "wgan"}, r"adversarial.loss: found 'wgan'; expected 'softplus' or 'hinge'"),
        ({"high": 980}, r"adversarial.high: found 980; expected a share from 0.0 to 1"),
        ({"low": 0.5, "high": 0.4}, r"adversarial.high: found 0.4; expected a share from 0.5 to 1"),
        ({"clamp": -1.0}, r"adversarial.clamp: found -1.0; expected 0 or more"),
        ({"hidden": 0}, r"adversarial.hidden: found 0; expected 1 or more"),
        ({"features": "critic"}, r"found 0 terms that train the critic; expected one"),
        ({"width": 3}, r"adversarial: found 'width'; expected weight, clamp"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(InputError, match=words) as caught:
        build({"adversarial": options}, TERMS, DDPM_WORLD.times[:-1])
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def config(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adversarial")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for name in ("red circle", "green square", "blue circle"):
        path = folder / "images" / f"{name}.png"
        Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(path)
        path.with_suffix(".txt").write_text(name)
    # A head large enough that it would need a rule of its own among the networks'.
    adversarial = {"weight": 0.005, "hidden": 4096}
    return config_file(
        folder / "config.py",
        teacher=str(tiny_pipeline),
        student={"steps": 2, "timesteps": (900, 400)},
        objective={"dmd": {}, "adversarial": adversarial, "gad": {"steps": 1}},
        **{"steps": 2, "batch": 4, "remat": "none", "optim": {"lr": 1e-3}, "critic": {"lr": 1e-3}},
        data={"images": str(folder / "images"), "length": 8},
        **{"checkpoint": {"every": 1}, "log": {"every": 1}, "preview": {"every": 0}},
    )


def train(config, workdir, *flags):
    flags = (f"--config.{flag}" for flag in flags)
    return train_runs.train(config, workdir, *flags)


def test_the_head_is_replicated(config):
    """Only large leaves are sharded."""
    run = prepare(read_config(["--config", str(config)]))
    state = compile_steps(run).state
    shapes = jax.eval_shape(run.start, run.initial_params).params["discriminator"]
    assert shapes["linear_1"]["kernel"].shape == (24, 4096)
    for tree in (state.params["discriminator"], state.opt["discriminator"]):
        specs = {path_name(path): x.spec for path, x in jax.tree_util.tree_leaves_with_path(tree)}
        large = {path for path in specs if path.endswith("linear_1/kernel")}
        assert large and all(specs[path] == P(None, "fsdp") for path in large)
        assert {spec for path, spec in specs.items() if path not in large} == {P()}


@pytest.mark.slow
def test_a_run_resumes_with_its_discriminator(config, tmp_path, monkeypatch):
    """Bit for bit, and on two devices up to rounding."""
    parts = ("params", "discriminator"), ("opt", "discriminator"), ("params", "student")
    for part in parts:
        monkeypatch.setitem(restore.PARTS, "/".join(part), part)

    def read(workdir, step):
        return {
            part: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
            for part in parts
            for tree in [restore.read_params(workdir / "checkpoints", "/".join(part), step)[1]]
        }

    def metrics(workdir):
        return train_runs.rows(workdir)[-1]

    full, again, two = (tmp_path / name for name in ("whole", "again", "two"))
    assert train(config, full) == 0
    for workdir in (again, two):
        shutil.copytree(full, workdir)
        shutil.rmtree(workdir / "checkpoints" / "2")
    assert train(config, again) == 0
    flags = "--config.mesh.data=1", "--config.mesh.fsdp=2"
    command = ["-m", "gadjax", "train", "--config", config, "--workdir", two, *flags]
    run_python(*command, XLA_FLAGS=flags_for(2))

    before, after = read(full, 1), read(full, 2)
    for part, expected in after.items():
        np.testing.assert_array_equal(read(again, 2)[part], expected)
        change, apart = expected - before[part], read(two, 2)[part] - expected
        print(part, f"{np.linalg.norm(apart) / np.linalg.norm(change):.1e} of the way apart")
        assert np.linalg.norm(apart) < 0.005 * np.linalg.norm(change)
    names = "loss/dmd", "loss/adversarial", "loss/gad", "critic/loss", "discriminator/loss"
    for name in (*names, "adversarial/logit"):
        assert np.isfinite(metrics(full)[name])
        assert metrics(two)[name] == pytest.approx(metrics(full)[name], rel=1e-4)


@pytest.mark.parametrize(
    "flags,words",
    [
        (("data.images=", "data.prompts=a.txt"), "found nothing; expected a source of pictures"),
        (("critic.updates=0",), "critic.updates: found 0; expected 1 or more, because the"),
        ((), "found a discriminator; expected a family whose networks show features"),
    ],
    ids=["pictures", "updates", "features"],
)
def test_a_run_without_what_it_needs_is_one_line(
    config, tmp_path, capsys, monkeypatch, flags, words
):
    if not flags:
        changed = replace(pixart.FAMILY, features=lambda apply: None)
        monkeypatch.setattr(pixart, "FAMILY", changed)
    assert train(config, tmp_path / "run", *flags) == 2
    line = capsys.readouterr().err
    assert words in line and line.count("\n") == 1
    assert not (tmp_path / "run").exists()
