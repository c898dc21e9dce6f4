"""Load, sample, distil and save in Python. The commands call the same functions."""

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
from gadjax.errors import InputError, RunStopped
from gadjax.formats.orbax_folder import open_folder
from gadjax.formats.sampling_config import read_sampling
from gadjax.formats.state_dict import tensors_from_params
from gadjax.formats.weights import fingerprint
from gadjax.io.atomic import restore_replaced
from gadjax.io.image_grid import to_uint8
from gadjax.io.storage import as_path, is_remote
from gadjax.models.params import cast
from gadjax.objectives import TERMS, Term, as_config
from gadjax.pipelines.known_students import published_student
from gadjax.pipelines.model import Model as Drawn
from gadjax.pipelines.pipeline import load_pipeline, make_pipeline, resized
from gadjax.pipelines.sampling import draw, initial_noise
from gadjax.runtime.settings import pinned_jax_config
from gadjax.training.checks import compute_dtype
from gadjax.training.config import changed_config, default_config
from gadjax.training.export import export
from gadjax.training.loop import train
from gadjax.training.workdir import Trained, is_workdir, read_trained


@dataclass(frozen=True, repr=False)
class Model(Drawn):
    """Networks with their parameters, and how pictures are drawn with them.

    trained: the run that the transformer's weights come from; None where they are a folder's.
    """

    trained: Trained | None = None

    @property
    def fingerprint(self) -> str:
        """Of the transformer's weights as they were read, whatever they compute in."""
        part = self.pipeline.folder.components[self.pipeline.backbone]
        params = self.trained.full_params(part) if self.trained else part.params
        return fingerprint(tensors_from_params(params, part.keymap))

    def __repr__(self) -> str:
        sampling = self.sampling
        return f"<{self.name}: {sampling.steps} steps, guidance {sampling.guidance:g}>"


@pinned_jax_config()
def load(
    name: str | Path,
    *,
    dtype: str = "float32",
    variant: str | None = None,
    recipe: str | None = None,
    teacher: str | Path | None = None,
) -> Model:
    """Read a pipeline folder (diffusers' or gadjax's own), a workdir of `gadjax train` (its moving
    average; gs:// as well), or "asset:NAME" of what is bundled.

    dtype: that networks compute in. variant: of the weights' files, such as fp16. recipe: how it is
    sampled, by a name of gadjax.pipelines.known_students.PUBLISHED_STUDENTS, where the folder does not say so
    itself. teacher: of a workdir's run, if its folder has moved since.
    Raises: InputError for whatever is wrong with it.
    """
    compute, remote = compute_dtype(dtype), is_remote(name)
    source = as_path(name, "model") if remote else resolve(str(name))
    trained = read_trained(source) if remote or is_workdir(source) else None
    if teacher is not None and trained is None:
        raise InputError(f"teacher: found {teacher} for {name}, which is no workdir; expected none")
    folder = source
    if trained:
        folder = trained.teacher if teacher is None else resolve(str(teacher))
        restore_replaced(folder)
        if not folder.is_dir():
            raise InputError(
                f"{folder}: found no such folder; expected the teacher of {name} (--teacher, or of "
                "a student that is evaluated --student-teacher, says where it is now)"
            )
    pipeline, params = load_pipeline(folder, dtype=compute, variant=variant)
    sampling = trained.sampling if trained else read_sampling(source, pipeline.sampling)
    if trained:
        params[pipeline.backbone] = trained.full_params(
            pipeline.folder.components[pipeline.backbone]
        )
    if recipe is not None:
        pipeline, sampling = published_student(recipe, pipeline)
    return Model(str(name), pipeline, cast(params, compute), sampling, trained)


