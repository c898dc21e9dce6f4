"""Cost of a step: in network evaluations by the program, and in seconds of small runs."""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
from benchmarks.common import Figure, Size, make_batch, make_network, seconds
from ml_collections import ConfigDict

from gadjax.diffusion.geometry import tangent
from gadjax.experiments import study_cells
from gadjax.experiments.study_runs import evaluations as evaluations_of
from gadjax.models.params import cast
from gadjax.objectives import GAD, TDM, Term
from gadjax.ops.flops import flops
from gadjax.parallel.sharding import batch_sharding, put_on_mesh
from gadjax.training.compile import compile_steps
from gadjax.training.loop import init_state
from gadjax.training.setup import Run, prepare
from gadjax.training.state import StepSpec, create_state, make_optimizer
from gadjax.training.steps import critic_step, student_step

GRID = (899.0, 674.0, 449.0, 224.0, -1.0)
T = 500.0
ADDED = "none", "gad", "anchor", "gad_anchor"
VARIANTS = (*(f"{base}_{added}" for base in study_cells.BASES for added in ADDED), "script")
OPTIM = {"lr": 1e-5, "warmup": 0, "decay": 0, "b1": 0.0, "b2": 0.95, "weight_decay": 0, "clip": 1}


def make_step_spec(
    size: Size, objective: Term, times=GRID, dtype=jnp.float32, remat=True
) -> StepSpec:
    roles = ("student", "critic") if objective.needs.critic else ("student",)
    return StepSpec(
        denoiser=make_network(size, dtype, remat)[1],
        objective=objective,
        times=times,
        guidance=4.5,
        optimizers={role: make_optimizer(ConfigDict(OPTIM)) for role in roles},
        ema=0.999,
    )


def start(size: Size, step_spec: StepSpec, dtype=jnp.float32):
    """State, frozen networks in `dtype` and batch; all networks are one random network."""
    params = make_network(size)[0].init(jax.random.key(0))
    state = create_state(
        {role: jax.tree.map(jnp.copy, params) for role in step_spec.optimizers},
        step_spec.optimizers,
    )
    return state, {"teacher": cast(params, dtype)}, make_batch(size)


def evaluations(size: Size) -> Iterator[Figure]:
    """Cost of the generator step, without optimizer, in units u: FLOPs of one forward pass.

    "as planned": the student's value and tangent with their gradient, and value and tangent of
    the teacher (guided: two evaluations) and of the critic. This is the released script's step with
    exact derivatives in the place of its differences. `student_step` is gadjax's own.
    """
    batch = jax.eval_shape(lambda: make_batch(size))
    params = jax.eval_shape(lambda: make_network(size)[0].init(jax.random.key(0)))
    how = {False: "nothing recomputed", "results": "each block recomputed but for results"}
    how = {remat: f"{size}; {words}" for remat, words in how.items()}
    how[True] = note = f"{size}; each block recomputed in reverse"
    aim = 17.0 if size.tokens >= 4096 else 15.0
    for remat, most in ((False, None), ("results", None), (True, aim)):
        cost, u = parts(size, params, batch, remat)
        planned = sum(cost["pair"].values())
        yield Figure("generator step as planned: exact tangents, u", planned, most, note=how[remat])
    yield Figure("u in TFLOP an image", u / size.batch / 1e12, note=str(size))
    base = sum(cost["value"].values())
    yield Figure("generator step as planned: without GAD, u", base, note=note)
    yield Figure("generator step as planned: finite differences, u", 2 * base, note=note)
    for who, amount in cost["pair"].items():
        yield Figure(f"of these: {who}, u", amount, note=note)

    def cost_of(step, objective, times, remat=True):
        step_spec = make_step_spec(size, objective, times, remat=remat)
        state = jax.eval_shape(lambda: start(size, step_spec)[0])
        return flops(partial(step, step_spec), state, {"teacher": params}, batch) / u

    one, base, gad = (899.0, -1.0), 1.0 * TDM(), 1.0 * GAD(steps=1)
    k, some = size.batch, lambda steps: GAD(steps=steps, one_in=size.batch)
    given, simulated = "student_step from a given latent", "student_step with backward simulation"
    for name, objective, times, remat, most in (
        (f"{given}: TDM, u", base, one, True, None),
        (f"{given}: GAD, map of 1 step, u", gad, one, True, aim),
        (f"{given}: TDM + GAD, map of 1 step, u", base + gad, one, True, aim),
        (f"{given}: TDM + GAD, map of 1 step, u", base + gad, one, "results", aim),
        (f"{simulated}: TDM + GAD, map of 1 step, u", base + gad, GRID, True, None),
        (f"{simulated}: TDM + GAD, map of 4 steps, u", base + GAD(steps=4), GRID, True, None),
        (f"{simulated}: TDM + GAD, map of 4 steps, u", base + GAD(steps=4), GRID, "results", None),
        (f"{given}: TDM + GAD of one in {k}, map of 1 step, u", base + some(1), one, True, aim),
        (
            f"{simulated}: TDM + GAD of one in {k}, map of 4 steps, u",
            base + some(4),
            GRID,
            True,
            None,
        ),
    ):
        value = cost_of(student_step, objective, times, remat)
        yield Figure(name, value, most, note=how[remat])
    yield Figure(
        "critic_step with backward simulation: TDM, u", cost_of(critic_step, base, GRID), note=note
    )


