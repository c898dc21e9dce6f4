from dataclasses import replace

import jax
import numpy as np
import pytest
from closed_form import FLOW_WORLD, GUIDANCE, gaussian_params, make_batch, mixture_params
from formula_terms import SAMPLES

from gadjax.errors import InputError
from gadjax.objectives import DMD, TERMS, DisBack, build
from gadjax.training.context import Roles, make_context

PATH = ("far", "near")
NETS = {"disback/0": mixture_params(5), "disback/1": mixture_params(6)}


def losses(term, share, teacher, networks=None):
    step_spec = FLOW_WORLD.step_spec(term, steps=100)
    student, critic = FLOW_WORLD.student_params(bend=0.2), gaussian_params(3)

    @jax.jit
    def run(step):
        roles = Roles(student, teacher, critic, networks=networks or {})
        context = make_context(step_spec, term.needs, roles, make_batch(SAMPLES), step)
        return term(context)[0]

    return np.asarray(run(int(100 * share)))


@pytest.mark.parametrize(
    "share,name", [(0.0, 0), (0.24, 0), (0.25, 1), (0.49, 1), (0.5, None), (1.0, None)]
)
def test_it_is_dmd_with_the_network_of_its_part_of_the_run(share, name):
    teacher = mixture_params()
    actual = losses(DisBack(path=PATH), share, teacher, NETS)
    now = teacher if name is None else NETS[f"disback/{name}"]
    np.testing.assert_allclose(actual, losses(DMD(), share, now), rtol=1e-5)
    other = losses(DMD(), share, NETS["disback/1"] if name != 1 else teacher)
    assert not np.allclose(actual, other, rtol=1e-2)


def test_the_path_is_unconditional_where_the_teacher_is_asked_so():
    """A scale beside the run's is passed on."""
    term, batch = DisBack(path=PATH), make_batch(SAMPLES)
    step_spec = FLOW_WORLD.step_spec(term, steps=100)
    roles = Roles(FLOW_WORLD.student_params(), mixture_params(), gaussian_params(3), networks=NETS)

    @jax.jit
    def run():
        context = make_context(step_spec, term.needs, roles, batch)
        teacher, x, t = term.teacher(context), context.x_BHWC, context.t_B
        return [teacher(x, t, *scale).x0 for scale in ((), (GUIDANCE,), (0,))]

    guided, same, plain = run()
    np.testing.assert_array_equal(guided, same)
    assert not np.allclose(guided, plain, rtol=1e-2)


def test_the_path_is_networks_of_the_run():
    total = build({"disback": {"path": PATH}}, TERMS, FLOW_WORLD.times[:-1])
    assert total.needs.networks == {"disback/0": "far", "disback/1": "near"}
    assert total.needs.teacher and total.needs.critic
    assert replace(DisBack(path=PATH), backprop="all").needs.endpoint


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(), "objective.disback.path: found nothing; expected the sources of degraded"),
        (dict(path=PATH, until=0.0), "objective.disback.until: found 0.0; expected a share"),
        (dict(path=PATH, until=1.5), "objective.disback.until: found 1.5; expected a share"),
        (dict(path=PATH, low=2.0), "objective.dmd.low: found 2.0; expected a share"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError) as error:
        DisBack(**options)
    assert str(error.value).startswith(message)
