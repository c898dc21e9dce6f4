"""What a workdir's run has trained, for the commands that draw with it or hand it on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gadjax import assets
from gadjax.checkpoints.checkpoint import read_params
from gadjax.errors import InputError
from gadjax.formats.diffusers_folder import Component
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.formats.state_dict import check_keys, tensors_from_params
from gadjax.formats.weights import fingerprint
from gadjax.io.storage import check_access
from gadjax.models.params import merge_params, split_frozen
from gadjax.objectives import TERMS, build
from gadjax.types import Params


@dataclass(frozen=True)
class Trained:
    """Weights of a run, and how they are to be sampled.

    part: ema or student. fingerprint: of the teacher's transformer when the run was started.
    """

    workdir: Path
    step: int
    part: str
    params: Params
    config: dict[str, Any]
    fingerprint: str
    sampling: SamplingConfig

    @property
    def teacher(self) -> Path:
        return assets.resolve(self.config["teacher"])

    @property
    def is_few_step(self) -> bool:
        """Whether it is a student with timesteps of its own, rather than a teacher."""
        return self.sampling.timesteps is not None

    def full_params(self, teacher: Component) -> Params:
        """All parameters of the network: those that were trained, and those that never are.

        teacher: the network that the run was started with. Raises: InputError for another one.
        """
        keymap = teacher.keymap
        where = teacher.weights.folder
        found = fingerprint(tensors_from_params(teacher.params, keymap))
        if found != self.fingerprint:
            raise InputError(
                f"{where}: found weights with fingerprint {found}; expected {self.fingerprint}, "
                f"the teacher of {self.workdir}"
            )
        params = merge_params(self.params, split_frozen(teacher.params, teacher.frozen)[1])
        shapes = {k: v.shape for k, v in tensors_from_params(params, keymap, views=True)}
        check_keys(shapes, teacher.abstract, keymap, f"{self.workdir}, step {self.step}")
        return params


def is_workdir(path: Path) -> bool:
    return (path / "config.json").is_file() and (path / "checkpoints").is_dir()


def read_trained(workdir: Path, part: str = "ema", step: int | None = None) -> Trained:
    """Read one step's weights, by default the newest valid one's.

    Raises: InputError for a folder that is no workdir, or of a run that cannot have been, and as
    `read_params`.
    """
    check_access(workdir)
    if not is_workdir(workdir):
        found = "no such folder" if not workdir.is_dir() else "no config.json and checkpoints"
        raise InputError(f"{workdir}: found {found}; expected a workdir of gadjax train")
    step, params, meta = read_params(workdir / "checkpoints", part, step)
    config, teacher, sampling = parse_run_metadata(meta, f"{workdir}, step {step}")
    return Trained(workdir, step, part, params, config, teacher, sampling)


def parse_run_metadata(meta: Any, where: str) -> tuple[dict[str, Any], str, SamplingConfig]:
    """A checkpoint's config, the fingerprint of its teacher, and how its weights are sampled.

    Raises: InputError where it is not what `gadjax train` writes.
    """
    try:
        config, teacher = meta["config"], meta["teacher"]
        sampling = sampling_from_config(config)
        texts = teacher, config["teacher"], config["data"]["world"]
        numbers = *(sampling.timesteps or ()), config["guidance"]
        counts = sampling.length, sampling.steps, config["batch"]
        whole = all(isinstance(text, str) for text in texts)
        whole &= all(type(x) in (int, float) and abs(x) < 1e9 for x in numbers)
        whole &= all(type(n) is int and 0 < n < 2**31 for n in counts)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        whole = False
    if not whole:
        raise InputError(f"{where}: found another config or teacher; expected those of a run")
    return config, teacher, sampling


def sampling_from_config(config: dict[str, Any]) -> SamplingConfig:
    """How a run's weights are sampled: a student in its own steps, without guidance; what learns
    by plain denoising as teachers are."""
    timesteps = tuple(config["student"]["timesteps"])
    length = config["data"]["length"]
    needs = build(config["objective"], TERMS, timesteps).needs
    if needs.uses_teacher:
        return SamplingConfig(len(timesteps), timesteps, 1.0, length)
    return SamplingConfig(guidance=config["guidance"], length=length)
