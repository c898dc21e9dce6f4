"""Numbers of outside scripts for the report: `gadjax evaluate --import FILE`.

A JSON object {"results": [RESULT, ...]}, or one RESULT. A RESULT has "metric", "version" (of the
script and its networks), "row" (teacher, teacher_few, student), "value" and "n" (pictures); "low"
and "high" (an interval), and "per_prompt" (a number for each prompt of the evaluation, in order)
may be there.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gadjax.errors import InputError, short_repr
from gadjax.evaluation.metric_catalogue import Metric
from gadjax.evaluation.results import Evaluation
from gadjax.evaluation.statistics import Estimate, mean
from gadjax.io.untrusted import is_count, is_number, read_json

GROUP = "external"
# They stand in tables, which have no escapes.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .@+-]{0,39}")
ROW = re.compile(r"teacher|(teacher_few|student)(_[0-9]+)?")
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .,:;@+()/-]{0,99}")
KEYS = {"metric", "version", "row", "value", "n", "low", "high", "per_prompt"}
MAX_RESULTS = 1000


def read_external(path: Path, prompts: int) -> list[dict[str, Any]]:
    """Results of a file, checked.

    Args:
      path: the JSON file.
      prompts: number of prompts of the evaluation.
    Raises: InputError naming the result and the key of a bad value.
    """
    cfg = read_json(path)
    results = cfg.get("results", [cfg] if "metric" in cfg else None)
    if not isinstance(results, list) or not 0 < len(results) <= MAX_RESULTS:
        raise InputError(f"{path}: found no results; expected {{'results': [...]}}")
    for number, result in enumerate(results, 1):
        try:
            _check(result, prompts)
        except InputError as error:
            raise InputError(f"{path}, result {number}: {error}") from None
    names = [(result["metric"], result["row"]) for result in results]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{path}: found {twice[0]} of {twice[1]} twice; expected it once")
    return results


def _check(result: Any, prompts: int) -> None:
    if not isinstance(result, dict):
        raise InputError(f"found {short_repr(result)}; expected a JSON object")
    if unknown := sorted(result.keys() - KEYS):
        raise InputError(f"{unknown[0]}: found an unknown key; expected {', '.join(sorted(KEYS))}")
    for key, pattern, expected in (
        ("metric", NAME, "a short plain name"),
        ("version", VERSION, "a short plain text"),
        ("row", ROW, "teacher, teacher_few or student"),
    ):
        value = result.get(key)
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise InputError(f"{key}: found {short_repr(value)}; expected {expected}")
    if not is_number(result.get("value")):
        raise InputError(f"value: found {short_repr(result.get('value'))}; expected a number")
    if not is_count(result.get("n"), 1):
        raise InputError(f"n: found {short_repr(result.get('n'))}; expected a number of pictures")
    ends = [result[key] for key in ("low", "high") if key in result]
    if ends and not (len(ends) == 2 and all(map(is_number, ends)) and ends[0] <= ends[1]):
        raise InputError(f"low, high: found {short_repr(ends)}; expected both ends of an interval")
    values = result.get("per_prompt")
    if values is not None and not (
        isinstance(values, list) and len(values) == prompts and all(map(is_number, values))
    ):
        raise InputError(f"per_prompt: found another list; expected {prompts} numbers, in order")


def with_external(evaluation: Evaluation, results: Sequence[dict[str, Any]]) -> Evaluation:
    """Evaluation with the results as metrics external/METRIC of its rows.

    An interval is the file's, or by bootstrap over the prompts where their mean is the value (a
    mean of task means, such as GenEval's, has none here).
    Raises: InputError for a row that the evaluation does not have.
    """
    keys = [row.key for row in evaluation.rows]
    catalogue, taken = dict(evaluation.catalogue), {key: {} for key in keys}
    for result in results:
        if result["row"] not in taken:
            raise InputError(
                f"--import: found row {result['row']!r}; expected one of {', '.join(keys)}"
            )
        name = f"external/{result['metric']}"
        meaning = f"by an outside script, {result['version']}; {result['n']} pictures"
        catalogue[name] = Metric(result["metric"], meaning, GROUP)
        taken[result["row"]][name] = _estimate(result)
    rows = [replace(row, metrics=row.metrics | taken[row.key]) for row in evaluation.rows]
    return replace(evaluation, rows=rows, catalogue=catalogue)


def _estimate(result: dict[str, Any]) -> Estimate:
    value = float(result["value"])
    if "low" in result:
        return Estimate(value, float(result["low"]), float(result["high"]))
    values = np.array(result.get("per_prompt") or [], float)
    if len(values) and np.isclose(values.mean(), value, rtol=1e-6, atol=1e-9):
        return mean(values)
    return Estimate(value)
