"""Experiment trackers: TensorBoard, W&B, trackio; a failing tracker never stops a run."""

import contextlib
import importlib.util
import json
import netrc
import os
import tempfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

import numpy as np
from ml_collections import ConfigDict

from gadjax.errors import InputError
from gadjax.io.storage import is_remote, write_atomic
from gadjax.io.untrusted import read_json

IDS = "trackers.json"  # in the workdir: the run's id in every tracker
TENSORBOARD = "tensorboard"  # in the workdir: folder of event files
TIMEOUT_SECONDS = {"init_timeout": 30, "finish_timeout": 20}  # of Weights & Biases


class Tracker(Protocol):
    def write_scalars(self, step: int, scalars: dict[str, float]) -> None: ...
    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Write images by name: uint8 [N, H, W, 3]."""

    def close(self) -> None: ...


class WandB:
    """Weights & Biases; offline without an API key (`wandb sync` uploads later), never a prompt."""

    def __init__(self, workdir: Path, config: ConfigDict):
        import wandb

        mode = None  # from the user's environment
        if not _has_key() and os.environ.get("WANDB_MODE") != "disabled":
            mode = "offline"
        self.image = wandb.Image
        self.run = wandb.init(
            project=config.log.project,
            id=_run_id(workdir, "wandb"),
            name=workdir.name,
            dir=tempfile.gettempdir() if is_remote(workdir) else str(workdir),
            config=config.to_dict(),
            resume="allow",
            mode=mode,
            settings=TIMEOUT_SECONDS | {"console": "off"},
        )

    def write_scalars(self, step, scalars):
        self.run.log(scalars, step=step)

    def write_images(self, step, images):
        data = {name: [self.image(one) for one in array] for name, array in images.items()}
        self.run.log(data, step=step)

    def close(self):
        self.run.finish()


class Trackio:
    """trackio: a database in the user's cache folder, or where trackio's variables place it."""

    def __init__(self, workdir: Path, config: ConfigDict):
        import trackio

        self.image = trackio.Image
        self.run = trackio.init(
            project=config.log.project,
            name=f"{workdir.name}-{_run_id(workdir, 'trackio')}",
            config=config.to_dict(),
            resume="allow",
            embed=False,
        )

    def write_scalars(self, step, scalars):
        self.run.log(scalars, step=step)

    def write_images(self, step, images):
        for name, array in images.items():
            several = len(array) > 1
            named = {f"{name}/{i}" if several else name: one for i, one in enumerate(array)}
            self.run.log({key: self.image(one) for key, one in named.items()}, step=step)

    def close(self):
        self.run.finish()


def tensorboard(workdir: Path, config: ConfigDict) -> Tracker:
    import tensorflow  # clu's writers need it; seconds to import, so only here

    tensorflow.config.set_visible_devices([], "GPU")  # or it takes the memory
    from clu.metric_writers import SummaryWriter

    return SummaryWriter(str(workdir / TENSORBOARD))


SELECTABLE = {"wandb": WandB, "trackio": Trackio}


class Trackers:
    """All trackers of a run; an error of one is reported once and closes it, not the run."""

    def __init__(self, workdir: Path, config: ConfigDict, note: Callable[[str], None]):
        """Open the trackers of `log.trackers`, and TensorBoard if tensorflow is installed.

        Args:
            workdir: holds trackers.json and TensorBoard's event files.
            config: config of the run.
            note: prints a line about a tracker that failed.
        """
        self.note, self.open = note, {}
        makers = {name: SELECTABLE[name] for name in config.log.trackers}
        if importlib.util.find_spec("tensorflow") is not None:
            if is_remote(workdir):
                note("no TensorBoard: its files would be appended to, which an object store cannot")
            else:
                makers["tensorboard"] = tensorboard
        for name, make in makers.items():
            with self._close_on_error(name):
                self.open[name] = make(workdir, config)

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        self._call_all("write_scalars", step, scalars)

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        self._call_all("write_images", step, images)

    def close(self) -> None:
        self._call_all("close")
        self.open = {}

    def _call_all(self, method: str, *args: Any) -> None:
        for name, tracker in list(self.open.items()):
            with self._close_on_error(name):
                getattr(tracker, method)(*args)

    @contextlib.contextmanager
    def _close_on_error(self, name: str):
        try:
            yield
        except Exception as error:
            self.open.pop(name, None)
            text = " ".join(str(error).split())
            self.note(f"{name} stopped: {type(error).__name__}: {text}; the run goes on without it")


def check_trackers(names: Sequence[str]) -> None:
    """Check that the named trackers are known and installed. Raises: InputError."""
    for name in names:
        if name not in SELECTABLE:
            raise InputError(
                f"log.trackers: found {name!r}; expected some of {', '.join(SELECTABLE)}"
            )
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"log.trackers: found {name!r}, which is not installed; expected it (pip install "
                f"'gadjax[{name}]')"
            )


def _run_id(workdir: Path, tracker: str) -> str:
    """Id of the run in a tracker, the same for every start (trackers.json). Raises: OSError."""
    file = workdir / IDS
    names = {}
    with contextlib.suppress(InputError):
        names = read_json(file)
    if not isinstance(names.get(tracker), str):
        names[tracker] = uuid.uuid4().hex[:8]
        write_atomic(file, json.dumps(names) + "\n")
    return names[tracker]


def _has_key() -> bool:
    """Return True if Weights & Biases would log in without prompting for a key."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    for file in filter(None, [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(os.path.expanduser(file)).authenticators(host or ""):
                return True
    return False
