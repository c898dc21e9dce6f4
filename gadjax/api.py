"""Python API: load, sample, distill and save; the commands call the same functions."""

import json
import math
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gadjax.assets import resolve
from gadjax.diffusion.experts import Experts
from gadjax.errors import InputError, RunStopped, check_choice
from gadjax.formats.diffusers_folder import PipelineFolder
from gadjax.formats.lora_file import parse_lora_flag
from gadjax.formats.orbax_folder import open_folder
from gadjax.formats.sampling_config import SamplingConfig, read_sampling
from gadjax.formats.state_dict import tensors_from_params
from gadjax.formats.weights import fingerprint
from gadjax.io.atomic import restore_replaced
from gadjax.io.image_grid import to_uint8
from gadjax.io.storage import as_path, is_remote
from gadjax.models.params import cast
from gadjax.objectives import TERMS, Term, as_config
from gadjax.pipelines.adapted import Weighted, merge_loras
from gadjax.pipelines.known_students import (
    PUBLISHED_STUDENTS,
    published_loras,
    published_student,
)
from gadjax.pipelines.model import Model as PipelineModel
from gadjax.pipelines.pipeline import load_pipeline, make_pipeline, resized
from gadjax.pipelines.sampling import draw, initial_noise
from gadjax.runtime.settings import pinned_jax_config
from gadjax.training.checks import compute_dtype
from gadjax.training.config import changed_config, default_config
from gadjax.training.export import export
from gadjax.training.loop import train
from gadjax.training.networks import with_earlier_expert
from gadjax.training.workdir import Trained, is_workdir, read_trained
from gadjax.types import Params


@dataclass(frozen=True, repr=False)
class Model(PipelineModel):
    """A pipeline with its parameters and sampling settings.

    trained: the training run of the backbone's weights; None if they are a pipeline folder's.
    loras: LoRA files that are merged into the weights, with the weight of each.
    """

    trained: Trained | None = None
    loras: tuple[tuple[Path, float], ...] = ()

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the backbone's weights as stored, whatever dtype they compute in."""
        folder = self.pipeline.folder
        params, _ = _stored_params(folder, self.trained, self.loras)
        keymap = folder.components[folder.backbone].keymap
        return fingerprint(tensors_from_params(params[folder.backbone], keymap))

    def __repr__(self) -> str:
        sampling = self.sampling
        return f"<{self.name}: {sampling.steps} steps, guidance {sampling.guidance:g}>"


@pinned_jax_config()
def load(
    name: str | Path,
    *,
    dtype: str = "float32",
    variant: str | None = None,
    student_preset: str | None = None,
    teacher: str | Path | None = None,
    lora: Sequence[str | Path] = (),
) -> Model:
    """Load a model from a pipeline folder, a workdir of `gadjax train`, or a bundled asset.

    Args:
        name: a pipeline folder (diffusers' or gadjax's own), a workdir (its EMA weights; gs:// as
            well), or "asset:NAME".
        dtype: compute dtype of the networks.
        variant: variant of the weight files, such as fp16.
        student_preset: sampling settings of a published student, by its name in
            gadjax.pipelines.known_students.PUBLISHED_STUDENTS, if the folder has none; refused
            for a student's workdir, which has its own.
        teacher: teacher folder of a workdir's run, if it has moved since.
        lora: LoRA files, or folders of `gadjax export --lora`, of diffusers or of PEFT; FILE:WEIGHT
            multiplies one. They are merged in float32. A few-step student's brings its timesteps;
            a published one is recognised by its file's name.

    Raises:
        InputError: the input is missing, damaged or inconsistent.
    """
    if student_preset is not None:
        check_choice("student_preset", student_preset, PUBLISHED_STUDENTS)
    files = [parse_lora_flag(str(text)) for text in lora]
    loras, student_preset = published_loras(files, student_preset)
    compute, remote = compute_dtype(dtype), is_remote(name)
    source = as_path(name, "model") if remote else resolve(str(name))
    trained = read_trained(source) if remote or is_workdir(source) else None
    if student_preset is not None and trained and trained.is_few_step:
        raise InputError(
            f"student_preset: found {student_preset} for {name}, a workdir whose student has steps "
            "of its own; expected none, and no LoRA of a published student"
        )
    if teacher is not None and trained is None:
        raise InputError(f"teacher: found {teacher} for {name}, which is no workdir; expected none")
    folder = source
    if trained:
        if loras and (trained.layers or trained.earlier_expert):
            what = f"a student of {len(trained.layers)} layers" if trained.layers else "experts"
            raise InputError(
                f"lora: found {loras[0][0]} for {name}, {what}; expected none, as LoRAs are of one "
                "network of the teacher's layers"
            )
        folder = trained.base if teacher is None else resolve(str(teacher))
        restore_replaced(folder)
        if not folder.is_dir():
            raise InputError(
                f"{folder}: found no such folder; expected the teacher of {name} (--teacher, or of "
                "a student that is evaluated --student-teacher, gives its new place)"
            )
    pipeline, _ = load_pipeline(folder, dtype=compute, variant=variant)
    params, sampling = _stored_params(pipeline.folder, trained, loras)
    if trained:
        sampling = trained.sampling
    elif sampling is None:
        sampling = read_sampling(source, pipeline.sampling)
    if student_preset is not None:
        pipeline, sampling = published_student(student_preset, pipeline)
    backbone = pipeline.backbone
    params[backbone], _ = with_earlier_expert(trained, params[backbone], pipeline)
    return Model(str(name), pipeline, cast(params, compute), sampling, trained, loras)


