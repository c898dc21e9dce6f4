"""Plans of runs whose student starts at a LoRA and trains it on."""

import re
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from gadjax import assets
from gadjax.errors import InputError
from gadjax.formats.lora_names import layers_of
from gadjax.models.adapters import adaptable
from gadjax.pipelines.pipeline import abstract_pipeline
from gadjax.training.lora_start import read_adapters, read_factors


def start_at_lora(config: ConfigDict, path: Path, log: Callable[[str], None]) -> ConfigDict:
    """Config of the run that trains a LoRA of the teacher on.

    A config without a rank gets the largest of the file, and adapters of the kernels that the file
    has some for. Of the file its header is read, of the teacher its configurations.

    Args:
      config: training config; it is not changed.
      path: file or folder of the LoRA.
      log: called with a line of text.

    Raises: InputError as `read_adapters`, and for a student with another start.
    """
    config = ConfigDict(config)
    if not config.teacher:
        return config  # refused where the run is prepared
    if config.student.init != "teacher":
        raise InputError(
            f"--lora: found it with student.init {config.student.init!r}; expected one of them"
        )
    pipeline, _ = abstract_pipeline(assets.resolve(config.teacher))
    part = pipeline.folder.components[pipeline.backbone]
    factors, layers = read_factors(path, pipeline, "--lora", values=False), layers_of(part)
    config.student.init = str(path)
    lora = config.student.lora
    if not lora.rank:
        lora.rank = max(len(a) for a, _, _ in factors.values())
        paths = {layers[module].path for module in factors}
        if {name for name in adaptable(part.abstract) if re.search(lora.targets, name)} != paths:
            lora.targets = f"^({'|'.join(map(re.escape, sorted(paths)))})$"
    read_adapters(config, "student", pipeline, abstract=True)  # refuses what it does not adapt
    log(f"{path}: {len(factors)} modules; the student trains adapters of rank {lora.rank}")
    return config
