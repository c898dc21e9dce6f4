"""Other places that a run is told to: TensorBoard, Weights & Biases, trackio. None can stop it."""

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

IDS = "trackers.json"  # under which name each knows the run, in the workdir
TENSORBOARD = "tensorboard"  # folder of its events in the workdir
WAIT = {"init_timeout": 30, "finish_timeout": 20}  # seconds until Weights & Biases is given up


class Tracker(Protocol):
    def write_scalars(self, step: int, scalars: dict[str, float]) -> None: ...
    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """uint8 [N, H, W, 3] by name."""

    def close(self) -> None: ...


class WandB:
    """Offline where no key is found, so that nothing is asked: `wandb sync` sends it later."""

    def __init__(self, workdir: Path, config: ConfigDict):
        import wandb

        mode = None  # as the user's environment says
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
            settings=WAIT | {"console": "off"},
        )

    def write_scalars(self, step, scalars):
        self.run.log(scalars, step=step)

    def write_images(self, step, images):
        found = {name: [self.image(one) for one in array] for name, array in images.items()}
        self.run.log(found, step=step)

    def close(self):
        self.run.finish()


class Trackio:
    """A database in the user's cache folder, or wherever trackio's own variables say."""

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
            found = {f"{name}/{i}" if several else name: one for i, one in enumerate(array)}
            self.run.log({key: self.image(one) for key, one in found.items()}, step=step)

    def close(self):
        self.run.finish()


def tensorboard(workdir: Path, config: ConfigDict) -> Tracker:
    import tensorflow  # clu's writers need it; seconds to import, so only here

    tensorflow.config.set_visible_devices([], "GPU")  # or it takes the memory
    from clu.metric_writers import SummaryWriter

    return SummaryWriter(str(workdir / TENSORBOARD))


ASKED = {"wandb": WandB, "trackio": Trackio}


class Trackers:
    """All of a run's. A fault of one is noted once and ends it, not the run."""

    def __init__(self, workdir: Path, config: ConfigDict, note: Callable[[str], None]):
        """note: is told of faults. TensorBoard is told where tensorflow is installed."""
        self.note, self.open = note, {}
        makers = {name: ASKED[name] for name in config.log.trackers}
        if importlib.util.find_spec("tensorflow") is not None:
            if is_remote(workdir):
                note("no TensorBoard: its files would be appended to, which an object store cannot")
            else:
                makers["tensorboard"] = tensorboard
        for name, make in makers.items():
            with self._surviving(name):
                self.open[name] = make(workdir, config)

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        self._tell("write_scalars", step, scalars)

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        self._tell("write_images", step, images)

    def close(self) -> None:
        self._tell("close")
        self.open = {}

    def _tell(self, method: str, *args: Any) -> None:
        for name, tracker in list(self.open.items()):
            with self._surviving(name):
                getattr(tracker, method)(*args)

    @contextlib.contextmanager
    def _surviving(self, name: str):
        try:
            yield
        except Exception as error:
            self.open.pop(name, None)
            text = " ".join(str(error).split())
            self.note(f"{name} stopped: {type(error).__name__}: {text}; the run goes on without it")


def check_trackers(names: Sequence[str]) -> None:
    """Raises: InputError for one that is unknown or not installed."""
    for name in names:
        if name not in ASKED:
            raise InputError(f"log.trackers: found {name!r}; expected some of {', '.join(ASKED)}")
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"log.trackers: found {name!r}, which is not installed; expected it (pip install "
                f"'gadjax[{name}]')"
            )


def _run_id(workdir: Path, tracker: str) -> str:
    """Under which the tracker knows the run, the same in every start. Raises: OSError."""
    file = workdir / IDS
    names = {}
    with contextlib.suppress(InputError):
        names = read_json(file)
    if not isinstance(names.get(tracker), str):
        names[tracker] = uuid.uuid4().hex[:8]
        write_atomic(file, json.dumps(names) + "\n")
    return names[tracker]


def _has_key() -> bool:
    """Whether Weights & Biases would log in without asking."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    for file in filter(None, [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(os.path.expanduser(file)).authenticators(host or ""):
                return True
    return False