def _stored_params(
    folder: PipelineFolder, trained: Trained | None, loras: Weighted
) -> tuple[dict[str, Params], SamplingConfig | None]:
    """Parameters by network in the dtype of their files, and sampling settings of the LoRAs.

    Args:
        folder: the pipeline, with parameters.
        trained: run of the backbone's weights.
        loras: files that are merged.
    """
    params = {name: part.params for name, part in folder.components.items()}
    if trained:
        params[folder.backbone] = trained.full_params(folder.components[folder.backbone])
    return merge_loras(folder, params, loras)


@pinned_jax_config()
def with_sampling(
    model: Model,
    steps: int | None = None,
    guidance: float | None = None,
    negative: str | None = None,
    size: tuple[int, int] | None = None,
    nasa: float = 0.0,
) -> Model:
    """Return the model with other sampling settings; None keeps the model's own.

    Args:
        model: not changed.
        steps: number of sampling steps.
        guidance: scale of classifier-free guidance.
        negative: negative prompt.
        size: image size (height, width) in pixels.
        nasa: factor with which the negative prompt's attention is subtracted, without guidance.

    Raises:
        InputError: steps for a student with timesteps of its own, a guidance that is not finite, a
            negative prompt without guidance or NASA, NASA beside guidance, without a negative
            prompt or in a family that has no cross-attention, or a size that the networks do not
            support.
    """
    sampling = model.sampling
    if steps is not None and sampling.timesteps is not None:
        raise InputError(
            f"steps: found {steps}; expected none, because this student was trained for the "
            f"timesteps {', '.join(f'{t:g}' for t in sampling.timesteps)}"
        )
    if guidance is not None and not math.isfinite(guidance):
        raise InputError(f"guidance: found {guidance}; expected a finite number")
    changes = {"steps": steps, "guidance": guidance, "negative": negative}
    changes = {key: value for key, value in changes.items() if value is not None}
    model = replace(model, sampling=replace(sampling, **changes))
    if nasa:
        check_nasa(model, nasa, negative)
        model = replace(model, sampling=replace(model.sampling, nasa=nasa))
    elif negative is not None and not model.guided:
        raise InputError(
            f"negative: found {negative!r}; expected none, because this model samples without "
            "classifier-free guidance"
        )
    if size is None:
        return model
    return replace(model, pipeline=resized(model.pipeline, size, model.sampling.length))


def check_nasa(model: Model, nasa: float, negative: str | None) -> None:
    """Check that a negative prompt's attention can be subtracted. Raises: InputError."""
    if not math.isfinite(nasa):
        raise InputError(f"nasa: found {nasa}; expected a finite number")
    if negative is None:
        raise InputError(f"nasa: found {nasa:g} without a negative prompt; expected the two")
    if model.guided:
        raise InputError(
            f"nasa: found {nasa:g} and guidance {model.sampling.guidance:g}; expected a model that "
            "samples without classifier-free guidance (guidance 1)"
        )
    if isinstance(model.params[model.pipeline.backbone], Experts):
        raise InputError(f"nasa: found {nasa:g} for {model.name}, experts; expected one network")
    if model.pipeline.denoiser.text_kv is None:
        kind = model.pipeline.folder.components[model.pipeline.backbone].family.class_names[0]
        raise InputError(
            f"nasa: found {nasa:g} for a {kind}, whose prompt and picture attend jointly; expected "
            "a PixArt, a SANA or a U-Net, which have cross-attention"
        )