def parts(size: Size, params, batch, remat: bool | str):
    """Evaluations by kind and network, of values alone and with tangents ("pair"); and u."""
    _, denoiser = make_network(size, remat=remat)

    def raw(params, x, batch):
        return denoiser.raw(params, x, T, batch.cond)

    def guided(params, x, batch):
        return denoiser.guided_raw(params, x, T, batch.cond, batch.null, 4.5)

    def grad(f):
        return jax.grad(lambda params, batch: sum(map(jnp.sum, f(params, batch))))

    def value(f):
        return lambda params, batch: (f(params, batch.noise, batch),)

    def pair(f):
        return lambda params, batch: tangent(
            lambda x: f(params, x, batch), batch.noise, batch.noise
        )

    u = flops(value(raw), params, batch)
    who = {"student": lambda of: grad(of(raw))}
    who |= {"teacher": lambda of: of(guided), "critic": lambda of: of(raw)}
    return {
        kind: {name: flops(make(of), params, batch) / u for name, make in who.items()}
        for kind, of in (("value", value), ("pair", pair))
    }, u


def iterations(variants: tuple[str, ...], rounds: int) -> Iterator[Figure]:
    """Cost of iterations of the study's objectives on the bundled eps teacher (batch 16, 4 steps of
    the student, 2 critic updates where there is a critic), beside the same base alone."""
    configs = {name: study_cells.config_of(f"eps/{name}") for name in variants}
    cost = {name: evaluations_of(prepare(config)) for name, config in configs.items()}
    for name in variants:
        base = f"{'tdm' if name == 'script' else name.split('_')[0]}_none"
        yield Figure(f"evaluations an iteration: {name}", cost[name])
        if name != base:
            yield Figure(f"evaluations / base: {name}", cost[name] / cost[base])
    taken = seconds({name: iteration(config) for name, config in configs.items()}, rounds)
    for name in variants:
        base = f"{'tdm' if name == 'script' else name.split('_')[0]}_none"
        yield Figure(f"seconds an iteration: {name}", taken[name])
        if name != base:
            yield Figure(f"seconds / base: {name}", taken[name] / taken[base])


def iteration(config) -> Callable[[], object]:
    """Function that does one student update with its critic updates, from the last state."""
    bench = Bench(prepare(config))
    return bench.iterate


class Bench:
    """Compiled updates of a run, and a state that they change."""

    def __init__(self, run: Run):
        self.run, self.steps = run, compile_steps(run)
        self.state = init_state(run, self.steps)
        self.frozen = jax.device_put(run.frozen, self.steps.frozen)
        self.update = 0
        # Sharded as the loop's are: for other arguments a step is compiled again.
        self.raw = put_on_mesh(run.source.batch(0, run.batch), batch_sharding(run.mesh))

    def iterate(self, raws=None):
        """Do one iteration. raws: iterator of host batches, one an update; else one is reused."""
        for step in self.steps.order:
            raw = self.raw if raws is None else next(raws)
            update = jnp.uint32(self.update)
            self.state, metrics = step(self.state, self.frozen, raw, update)
            self.update += 1
        return metrics
