"""Options of every term: values without a meaning are refused in one line, before any network."""

from dataclasses import fields

import pytest
from all_terms import OBJECTIVES
from closed_form import FLOW_WORLD

from gadjax.errors import InputError
from gadjax.objectives import TERMS, build

NAN, INF = float("nan"), float("inf")
# Options that may be negative: means of logarithms, and SiD's alpha.
SIGNED = {"mean", "logit_mean", "alpha"}
WRONG = {
    bool: (3, "yes", 1.0),
    int: (-1, 1.5, "many", True),
    float: (NAN, INF, -INF, "much", True),
    str: (3, 1.5),
    tuple: ((NAN,), (INF, -INF), (3.5,), (-1.0, -2.0), 3, "abc"),
    type(None): (NAN, INF, "much"),
}


def wrong_values(kind, field):
    values = WRONG[type(field.default)]
    if isinstance(field.default, float) and field.name not in SIGNED:
        values += (-1.0,)
    if isinstance(field.default, str) and field.name not in getattr(kind, "sources", ()):
        values += ("no such name",)
    return values


@pytest.mark.parametrize("name", TERMS)
def test_every_option_refuses_values_without_a_meaning(name):
    times = FLOW_WORLD.times[: 1 if name == "boot" else -1]
    base, kind = OBJECTIVES[name], TERMS[name]
    build(base, TERMS, times)
    for field in fields(kind):
        for value in wrong_values(kind, field):
            objective = base | {name: base[name] | {field.name: value}}
            with pytest.raises(InputError) as caught:
                build(objective, TERMS, times)
                pytest.fail(f"{field.name}={value!r} is accepted")
            message = str(caught.value)
            assert message.startswith(("objective", "student.", "direction")), message
            assert "\n" not in message and "; expected" in message and len(message) < 300, message