@pinned_jax_config()
def sample(
    model: Model,
    prompts: str | Sequence[str],
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    negative: str | None = None,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Sample one image per prompt.

    Image i starts from noise i of the seed, whatever the model: images of a student and of its
    teacher can be compared one by one.

    Args:
        model: of `load` or `distill`.
        prompts: one prompt, or N of them.
        seed: seed of the initial noise, 0 to 2^64 - 1.
        steps, guidance, negative, size: as in `with_sampling`.

    Returns:
        Images, uint8 [N, H, W, 3].

    Raises:
        InputError: settings that the model does not support.
        RunStopped: the images are not finite.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    model = with_sampling(model, steps, guidance, negative, size)
    noise = initial_noise(seed, len(prompts), model.pipeline.latent)
    images = draw(model, prompts, noise)
    if not np.isfinite(images).all():
        raise RunStopped(f"{model.name}: found images that are not finite")
    return to_uint8(images)


@pinned_jax_config()
def distill(
    teacher: Model | str | Path,
    objective: Term | Mapping[str, Mapping[str, Any]],
    prompts: str | Path | Sequence[str] | None,
    *,
    steps: int = 4,
    timesteps: Sequence[float] | None = None,
    updates: int = 1000,
    workdir: str | Path | None = None,
    **changes,
) -> Model:
    """Distil a few-step student of `teacher`, and return it with its EMA weights.

    An interrupt saves and ends the training; the student is then the one trained so far.

    Args:
        teacher: a model of `load` with the weights of its folder, or a pipeline folder.
        objective: a term, a weighted sum of terms, or the `objective` of a config.
        prompts: prompts, or a file of prompts; None if `data` names another source.
        steps: number of sampling steps of the student.
        timesteps: where the student's steps start, in place of `steps`; by default those of the
            teacher's scheduler for this number of steps.
        updates: number of training steps (the config's `steps`).
        workdir: kept, as the one of `gadjax train`; a second call resumes it. None: a temporary
            folder.
        **changes: other keys of a config, such as batch=64 or optim={"lr": 1e-4}.

    Raises:
        InputError: bad input, before any training.
        RunStopped: as `gadjax train`.
    """
    source = _teacher_folder(teacher)
    pipeline = make_pipeline(open_folder(source, components=()))
    sampling = read_sampling(source, pipeline.sampling)
    if timesteps is None:
        timesteps = pipeline.sampler.times(steps)[:-1].tolist()
    config = default_config()
    config.teacher, config.steps, config.guidance = str(source), updates, sampling.guidance
    config.objective = as_config(objective, TERMS)
    config.student.update(steps=len(timesteps), timesteps=tuple(timesteps))
    if pipeline.denoiser.guidance_embedded:
        config.student.guidance = sampling.guidance
    config.data.length = sampling.length
    with _run_folder(workdir) as run:
        if workdir is None:  # only the last checkpoint is read
            config.checkpoint.every, config.preview.every = updates, 0
        if prompts is not None:
            config.data.prompts = _prompt_file(prompts, run)
        train(changed_config(config, changes), run)
        name = f"student of {source.name}" if workdir is None else str(workdir)
        return replace(load(run), name=name)


@pinned_jax_config()
def save(
    model: Model, out: str | Path, *, report: str | Path | None = None, overwrite: bool = False
) -> dict[str, Any] | None:
    """Export a distilled model as a complete diffusers pipeline folder, as `gadjax export` does.

    Args:
        model: a trained model.
        out: new folder.
        report: report.json of `gadjax evaluate`, for the model card.
        overwrite: replace an earlier export.

    Returns:
        Result of the parity check against diffusers; None if diffusers is not installed.

    Raises:
        InputError: the model was not trained, or as gadjax.training.export.export.
    """
    if model.trained is None:
        raise InputError(f"{model.name}: found a folder's own weights; expected trained ones")
    if model.loras:
        raise InputError(f"{model.name}: found it with a LoRA; expected the trained weights alone")
    teacher, report = model.pipeline.folder.path, report and Path(report)
    return export(model.trained, Path(out), teacher=teacher, report=report, overwrite=overwrite)


def _teacher_folder(teacher: Model | str | Path) -> Path:
    if not isinstance(teacher, Model):
        return resolve(str(teacher))
    if teacher.trained is not None:
        raise InputError(
            f"teacher: found {teacher.name}, which was distilled; expected a folder (gadjax.save)"
        )
    if teacher.loras:
        raise InputError(
            f"teacher: found {teacher.name} with a LoRA; expected a folder (gadjax convert --lora)"
        )
    return teacher.pipeline.folder.path


@contextmanager
def _run_folder(workdir: str | Path | None):
    if workdir is not None:
        yield as_path(workdir, "workdir")
        return
    with tempfile.TemporaryDirectory(prefix="gadjax-") as folder:
        yield Path(folder) / "run"


def _prompt_file(prompts: str | Path | Sequence[str], run: Path) -> str:
    """Path of the prompt file; prompts given as texts are written to one next to the run.

    Its name has a checksum of the prompts, so that resuming the run with other prompts is refused.
    """
    if isinstance(prompts, str | Path):
        return str(prompts)
    if is_remote(run):
        raise InputError(
            f"prompts: found texts; expected a prompt file, since {run} is in an object store"
        )
    text = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    path = run.with_name(f"{run.name}-prompts-{zlib.crc32(text.encode()):08x}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)
