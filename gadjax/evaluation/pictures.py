"""Image grids of a report: the same noises through every model, one line per model."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from gadjax.evaluation.noise_control import ControlResults
from gadjax.evaluation.results import Evaluation
from gadjax.io.image_grid import grid

SHEET = 4096  # largest width of a grid, in pixels
SHOWN = 4, 4  # prompts, seeds of each prompt
MOVES, PATHS = 6, 4  # shown
ENLARGED = 96  # side, in pixels, to which small pictures are enlarged
MARK = (255, 140, 0)  # orange, which stands out from most pictures


def samples(evaluation: Evaluation, prompts: Sequence[str]) -> Image.Image:
    """Grid of some prompts at some seeds, with the same noise down each column."""
    side = evaluation.rows[0].images_PSHWC.shape[2]
    scale = _scale(side)
    seeds = min(SHOWN[1], evaluation.rows[0].images_PSHWC.shape[1])
    count = int(np.clip(SHEET // (side * scale * seeds), 1, min(SHOWN[0], len(prompts))))
    captions = [p if s == 0 else "" for p in prompts[:count] for s in range(seeds)]
    lines = []
    for row in evaluation.rows:
        images = row.images_PSHWC[:count, :seeds]
        lines.append((row.label, images.reshape(-1, *images.shape[2:])))
    return grid(lines, captions, scale)


def moves(control: ControlResults, labels: dict[str, str]) -> Image.Image:
    """Grid of layout targets: pictures before and after, with the target place marked."""
    side = control.rows["teacher"].images_CLHWC.shape[2]
    scale, targets = _scale(side), control.targets
    count = int(np.clip(SHEET // (2 * side * scale), 1, min(MOVES, len(targets.places))))
    places = control.library.world.layout.places
    captions = []
    for caption, word in zip(targets.captions[:count], targets.places, strict=False):
        captions += [control.library.captions[caption], f"moved to the {word}"]
    lines = []
    for key, label in labels.items():
        pairs = control.rows[key].layout_result.images_RNHWC[[0, -1], :count].swapaxes(0, 1)
        large = pairs.repeat(scale, axis=2).repeat(scale, axis=3)
        for pair, word in zip(large, targets.places, strict=False):
            _mark(pair, [scale * x for x in places[word]], reach=scale * side // 8)
        lines.append((label, large.reshape(-1, *large.shape[2:])))
    return grid(lines, captions, 1)


def _mark(images_NHWC: np.ndarray, place: Sequence[float], reach: int) -> None:
    """Draw the corners of a square around a place into the pictures, in place.

    Args:
      images_NHWC: uint8 pictures, changed in place.
      place: (x, y) in pixels.
      reach: half the side of the square, in pixels.
    """
    x, y = (round(p) for p in place)
    limit = images_NHWC.shape[1] - 1
    left, right = max(x - reach, 0), min(x + reach, limit)
    top, bottom = max(y - reach, 0), min(y + reach, limit)
    arm, thick = max(1, reach // 2), max(1, reach // 6)
    for edge in (slice(top, top + thick), slice(bottom - thick + 1, bottom + 1)):
        images_NHWC[:, edge, left : left + arm] = MARK
        images_NHWC[:, edge, right - arm + 1 : right + 1] = MARK
    for edge in (slice(left, left + thick), slice(right - thick + 1, right + 1)):
        images_NHWC[:, top : top + arm, edge] = MARK
        images_NHWC[:, bottom - arm + 1 : bottom + 1, edge] = MARK


def paths(control: ControlResults, labels: dict[str, str]) -> Image.Image:
    """Grid of interpolations between two noises, one block of lines for each path."""
    shape = control.rows["teacher"].paths_MKHWC.shape
    scale = _scale(shape[3])
    blocks = []
    for m, (caption, _, _) in enumerate(control.library.paths[:PATHS]):
        rows = [(label, control.rows[key].paths_MKHWC[m]) for key, label in labels.items()]
        texts = [control.library.captions[caption], *[""] * (shape[1] - 1)]
        blocks.append(grid(rows, texts, scale))
    sheet = Image.new("RGB", (blocks[0].width, sum(b.height for b in blocks)), "white")
    top = 0
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    return sheet


def _scale(side: int) -> int:
    return max(1, ENLARGED // side)
