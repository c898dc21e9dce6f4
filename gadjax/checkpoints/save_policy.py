"""Save policy: how many checkpoint saves in a row may fail."""

from collections.abc import Callable

from gadjax.checkpoints.checkpoint import Checkpoints, SaveFailed
from gadjax.types import PyTree


class SavePolicy:
    """Saves of one run, of which some may fail: the run continues, and the next save is tried."""

    def __init__(self, checkpoints: Checkpoints, max_failures: int, note: Callable[[str], None]):
        """Set the tolerance.

        Args:
          checkpoints: the run's checkpoints.
          max_failures: number of consecutive failed saves that do not stop the run.
          note: called with one line per failed save.
        """
        self.checkpoints, self.max_failures, self.note, self.failures = (
            checkpoints,
            max_failures,
            note,
            0,
        )

    def save(self, step: int, state: PyTree, meta: dict, last: bool) -> None:
        """Save a step, tolerating failures.

        Args:
          step, state, meta: as of `Checkpoints.save`.
          last: no save follows, so this one may not fail. Failures of its background write are
            raised by `Checkpoints.wait`.

        Raises: SaveFailed after too many failures in a row.
        """
        if self.checkpoints.pending is not None and self._try(self.checkpoints.wait):
            self.failures = 0
        self._try(lambda: self.checkpoints.save(step, state, meta), last)

    def _try(self, write: Callable[[], None], last: bool = False) -> bool:
        try:
            write()
        except SaveFailed as error:
            self.failures += 1
            if last or self.failures > self.max_failures:
                raise
            self.note(f"{error} (failure {self.failures} of {self.max_failures} tolerated)")
            return False
        return True