@pinned_jax_config()
def with_sampling(
    model: Model,
    steps: int | None = None,
    guidance: float | None = None,
    negative: str | None = None,
    size: tuple[int, int] | None = None,
) -> Model:
    """The model with other steps, guidance, negative prompt or size of pictures (height, width in
    pixels); None for its own.

    Raises: InputError for steps of a student that has timesteps, guidance that is no number, a
    negative prompt where there is no guidance, and a size that the networks cannot take.
    """
    sampling = model.sampling
    if steps is not None and sampling.timesteps is not None:
        raise InputError(
            f"steps: found {steps}; expected none, because this student was trained for the "
            f"timesteps {', '.join(f'{t:g}' for t in sampling.timesteps)}"
        )
    if guidance is not None and not math.isfinite(guidance):
        raise InputError(f"guidance: found {guidance}; expected a finite number")
    asked = {"steps": steps, "guidance": guidance, "negative": negative}
    asked = {key: value for key, value in asked.items() if value is not None}
    model = replace(model, sampling=replace(sampling, **asked))
    if negative is not None and not model.guided:
        raise InputError(
            f"negative: found {negative!r}; expected none, because this model draws without "
            "classifier-free guidance"
        )
    return model if size is None else replace(model, pipeline=resized(model.pipeline, size))


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
    """One picture for each prompt: uint8 [N, H, W, 3].

    Picture i starts from noise i of the seed, whatever the model: those of a student and of its
    teacher are comparable one by one. steps, guidance, negative, size (height, width in pixels):
    the model's own where None.
    Raises: InputError for steps that the model cannot take, RunStopped for pictures that are not
    finite.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    model = with_sampling(model, steps, guidance, negative, size)
    noise = initial_noise(seed, len(prompts), model.pipeline.latent)
    images = draw(model.pipeline, model.params, model.sampling, prompts, noise)
    if not np.isfinite(images).all():
        raise RunStopped(f"{model.name}: found pictures that are not finite")
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
    """Train a student of `teacher` that draws in `steps` steps, and return its moving average.

    objective: a term or a weighted sum of terms, or what a config says of one.
    prompts: texts, or a file of them; None where `data` names another source.
    timesteps: that the student's steps start from; by default those of the teacher's scheduler in
      so many steps.
    workdir: to be kept, as of `gadjax train`; called again it resumes.
    changes: other keys of a config, such as batch=64 or optim={"lr": 1e-4}.
    An interrupt saves and ends the training; what is returned is then as far as it came.
    Raises: InputError for bad input before any training, RunStopped as `gadjax train`.
    """
    source = _source(teacher)
    pipeline = make_pipeline(open_folder(source, components=()))
    recipe = read_sampling(source, pipeline.sampling)
    if timesteps is None:
        timesteps = pipeline.sampler.times(steps)[:-1].tolist()
    config = default_config()
    config.teacher, config.steps, config.guidance = str(source), updates, recipe.guidance
    config.objective = as_config(objective, TERMS)
    config.student.update(steps=len(timesteps), timesteps=tuple(timesteps))
    config.data.length = recipe.length
    with _folder(workdir) as run:
        if workdir is None:  # nothing of it is kept but the end
            config.checkpoint.every, config.preview.every = updates, 0
        if prompts is not None:
            config.data.prompts = _prompts(prompts, run)
        train(changed_config(config, changes), run)
        name = f"student of {source.name}" if workdir is None else str(workdir)
        return replace(load(run), name=name)


@pinned_jax_config()
def save(
    model: Model, out: str | Path, *, report: str | Path | None = None, overwrite: bool = False
) -> dict[str, Any] | None:
    """Write what was distilled as a complete diffusers folder, as `gadjax export` does.

    report: report.json of `gadjax evaluate`, for the card.
    Returns: what drawing with diffusers gave, None where diffusers is not installed.
    Raises: InputError for a model that was not trained, and as gadjax.training.export.export.
    """
    if model.trained is None:
        raise InputError(f"{model.name}: found a folder's own weights; expected trained ones")
    teacher, report = model.pipeline.folder.path, report and Path(report)
    return export(model.trained, Path(out), teacher=teacher, report=report, overwrite=overwrite)


def _source(teacher: Model | str | Path) -> Path:
    if not isinstance(teacher, Model):
        return resolve(str(teacher))
    if teacher.trained is not None:
        raise InputError(
            f"teacher: found {teacher.name}, which was distilled; expected a folder (gadjax.save)"
        )
    return teacher.pipeline.folder.path


@contextmanager
def _folder(workdir: str | Path | None):
    if workdir is not None:
        yield as_path(workdir, "workdir")
        return
    with tempfile.TemporaryDirectory(prefix="gadjax-") as folder:
        yield Path(folder) / "run"


def _prompts(prompts: str | Path | Sequence[str], run: Path) -> str:
    """A file of them. Texts get one beside the run, named after what they say, so that a run which
    is resumed with others is refused."""
    if isinstance(prompts, str | Path):
        return str(prompts)
    if is_remote(run):
        raise InputError(f"prompts: found texts; expected a file of them beside {run}")
    text = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    path = run.with_name(f"{run.name}-prompts-{zlib.crc32(text.encode()):08x}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)
