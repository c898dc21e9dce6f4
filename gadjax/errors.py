"""The two ways a command ends badly on purpose, each said in one line."""

from gadjax.shown import printable

LONGEST = 2000  # characters


class _Said(Exception):
    def __str__(self) -> str:
        """One line whatever it quotes (names in a file, a path, another library's reason), which
        others wrote; without its middle where it is very long."""
        text = super().__str__()
        if len(text) > LONGEST:
            text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 4 :]}"
        text = printable(text)
        return text if len(text) <= LONGEST else text[: LONGEST - 4] + " ..."


class InputError(_Said, ValueError):
    """What the user gave is wrong: one line (file, key or flag; found; expected), exit code 2."""


class RunStopped(_Said, RuntimeError):
    """The run stopped itself (non-finite values, storage): exit code 3."""
