"""Folders of pictures as outside scripts take them: GenEval, T2I-CompBench, DPG-Bench, HPSv2, FID.

Read in the scripts themselves: github.com/djghosh13/geneval (evaluation/evaluate_images.py),
Karine-Huang/T2I-CompBench (BLIPvqa_eval), TencentQQGYLab/ELLA (dpg_bench) and tgxs002/HPSv2
(hpsv2/evaluation.py). Their prompt lists come from their repositories.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gadjax.data.prompts import BOM, read_prompts, read_records
from gadjax.errors import InputError, check_choice, short_repr
from gadjax.io.image_grid import save_png
from gadjax.io.untrusted import is_safe_filename, open_file, parse_json

HPS_STYLES = ("anime", "concept-art", "paintings", "photo")
JPEG_QUALITY = 95
CELLS = 4  # of a grid of DPG-Bench


@dataclass
class Layout:
    """Writer of the pictures of one run.

    Attributes:
      prompts: P prompts.
      names: (prompt, number of the picture) -> path in the folder.
      files: further files, path -> text.
      grid: pictures of a prompt that make one file, 2 x 2; 1 for a file each.
    """

    prompts: list[str]
    names: Callable[[int, int], str]
    files: dict[str, str] = field(default_factory=dict)
    grid: int = 1
    _cells: list[np.ndarray] = field(default_factory=list)

    def check_size(self, height: int, width: int) -> None:
        """Check the size of the pictures. Raises: InputError."""
        if self.grid > 1 and height != width:
            raise InputError(
                f"--layout: found pictures of {height} x {width}; expected square ones, which the "
                "script cuts from a grid"
            )

    def save(self, folder: Path, p: int, n: int, image_HWC: np.ndarray) -> str:
        """Write picture n (uint8) of prompt p; returns its path in the folder.

        Pictures of a grid are written with its last one.
        """
        name = self.names(p, n)
        if self.grid > 1:
            self._cells.append(image_HWC)
            if len(self._cells) < self.grid:
                return name
            a, b, c, d = self._cells
            image_HWC, self._cells = np.vstack([np.hstack([a, b]), np.hstack([c, d])]), []
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(image_HWC)
        if path.suffix == ".jpg":
            image.save(path, quality=JPEG_QUALITY, subsampling=0)
        else:
            save_png(image, path)
        return name

    def save_files(self, folder: Path) -> None:
        """Write the files beside the pictures."""
        for name, text in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def open_layout(name: str, prompts: Path, per_prompt: int) -> Layout:
    """Layout by name, for the prompts of a file.

    Args:
      name: a key of LAYOUTS.
      prompts: the prompt file, with the columns that the layout needs.
      per_prompt: pictures of each prompt.

    Raises: InputError for another name, for prompts that the layout cannot hold, and for another
      number of pictures where the script reads a fixed one.
    """
    check_choice("--layout", name, LAYOUTS)
    layout = LAYOUTS[name](prompts, per_prompt)
    if layout.grid > 1 and per_prompt != layout.grid:
        raise InputError(
            f"--per-prompt: found {per_prompt}; expected {layout.grid}, which {name} reads as one "
            "file of 2 x 2"
        )
    return layout


def _geneval(path: Path, per_prompt: int) -> Layout:
    """00000/metadata.jsonl, one object of GenEval's evaluation_metadata.jsonl, and samples/."""
    prompts = read_prompts(path)
    records = _json_lines(path)
    for number, record in enumerate(records, 1):
        # The keys that its script reads without a default.
        if not isinstance(record.get("tag"), str) or not isinstance(record.get("include"), list):
            raise InputError(
                f"{path}:{number}: found no tag and include; expected a line of GenEval's "
                "evaluation_metadata.jsonl"
            )
    files = {
        f"images/{p:05d}/metadata.jsonl": json.dumps(record) + "\n"
        for p, record in enumerate(records)
    }
    return Layout(prompts, lambda p, n: f"images/{p:05d}/samples/{n:04d}.png", files)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a .jsonl whose prompts `read_prompts` has read."""
    if path.suffix.lower() != ".jsonl":
        raise InputError(f"{path}: found another suffix; expected .jsonl, as GenEval has it")
    with open_file(path, "a prompt file") as file:
        lines = [line.removeprefix(BOM).strip() for line in file.read().split(b"\n")]
    return [parse_json(line) for line in lines if line]


def _compbench(path: Path, per_prompt: int) -> Layout:
    """samples/PROMPT_000000.png; the number runs over all pictures of a category."""
    prompts = read_prompts(path)
    longest = f"_{len(prompts) * per_prompt:06d}.png"
    for number, prompt in enumerate(prompts, 1):
        if "_" in prompt or not is_safe_filename(prompt + longest):
            raise InputError(
                f"{path}: found prompt {number}, {short_repr(prompt)}; expected one that is a file "
                "name without an underscore, as T2I-CompBench reads the prompt from it"
            )

    def name(p: int, n: int) -> str:
        return f"samples/{prompts[p]}_{p * per_prompt + n:06d}.png"

    return Layout(prompts, name)


def _dpg(path: Path, per_prompt: int) -> Layout:
    """images/ID.png, a grid of four; the column `id` is the name of DPG-Bench's prompt file."""
    ids, prompts = _columns(path, "id", "DPG-Bench's item_id", ".")
    return Layout(prompts, lambda p, n: f"images/{ids[p]}.png", grid=CELLS)


