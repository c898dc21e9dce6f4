"""The two ways a command ends badly on purpose."""


class InputError(ValueError):
    """What the user gave is wrong: one line (file, key or flag; found; expected), exit code 2."""


class RunStopped(RuntimeError):
    """The run stopped itself (non-finite values, storage): exit code 3."""
