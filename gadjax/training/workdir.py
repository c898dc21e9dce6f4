"""Trained weights of a workdir, for the commands that sample with them or export them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gadjax import assets
from gadjax.checkpoints.restore import read_params
from gadjax.errors import InputError
from gadjax.formats.diffusers_folder import Component
from gadjax.formats.lora_header import is_lora
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.formats.state_dict import check_keys, tensors_from_params
from gadjax.formats.weights import fingerprint
from gadjax.io.storage import check_access
from gadjax.io.untrusted import is_count, is_number, is_text
from gadjax.models.adapters import Lora, adapters_from_arrays, merged
from gadjax.models.depth import COUNT, check_layers, keep_layers
from gadjax.models.params import merge_params, split_frozen
from gadjax.objectives import TERMS, Needs, build
from gadjax.training.lora import base_source, loras
from gadjax.training.partial import trained_patterns
from gadjax.types import Params


@dataclass(frozen=True)
class Trained:
    """Trained weights of a run with their sampling config.

    Attributes:
      workdir: the run's workdir.
      step: of the checkpoint.
      part: "ema", "student" or "critic".
      params: the trained parameters alone.
      config: the run's config, as JSON.
      fingerprint: of the backbone that `full_params` completes, when the run was started.
      sampling: sampling config of these weights.
      on_start: adapters, or the rest of a network trained in part, are on the student's start, a
        folder or workdir, not on the teacher.
    """

    workdir: Path
    step: int
    part: str
    params: Params
    config: dict[str, Any]
    fingerprint: str
    sampling: SamplingConfig
    on_start: bool = False

    @property
    def teacher(self) -> Path:
        return assets.resolve(self.config["teacher"])

    @property
    def base(self) -> Path:
        """Pipeline folder of the weights that the trained ones complete or adapt: the teacher's, or
        the student's start where that has adapters."""
        return assets.resolve(self.config["student"]["init"]) if self.on_start else self.teacher

    @property
    def is_few_step(self) -> bool:
        """True for a student with its own grid, False for a teacher trained by denoising."""
        return self.sampling.timesteps is not None

    @property
    def teacher_guidance(self) -> float | None:
        """Guidance of the teacher in training; None if the objective did not evaluate it."""
        return self.config["guidance"] if objective_needs(self.config).uses_teacher else None

    @property
    def lora(self) -> Lora | None:
        """Settings of the adapters of this part; None if whole weights are trained."""
        return loras(self.config).get(self._role)

    @property
    def layers(self) -> tuple[int, ...]:
        """The teacher's blocks that this part has; () for all, as a critic has."""
        student = self.config["student"]  # of older workdirs without layers
        return () if self._role == "critic" else tuple(student.get("layers", ()))

    @property
    def earlier_expert(self) -> str:
        """Source of the frozen network of the student's first steps; "" for none."""
        return "" if self._role == "critic" else self.config["student"].get("earlier_expert", "")

    @property
    def trained_steps(self) -> tuple[int, ...]:
        """First of the steps that this student trains, and the one after the last; () for all."""
        return tuple(self.config["student"].get("trained_steps", ()))

    @property
    def _role(self) -> str:
        return "critic" if self.part == "critic" else "student"

    @property
    def adapters(self) -> Params:
        """The adapters of this part. Raises: InputError for parameters that are none."""
        return adapters_from_arrays(self.params, self.lora.scale)

    def full_params(self, base: Component) -> Params:
        """All parameters of the network, the trained and the untrained ones.

        base: backbone of the folder `base`. Raises: InputError for another one than at the start.
        """
        self.check_base(base)
        base = shallow(base, self.layers)
        keymap = base.keymap
        params = self._complete(base)
        shapes = {k: v.shape for k, v in tensors_from_params(params, keymap, views=True)}
        check_keys(shapes, base.abstract, keymap, f"{self.workdir}, step {self.step}")
        return params

    def check_base(self, base: Component) -> None:
        """Check that the run was started with a network. Raises: InputError for another one."""
        identity = fingerprint(tensors_from_params(base.params, base.keymap))
        if identity != self.fingerprint:
            raise InputError(
                f"{base.weights.folder}: found weights with fingerprint {identity}; expected "
                f"{self.fingerprint}, with which the run in {self.workdir} was begun"
            )

    def _complete(self, base: Component) -> Params:
        """The trained parameters on those of the base; adapters are merged, in float32."""
        pattern = trained_patterns(self.config).get(self._role, "")
        if self.lora or pattern:
            self._check_critics_base()
        if self.lora is None:
            rest = split_frozen(base.params, base.frozen, (pattern,))[1]
            return merge_params(self.params, rest)
        try:
            return merged(base.params, self.adapters)
        except InputError as error:
            raise InputError(f"{self.workdir}, step {self.step}: {error}") from None

    def _check_critics_base(self) -> None:
        on = self.config["student"]["init"] if self.on_start else "teacher"
        if self._role == "critic" and (source := base_source(self.config, "critic")) != on:
            what = "adapters are" if self.lora else "frozen rest is"
            raise InputError(
                f"{self.workdir}: found a critic whose {what} on {source!r}; expected it on "
                f"{on!r}, as the student's"
            )