def _hpsv2(path: Path, per_prompt: int) -> Layout:
    """images/STYLE/00000.jpg; the column `style` is one of its four, each in its own order."""
    styles, prompts = _columns(path, "style", "a style of HPSv2", repeated=True)
    numbers, counts = [], dict.fromkeys(HPS_STYLES, 0)
    for number, style in enumerate(styles, 1):
        check_choice(f"{path}: prompt {number}, style", style, HPS_STYLES)
        numbers.append(counts[style])
        counts[style] += 1
    if per_prompt != 1:
        raise InputError(f"--per-prompt: found {per_prompt}; expected 1, as HPSv2 reads one")
    return Layout(prompts, lambda p, n: f"images/{styles[p]}/{numbers[p]:05d}.jpg")


def _columns(
    path: Path, column: str, meaning: str, forbidden: str = "", *, repeated: bool = False
) -> tuple[list[str], list[str]]:
    """Values of a column that become file names, and the prompts. Raises: InputError."""
    if path.suffix.lower() == ".txt":
        raise InputError(
            f"{path}: found a .txt; expected a .jsonl or .csv with {column} ({meaning})"
        )
    records = read_records(path, [column, "prompt"])
    values = [value for value, _ in records]
    for number, value in enumerate(values, 1):
        if not is_safe_filename(f"{value}.png") or any(c in value for c in forbidden):
            raise InputError(
                f"{path}: found {column} {short_repr(value)} of prompt {number}; expected {meaning}"
            )
    if not repeated and len(set(values)) < len(values):
        raise InputError(f"{path}: found a repeated {column}; expected different ones")
    return values, [prompt for _, prompt in records]


def _flat(path: Path, per_prompt: int) -> Layout:
    """images/00000-0.png: pytorch-fid, torch-fidelity, clean-fid, dgm-eval, CMMD."""
    return Layout(read_prompts(path), lambda p, n: f"images/{p:05d}-{n}.png")


def _pairs(path: Path, per_prompt: int) -> Layout:
    """pairs.jsonl with path and prompt, for a runner of ImageReward, HPSv3 or others."""
    prompts = read_prompts(path)
    lines: Sequence[str] = [
        json.dumps({"path": f"images/{p:05d}-{n}.png", "prompt": prompt}) + "\n"
        for p, prompt in enumerate(prompts)
        for n in range(per_prompt)
    ]
    files = {"pairs.jsonl": "".join(lines)}
    return Layout(prompts, lambda p, n: f"images/{p:05d}-{n}.png", files)


def _plain(path: Path, per_prompt: int) -> Layout:
    """00000-0.png, of every prompt and number."""
    return Layout(read_prompts(path), lambda p, n: f"{p:05d}-{n}.png")


LAYOUTS: dict[str, Callable[[Path, int], Layout]] = {
    "plain": _plain,
    "geneval": _geneval,
    "t2i-compbench": _compbench,
    "dpg": _dpg,
    "hpsv2": _hpsv2,
    "flat": _flat,
    "pairs": _pairs,
}
