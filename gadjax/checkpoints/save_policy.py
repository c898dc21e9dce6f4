"""When checkpoints are saved, and how often in a row that may fail."""

from collections.abc import Callable

from gadjax.checkpoints.checkpoint import Checkpoints, SaveFailed
from gadjax.types import PyTree


class SavePolicy:
    """Saves of one run, of which some may fail: the run goes on, and the next one is tried as if
    nothing had been."""

    def __init__(self, checkpoints: Checkpoints, most: int, note: Callable[[str], None]):
        """most: how many saves in a row may fail. note: is told of each."""
        self.checkpoints, self.most, self.note, self.failed = checkpoints, most, note, 0

    def save(self, step: int, state: PyTree, meta: dict, last: bool) -> None:
        """As `Checkpoints.save`. last: nothing comes after it, so that it may not fail; what of it
        is written in the background is known after `Checkpoints.wait`.

        Raises: SaveFailed where one failed too many.
        """
        if self.checkpoints.saving is not None and self._try(self.checkpoints.wait):
            self.failed = 0
        self._try(lambda: self.checkpoints.save(step, state, meta), last)

    def _try(self, write: Callable[[], None], last: bool = False) -> bool:
        try:
            write()
        except SaveFailed as error:
            self.failed += 1
            if last or self.failed > self.most:
                raise
            self.note(f"{error} (failure {self.failed} of {self.most} that are borne)")
            return False
        return True
