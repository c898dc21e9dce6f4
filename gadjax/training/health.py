"""Health of a run: the signals of its previews beside the teacher's, and alarms."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from gadjax import assets
from gadjax.errors import InputError, RunStopped, check_choice
from gadjax.runtime.status import HEALTH, OF_TEACHER, parse_health
from gadjax.training.signals import Drawn, compare, measure


class Band(NamedTuple):
    """Width of the band around the teacher's value, and on which sides of it.

    least: None for a width that is a difference; else it is a share of the teacher's value, less
      `floor`, which counts as this much where it is smaller.
    sides: 1 = above alone, -1 = below alone, 0 = both.
    floor: value of a signal that says nothing.
    """

    width: float
    least: float | None = None
    sides: int = 0
    floor: float = 0.0

    def distance(self, value: float, teacher: float) -> float:
        """Distance from the teacher's value in widths of the band; 1 is its edge."""
        scale = 1.0 if self.least is None else max(teacher - self.floor, self.least)
        apart = (value - teacher) / (scale * self.width)
        return max(apart * self.sides, 0) if self.sides else abs(apart)


GUIDANCE = "guidance/"  # before the name: of the teacher at the run's guidance, beside its own
BANDS = {
    "seed_similarity": Band(0.1, sides=1),
    "same_seed": Band(0.4, sides=-1),
    "x0_rms": Band(0.15, least=1e-3),
    "low_band": Band(0.25, least=1e-3),
    "saturation": Band(0.2, least=0.1),
    "contrast": Band(0.4, least=0.1),
    "clipped": Band(0.05, sides=1),
    "vendi": Band(0.4, least=0.25, sides=-1, floor=1.0),  # 1 = all alike
    "alignment": Band(0.3, sides=-1),
}
BETWEEN_SEEDS = "seed_similarity", "same_seed", "vendi", "alignment"  # of two noises or more
BY_FEATURES = "vendi", "alignment"


class Health:
    """Signals of every preview, as rows of health.jsonl, and their alarms.

    A student of few steps begins outside the teacher's band and comes closer. A signal's alarm is
    therefore a preview that is a width of its band further from the teacher than the best one
    before it. Its state is the rows: a resumed run reads those before its step.
    """

    def __init__(
        self,
        earlier: Sequence[Mapping[str, Any]],
        teacher: Drawn | None = None,
        weaker: Drawn | None = None,
    ):
        """Judge the rows of earlier previews, and take the teacher's signals.

        Args:
          earlier: rows of the previews before, as `earlier_rows` reads them.
          teacher: what it has drawn; None where a run has no teacher: no alarms.
          weaker: what the teacher has drawn at its folder's own, weaker guidance; None where the
            run's is not stronger.
        """
        self.teacher = teacher
        self.reference = {} if teacher is None else self._measure(teacher)
        self.of_guidance = {}
        if weaker is not None:
            for name, value in measure(weaker).items():
                self.of_guidance[GUIDANCE + name] = self.reference[name]
                self.of_guidance[GUIDANCE + name + OF_TEACHER] = value
        self.best: dict[str, float] = {}
        self.alarms: list[str] = []
        for row in earlier:
            self.alarms = judge(row, self.best)

    def __call__(self, step: int, student: Drawn) -> dict[str, Any]:
        """Row of a preview: the step, the student's and the teacher's values (None where one is not
        finite), and the alarms."""
        values = self._measure(student)
        values |= {f"{name}{OF_TEACHER}": value for name, value in self.reference.items()}
        values |= self.of_guidance
        row = {name: x if math.isfinite(x) else None for name, x in values.items()}
        self.alarms = judge(row, self.best)
        return {"step": step} | row | {"alarms": self.alarms}

    def _measure(self, drawn: Drawn) -> dict[str, float]:
        return measure(drawn) | ({} if self.teacher is None else compare(drawn, self.teacher))


def judge(row: Mapping[str, Any], best: dict[str, float]) -> list[str]:
    """Alarms of a row.

    Args:
      row: values of student and teacher by name, None where one is not finite.
      best: least distance from the teacher so far, by name; the row is taken into it.
    """
    alarms = []
    for name, band in BANDS.items():
        strong, weak = (row.get(f"{GUIDANCE}{name}{end}") for end in ("", OF_TEACHER))
        if None not in (strong, weak) and band.distance(strong, weak) > 1:
            alarms.append(GUIDANCE + name)
        if row.get(name + OF_TEACHER) is None:
            continue
        distance = math.inf
        if row.get(name) is not None:
            distance = band.distance(row[name], row[name + OF_TEACHER])
        least = best.get(name, distance)
        if distance == math.inf or distance > least + 1:
            alarms.append(name)
        best[name] = min(least, distance)
    return alarms


def report_alarms(
    row: Mapping[str, Any],
    before: Sequence[str],
    stop_when: Sequence[str],
    note: Callable[[str], None],
) -> None:
    """Log the alarms of a row that the preview before it did not have.

    Args:
      row: of `Health`.
      before: alarms of the preview before it.
      stop_when: signals whose alarm stops the run.
      note: receives one line for each.

    Raises: RunStopped for an alarm of one of `stop_when`.
    """
    for name in row["alarms"]:
        value = "not finite" if row[name] is None else f"{row[name]:.3g}"
        text = f"step {row['step']}: {name} is {value}, the teacher's {row[name + OF_TEACHER]:.3g}"
        if name not in before:
            note(f"{text}: ALARM (docs/monitoring.md)")
        if name in stop_when:
            raise RunStopped(f"{text}; expected it in the teacher's band (preview.stop_when)")


def check_previews(preview: ConfigDict) -> None:
    """Check a config's `preview`: numbers of pictures, the extractor's path, and signals whose
    alarm stops the run.

    Raises: InputError.
    """
    for name in ("prompts", "seeds") if preview.every else ():
        if preview[name] < 1:
            raise InputError(f"preview.{name}: found {preview[name]}; expected 1 or more")
    if preview.every and preview.features and not assets.resolve(preview.features).exists():
        raise InputError(
            f"preview.features: found {preview.features!r}, which is not there; expected the "
            "folder of a feature network"
        )
    stop_when = set(preview.stop_when)
    for name in preview.stop_when:
        check_choice("preview.stop_when", name, BANDS)
    if stop_when and not preview.every:
        raise InputError(
            "preview.stop_when: found signals without previews; expected preview.every"
        )
    if (names := sorted(stop_when & {*BETWEEN_SEEDS})) and preview.seeds < 2:
        raise InputError(
            f"preview.seeds: found {preview.seeds}; expected 2 or more for {' and '.join(names)} "
            "in preview.stop_when"
        )
    if (names := sorted(stop_when & {*BY_FEATURES})) and not preview.features:
        raise InputError(
            f"preview.features: found nothing; expected the folder of a feature network for "
            f"{' and '.join(names)} in preview.stop_when"
        )


def earlier_rows(workdir: Path, done: int) -> list[dict[str, Any]]:
    """Rows of health.jsonl of the steps before `done`; what is no row of it is left out.

    Later rows are those of a start that was killed: their previews are drawn again.
    """
    path = workdir / HEALTH
    lines = path.read_bytes().decode("utf-8", "replace").splitlines() if path.is_file() else ()
    return [row for row in map(parse_health, lines) if row and row["step"] < done]
