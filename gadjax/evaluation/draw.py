"""Sample many sets of pictures with one compiled program, and read them part by part."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from tqdm import tqdm

from gadjax.errors import InputError
from gadjax.evaluation.noises import ChainedNoises, Sets
from gadjax.io.image_grid import from_uint8, to_uint8
from gadjax.pipelines.model import Model
from gadjax.pipelines.sampling import draw_batches

KEPT_BYTES = 2 << 30  # of the pictures of all rows that stay in memory
PART = 256  # pictures that are held as floats at a time


def draw_sets(
    model: Model,
    sets: Sets,
    batch: int,
    bar: tqdm,
    observe: Callable[[int, np.ndarray], None],
    factors: Mapping[str, int],
) -> dict[str, np.ndarray]:
    """Draw every set of N prompts and noises, batch by batch, with one compiled program.

    Only one batch is in memory at its full size, beside the pictures that are kept.

    Args:
      model: pipeline, parameters and sampling settings.
      sets: prompts and noises by name.
      batch: pictures at a time.
      bar: progress in network evaluations.
      observe: called with the number of the first picture of a batch, counted over all sets, and
        the batch at its full size.
      factors: of the reduction of the pictures of a set that are kept, see `reduction`; the sets
        that it lacks are only observed.
    Returns: the kept pictures, uint8 [N, H, W, 3] by name.
    Raises: InputError for pictures that are not finite.
    """
    prompts = [prompt for prompts, _ in sets.values() for prompt in prompts]
    noises = ChainedNoises([noises for _, noises in sets.values()])
    ranges, start = set_ranges(sets), 0
    kept: dict[str, np.ndarray] = {}
    for images in draw_batches(
        model,
        prompts,
        noises,
        batch=batch,
        progress=lambda done: bar.update(done * model.evaluations),
    ):
        check_finite(model, images)
        observe(start, images)
        for name, here, there in overlaps(ranges, start, len(images)):
            if name in factors:
                part = to_uint8(reduce_pictures(images[here], factors[name]))
                if name not in kept:
                    kept[name] = np.empty((len(sets[name][0]), *part.shape[1:]), np.uint8)
                kept[name][there] = part
        start += len(images)
    return kept


def set_ranges(sets: Sets) -> dict[str, tuple[int, int]]:
    """Numbers of the first picture of each set and of the one behind its last, over all sets."""
    ends = np.cumsum([len(prompts) for prompts, _ in sets.values()]).tolist()
    return dict(zip(sets, zip([0, *ends], ends, strict=False), strict=True))


def overlaps(
    ranges: Mapping[str, tuple[int, int]], start: int, count: int
) -> Iterator[tuple[str, slice, slice]]:
    """Sets of which a batch has pictures: name, where they are in the batch, and in the set.

    Args:
      ranges: of `set_ranges`, or some of them.
      start: number of the batch's first picture.
      count: its pictures.
    """
    for name, (first, end) in ranges.items():
        begin, stop = max(first, start), min(end, start + count)
        if begin < stop:
            yield name, slice(begin - start, stop - start), slice(begin - first, stop - first)


def map_pictures(f: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
    """Map a function of pictures [N, H, W, 3] in [-1, 1] over uint8 pictures, PART at a time.

    Args:
      f: returns an array with N rows.
      images: pictures [..., H, W, 3].
    Returns: [..., *f's further axes].
    """
    flat = images.reshape(-1, *images.shape[-3:])
    parts = [f(from_uint8(flat[i : i + PART])) for i in range(0, len(flat), PART)]
    out = np.concatenate(parts)
    return out.reshape(*images.shape[:-3], *out.shape[1:])


def reduction(count: int, height: int, width: int) -> int:
    """Factor by which so many uint8 pictures are reduced to fit KEPT_BYTES: a power of two.

    It divides both sides, so that a reduced pixel is the mean of whole ones.
    """
    factor = 1
    while (
        count * height * width * 3 > KEPT_BYTES * factor**2
        and height % (2 * factor) == 0
        and width % (2 * factor) == 0
    ):
        factor *= 2
    return factor


def reduce_pictures(images_NHWC: np.ndarray, factor: int) -> np.ndarray:
    """Mean of every `factor` x `factor` pixels."""
    if factor == 1:
        return images_NHWC
    n, h, w, c = images_NHWC.shape
    blocks = images_NHWC.reshape(n, h // factor, factor, w // factor, factor, c)
    return blocks.mean((2, 4), dtype=np.float32)


def check_finite(model: Model, images: np.ndarray) -> None:
    """Check that all pictures are finite. Raises: InputError."""
    if not np.isfinite(images).all():
        raise InputError(f"{model.name}: found pictures that are not finite; expected finite ones")