def shallow(base: Component, layers: tuple[int, ...]) -> Component:
    """A backbone with some of its blocks, in its configuration too; () for all.

    Raises: InputError for blocks that it does not have.
    """
    if not layers:
        return base
    check_layers(layers, base.spec, base.abstract)
    count = {COUNT: len(layers)}
    return replace(
        base,
        config=base.config | count,
        spec=replace(base.spec, **count),
        abstract=keep_layers(base.abstract, layers),
        params=base.params and keep_layers(base.params, layers),
    )


def is_workdir(path: Path) -> bool:
    """True for a folder with the config and checkpoints of `gadjax train`."""
    return (path / "config.json").is_file() and (path / "checkpoints").is_dir()


def is_source(init: str) -> bool:
    """True for a path from which a network may start."""
    path = assets.resolve(init) if init else None
    return path is not None and (path.is_dir() or is_lora(path))


def read_trained(workdir: Path, part: str = "ema", step: int | None = None) -> Trained:
    """Read the trained weights of a workdir.

    Args:
      workdir: workdir of `gadjax train`.
      part: "ema", "student" or "critic".
      step: of the checkpoint; None: the newest valid one.

    Raises: InputError for a folder that is no workdir, or whose metadata no run can have written;
      and as `read_params`.
    """
    check_access(workdir)
    if not is_workdir(workdir):
        state = "no such folder" if not workdir.is_dir() else "no config.json and checkpoints"
        raise InputError(f"{workdir}: found {state}; expected a workdir of gadjax train")
    step, params, meta = read_params(workdir / "checkpoints", part, step)
    config, teacher, sampling = parse_run_metadata(meta, f"{workdir}, step {step}")
    return Trained(workdir, step, part, params, config, teacher, sampling, "base" in meta)


def parse_run_metadata(meta: Any, where: str) -> tuple[dict[str, Any], str, SamplingConfig]:
    """Config, teacher fingerprint and sampling config from a checkpoint's metadata.

    Raises: InputError for metadata that `gadjax train` does not write.
    """
    try:
        config, teacher = meta["config"], meta.get("base", meta["teacher"])
        start = config["student"]["init"] if "base" in meta else ""
        sampling = sampling_from_config(config)
        trained_patterns(config)  # and of adapters
        texts = teacher, config["teacher"], config["data"]["world"], start, sampling.rollout
        expert = config["student"].get("earlier_expert", "")
        steps = config["student"].get("trained_steps", ())
        texts, layers = (*texts, expert), config["student"].get("layers", ())
        numbers = *(sampling.timesteps or ()), config["guidance"], sampling.guidance
        counts = sampling.length, sampling.steps, config["batch"]
        valid = all(map(is_text, texts)) and all(map(is_number, numbers))
        valid &= all(is_count(n, 1, 2**31 - 1) for n in counts)
        valid &= all(map(is_count, (*layers, *steps)))
        first, end = steps or (0, len(sampling.timesteps or ()) + 1)
        if steps or expert:
            valid &= (1 if expert else 0) <= first < end <= len(sampling.timesteps)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        valid = False
    if not valid:
        raise InputError(f"{where}: found another config or teacher; expected those of a run")
    return config, teacher, sampling


def sampling_from_config(config: dict[str, Any]) -> SamplingConfig:
    """Sampling config of a run's weights.

    A student is sampled on its own grid without guidance, or with the scale that is embedded in its
    training; a network trained by plain denoising like a teacher.
    """
    timesteps = tuple(config["student"]["timesteps"])
    length = config["data"]["length"]
    if objective_needs(config).is_few_step:
        student = config["student"]  # older workdirs do not have these two
        rollout, guidance = student.get("rollout", "ode"), student.get("guidance", 1.0)
        return SamplingConfig(len(timesteps), timesteps, guidance, length, rollout=rollout)
    return SamplingConfig(guidance=config["guidance"], length=length)


def objective_needs(config: dict[str, Any]) -> Needs:
    """Needs of a run's objective."""
    return build(config["objective"], TERMS, tuple(config["student"]["timesteps"])).needs
