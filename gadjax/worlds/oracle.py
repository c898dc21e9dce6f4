"""Oracle of the shapes world: attributes of an image, and residuals, by fitting the renderer.

No network is involved: an image is compared with the renderer's own coverage masks. With coverage c
an image is background + c * (ink - background), so both colours follow by least squares, and only
the shape, its centre and its radius are searched for: first over a bank of masks, then, shape by
shape, by Gauss-Newton steps with the colours projected out (variable projection; Golub and Pereyra,
1973, https://doi.org/10.1137/0710036).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gadjax.errors import InputError
from gadjax.worlds.shapes import (
    ATTRIBUTES,
    BACKGROUNDS,
    CELLS,
    CONTRASTING,
    INKS,
    POSITIONS,
    SHAPES,
    SIZE,
    SIZES,
    check_words,
    coverage,
    parse,
)

# Bank of masks: centres one pixel apart, radii a fifth apart; wider than the ranges of the world,
# so that shapes outside of them are fitted too.
_CENTRES = np.arange(4.0, SIZE - 3.0)
_RADII = (2.2, 2.65, 3.2, 3.8, 4.6, 5.5, 6.6)
_LIMITS = np.array([[2.0, 2.0, 1.5], [SIZE - 2.0, SIZE - 2.0, 8.0]])
_STEPS = 8
_BATCH = 256
# Borders midway between neighbouring words.
_CELL_BORDERS = [(low[1] + high[0]) / 2 for low, high in zip(CELLS, CELLS[1:], strict=False)]
_SIZE_BORDER = (SIZES["small"][1] + SIZES["large"][0]) / 2
_CELL_WORDS = {cell: word for word, cell in POSITIONS.items()}
# Side of the windows of residuals, in pixels: about that of a small shape.
_WINDOW = 7
# Between renders with a blur of 0.5 pixels and noise of 0.05 (1 in 9000 is above) and images that
# must not pass: empty ones, wrong colours, soft blobs (at least 0.22).
MAX_RESIDUAL = 0.2


@dataclass(frozen=True)
class Verdict:
    """Attributes and residuals of one image.

    shape, ink, background, position, size: always words of some scene; `residual` tells how well
      the image matches it.
    x, y, radius: in pixels.
    ink_rgb, background_rgb: fitted colours in [-1, 1].
    residual: difference from the scene in the NAMED colours, as a share of their contrast: the
      root mean square within the worst 7x7 window or, if larger, between fitted and named ink.
    fitted_residual: the former with the fitted colours, so independent of colour errors.
    shape_errors: root mean square difference over the image with every shape fitted, in the order
      of SHAPES, in the image's units.
    """

    shape: str
    ink: str
    background: str
    position: str
    size: str
    x: float
    y: float
    radius: float
    ink_rgb: tuple[float, float, float]
    background_rgb: tuple[float, float, float]
    residual: float
    fitted_residual: float
    shape_errors: tuple[float, ...]

    @property
    def words(self) -> dict[str, str]:
        """Words of the five attributes, by attribute."""
        names = ("size", "ink", "shape", "position", "background")
        return {name: getattr(self, name) for name in names}


@lru_cache(maxsize=len(SHAPES))
def _bank(shape: str) -> tuple[np.ndarray, np.ndarray]:
    """Bank of a shape: places (x, y, radius) [T, 3], centred unit masks [T, SIZE * SIZE]."""
    grid = np.meshgrid(_CENTRES, _CENTRES, _RADII, indexing="ij")
    places = np.stack(grid, axis=-1).reshape(-1, 3)
    masks = coverage(shape, *places.T).reshape(len(places), -1)
    masks -= masks.mean(1, keepdims=True)
    masks /= np.linalg.norm(masks, axis=1, keepdims=True)
    return places, masks


def _centred_coverage(shape: str, places: np.ndarray) -> np.ndarray:
    masks = coverage(shape, *places.T).reshape(len(places), -1)
    return masks - masks.mean(1, keepdims=True)


def _fit(shape: str, pixels: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """Fit the place of a shape by Gauss-Newton with the colours projected out.

    Args:
        shape: one of SHAPES.
        pixels: centred images [N, P, 3].
        axis: their projection on the first principal component of the colours [N, P].

    Returns:
        (x, y, radius) [N, 3].
    """
    places, masks = _bank(shape)
    place = places[np.argmax(np.abs(axis @ masks.T), axis=1)]
    best, best_left = place.copy(), np.full(len(pixels), np.inf)
    h = 0.1
    for step in range(_STEPS + 1):
        mask = _centred_coverage(shape, place)
        power = np.einsum("np,np->n", mask, mask) + 1e-6
        ink = np.einsum("np,npc->nc", mask, pixels) / power[:, None]
        # Squared error of the rank-one fit, up to the constant sum of squares of the image.
        left = -power * np.einsum("nc,nc->n", ink, ink)
        better = left < best_left
        best[better], best_left[better] = place[better], left[better]
        if step == _STEPS:
            return best
        # With the colours projected out, only the component along the fitted ink matters.
        along = np.einsum("npc,nc->np", pixels, ink)
        along /= np.einsum("nc,nc->n", ink, ink)[:, None] + 1e-9
        slopes = []
        for move in np.eye(3) * h:
            slope = _centred_coverage(shape, place + move) - _centred_coverage(shape, place - move)
            slope /= 2 * h
            slope -= mask * (np.einsum("np,np->n", mask, slope) / power)[:, None]
            slopes.append(slope)
        slopes = np.stack(slopes, axis=1)
        normal = np.einsum("nip,njp->nij", slopes, slopes) + 1e-2 * np.eye(3)
        gradient = np.einsum("nip,np->ni", slopes, along - mask)
        move = np.linalg.solve(normal, gradient[:, :, None])[:, :, 0]
        place = np.clip(place + np.clip(move, -0.75, 0.75), *_LIMITS)


def _residual(squares: np.ndarray) -> np.ndarray:
    """Root of the largest window mean of squared errors [N, SIZE * SIZE] -> [N]."""
    total = np.zeros((len(squares), SIZE + 1, SIZE + 1))
    total[:, 1:, 1:] = squares.reshape(-1, SIZE, SIZE).cumsum(1, dtype=np.float64).cumsum(2)
    rows = total[:, _WINDOW:] - total[:, :-_WINDOW]
    windows = rows[:, :, _WINDOW:] - rows[:, :, :-_WINDOW]
    return np.sqrt(np.maximum(windows.max((1, 2)), 0)) / _WINDOW


def _rms(colours: np.ndarray) -> np.ndarray:
    return np.sqrt((colours**2).mean(1))


def _squares(
    pixels: np.ndarray, mask: np.ndarray, ink: np.ndarray, background: np.ndarray
) -> np.ndarray:
    """Mean squared error over RGB: images [N, P, 3], mask [N, P], colours [N, 3] -> [N, P]."""
    background = background[:, None, :]
    errors = pixels - background - mask[:, :, None] * (ink[:, None, :] - background)
    return np.einsum("npc,npc->np", errors, errors) / 3


def _nearest_pairs(ink: np.ndarray, background: np.ndarray) -> tuple[list, np.ndarray, np.ndarray]:
    """Nearest named background of every fit, and the nearest ink that contrasts with it."""
    inks = np.array([INKS[i] for i, _ in CONTRASTING]) * 2 - 1
    backgrounds = np.array([BACKGROUNDS[b] for _, b in CONTRASTING]) * 2 - 1
    to_background = ((background[:, None] - backgrounds) ** 2).sum(-1)
    to_ink = ((ink[:, None] - inks) ** 2).sum(-1)
    nearest = to_background <= to_background.min(1, keepdims=True) + 1e-9
    chosen = np.where(nearest, to_ink, np.inf).argmin(1)
    return [CONTRASTING[i] for i in chosen], inks[chosen], backgrounds[chosen]


def _judge(images: np.ndarray) -> list[Verdict]:
    count = len(images)
    pixels = images.reshape(count, -1, 3)
    mean = pixels.mean(1)
    centred = pixels - mean[:, None, :]
    _, directions = np.linalg.eigh(np.einsum("npc,npd->ncd", centred, centred))
    axis = np.einsum("npc,nc->np", centred, directions[:, :, -1].astype(np.float32))
    fits = []
    for shape in SHAPES:
        places = _fit(shape, centred, axis)
        mask = coverage(shape, *places.T).reshape(count, -1)
        share = mask.mean(1, keepdims=True)
        power = np.einsum("np,np->n", mask - share, mask - share) + 1e-6
        contrast = np.einsum("np,npc->nc", mask - share, centred) / power[:, None]
        background = mean - share * contrast
        ink = background + contrast
        fits.append((places, mask, ink, background, _squares(pixels, mask, ink, background)))
    places, mask, ink, background, squares = (
        np.stack(parts, axis=1) for parts in zip(*fits, strict=True)
    )
    errors = np.sqrt(squares.mean(2))
    chosen = errors.argmin(1)
    rows = np.arange(count)
    place, mask = places[rows, chosen], mask[rows, chosen]
    ink, background = ink[rows, chosen], background[rows, chosen]
    names, named_ink, named_background = _nearest_pairs(ink, background)
    contrast = _rms(named_ink - named_background)
    form = _residual(_squares(pixels, mask, named_ink, named_background))
    named_residual = np.maximum(form, _rms(ink - named_ink)) / contrast
    fitted_residual = _residual(squares[rows, chosen]) / contrast
    cells = np.digitize(place[:, :2], _CELL_BORDERS)
    return [
        Verdict(
            shape=SHAPES[chosen[i]],
            ink=names[i][0],
            background=names[i][1],
            position=_CELL_WORDS[int(cells[i, 0]), int(cells[i, 1])],
            size="small" if place[i, 2] < _SIZE_BORDER else "large",
            x=float(place[i, 0]),
            y=float(place[i, 1]),
            radius=float(place[i, 2]),
            ink_rgb=tuple(ink[i].tolist()),
            background_rgb=tuple(background[i].tolist()),
            residual=float(named_residual[i]),
            fitted_residual=float(fitted_residual[i]),
            shape_errors=tuple(errors[i].tolist()),
        )
        for i in range(count)
    ]


def judge(images: np.ndarray) -> list[Verdict]:
    """Return the verdicts of N images [N, SIZE, SIZE, 3] in [-1, 1].

    Raises: InputError for another shape or for values that are not finite.
    """
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or images.shape[1:] != (SIZE, SIZE, 3):
        raise InputError(f"images: found shape {images.shape}; expected (N, {SIZE}, {SIZE}, 3)")
    if not np.isfinite(images).all():
        raise InputError("images: found values that are not finite; expected values in [-1, 1]")
    parts = (images[start : start + _BATCH] for start in range(0, len(images), _BATCH))
    return [verdict for part in parts for verdict in _judge(part)]


def words(images: np.ndarray, max_residual: float = MAX_RESIDUAL) -> np.ndarray:
    """Words of N images by attribute: [N, A] in the order of ATTRIBUTES; "" for a poor match.

    A match is poor above `max_residual`. Raises: InputError as `judge`.
    """
    none = [""] * len(ATTRIBUTES)
    rows = [
        [verdict.words[name] for name in ATTRIBUTES] if verdict.residual <= max_residual else none
        for verdict in judge(images)
    ]
    return np.array(rows, dtype=object).astype(str).reshape(-1, len(ATTRIBUTES))


def adheres(verdict: Verdict, expected: dict[str, str], max_residual: float = MAX_RESIDUAL) -> bool:
    """Return True if the image is one of the world and has all the `expected` attributes.

    Args:
        verdict: verdict of the image.
        expected: words by attribute, as of `parse`.
        max_residual: limit of the residual of an image of the world.

    Raises:
        InputError: words that no scene has.
    """
    check_words(expected, "expected")
    words = verdict.words
    return verdict.residual <= max_residual and all(words[key] == expected[key] for key in expected)


def adherence(
    images: np.ndarray, captions: Iterable[str], max_residual: float = MAX_RESIDUAL
) -> np.ndarray:
    """Prompt adherence: whether images show the attributes of their captions.

    Args:
        images: [N, SIZE, SIZE, 3] in [-1, 1].
        captions: N captions of the world.
        max_residual: as in `adheres`.

    Returns:
        bool [N].

    Raises:
        InputError: captions that are not of the world, or not N of them.
    """
    expected: Sequence[dict[str, str]] = [parse(text) for text in captions]
    if len(expected) != len(images):
        raise InputError(f"captions: found {len(expected)}; expected {len(images)}, one per image")
    pairs = zip(judge(images), expected, strict=True)
    return np.array([adheres(verdict, words, max_residual) for verdict, words in pairs], bool)
