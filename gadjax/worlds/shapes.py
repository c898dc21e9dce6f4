"""Synthetic dataset of captioned images (the shapes world): one flat shape on a flat background.

Every image is 32x32 and rendered from an analytic signed distance, so that position and size of the
shape are continuous and exactly known, as in dSprites (Matthey et al., 2017,
https://github.com/google-deepmind/dsprites-dataset). Captions name any subset of five attributes;
`parse` is the inverse. Needs numpy only.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from gadjax.errors import InputError

SIZE = 32
SHAPES = ("circle", "square", "triangle", "cross")
# RGB in [0, 1]; images hold 2 * RGB - 1.
INKS = {
    "red": (0.88, 0.10, 0.10),
    "green": (0.10, 0.62, 0.15),
    "blue": (0.10, 0.25, 0.95),
    "yellow": (0.98, 0.86, 0.08),
    "purple": (0.60, 0.08, 0.75),
    "black": (0.03, 0.03, 0.03),
    "white": (0.98, 0.98, 0.98),
}
BACKGROUNDS = {
    "white": (0.98, 0.98, 0.98),
    "grey": (0.62, 0.62, 0.62),
    "black": (0.03, 0.03, 0.03),
}
# Ranges of a centre along one axis, in pixels. The gaps keep neighbouring words apart, and the
# outer ends leave room for the largest radius.
CELLS = ((7.0, 9.5), (14.75, 17.25), (22.5, 25.0))
# Position word -> (column, row), indices into CELLS; rows run downwards.
POSITIONS = {
    "top left": (0, 0),
    "top": (1, 0),
    "top right": (2, 0),
    "left": (0, 1),
    "centre": (1, 1),
    "right": (2, 1),
    "bottom left": (0, 2),
    "bottom": (1, 2),
    "bottom right": (2, 2),
}
# Size word -> range of the radius (half of the shape's width and height) in pixels.
SIZES = {"small": (2.8, 3.6), "large": (5.4, 6.4)}
ATTRIBUTES = {
    "size": tuple(SIZES),
    "ink": tuple(INKS),
    "shape": SHAPES,
    "position": tuple(POSITIONS),
    "background": tuple(BACKGROUNDS),
}
# Smallest distance between ink and background in unit RGB.
MIN_CONTRAST = 0.5
# Half the thickness of a cross's arms, as a share of its radius.
CROSS_ARM = 0.36
# Probability that a caption names all attributes; otherwise that it names any one of them.
ALL_MENTIONED = 0.3
MENTION_CHANCE = 0.5

CONTRASTING = tuple(
    (ink, background)
    for ink, background in product(INKS, BACKGROUNDS)
    if np.linalg.norm(np.subtract(INKS[ink], BACKGROUNDS[background])) >= MIN_CONTRAST
)


@dataclass(frozen=True)
class Scene:
    """Scene of one image: five words, and the shape's centre and radius in pixels.

    `x` runs to the right and `y` downwards from the top left corner of the image.
    """

    shape: str
    ink: str
    background: str
    position: str
    size: str
    x: float
    y: float
    radius: float


def check_words(words: dict[str, str], source: str) -> None:
    """Check that some scene has all of `words`. Raises: InputError naming `source`."""
    for attribute, word in words.items():
        if attribute not in ATTRIBUTES:
            raise InputError(
                f"{source}: found attribute {attribute!r}; expected one of {', '.join(ATTRIBUTES)}"
            )
        if word not in ATTRIBUTES[attribute]:
            expected = ", ".join(ATTRIBUTES[attribute])
            raise InputError(f"{source}: found {attribute} {word!r}; expected one of {expected}")
    if not _pairs(words):
        raise InputError(
            f"{source}: found {words['ink']} on {words['background']}; "
            "expected an ink that contrasts with its background"
        )


def _pairs(words: dict[str, str]) -> list[tuple[str, str]]:
    return [
        (ink, background)
        for ink, background in CONTRASTING
        if words.get("ink", ink) == ink and words.get("background", background) == background
    ]


def _pick(options: Sequence, uniform: float):
    return options[int(uniform * len(options))]


def sample_scene(rng: np.random.Generator, **fixed: str) -> Scene:
    """Sample a scene; the attributes in `fixed` have the given words.

    Always takes seven uniform numbers from `rng`. Raises: InputError for words that no scene has.
    """
    pairs = CONTRASTING
    if fixed:
        check_words(fixed, "sample_scene")
        pairs = _pairs(fixed)
    uniform = rng.random(7).tolist()
    ink, background = _pick(pairs, uniform[0])
    shape = fixed.get("shape") or _pick(SHAPES, uniform[1])
    position = fixed.get("position") or _pick(ATTRIBUTES["position"], uniform[2])
    size = fixed.get("size") or _pick(ATTRIBUTES["size"], uniform[3])
    column, row = POSITIONS[position]
    spans = (CELLS[column], CELLS[row], SIZES[size])
    x, y, radius = (
        low + (high - low) * u for (low, high), u in zip(spans, uniform[4:], strict=True)
    )
    return Scene(shape, ink, background, position, size, x, y, radius)


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Coverage masks: the share of every pixel that lies inside the shape, antialiased.

    The shape fills the square of half-side `radius` around its centre.

    Args:
        shape: one of SHAPES.
        x, y: centres in pixels [N].
        radius: radii in pixels [N].

    Returns:
        float32 [N, SIZE, SIZE] in [0, 1].

    Raises:
        InputError: unknown shape.
    """
    middles = np.arange(SIZE, dtype=np.float32) + np.float32(0.5)
    x, y, radius = (np.asarray(value, np.float32).reshape(-1, 1, 1) for value in (x, y, radius))
    dx, dy = np.abs(middles[None, None, :] - x), middles[None, :, None] - y
    if shape == "circle":
        distance = np.sqrt(dx * dx + dy * dy) - radius
    elif shape == "square":
        distance = np.maximum(dx - radius, np.abs(dy) - radius)
    elif shape == "triangle":
        # Two sides rise from the ends of the base to the middle of the top; the bounding square
        # gives the base and keeps the corners from running out along their mitres.
        sides = dx * np.float32(2 / 5**0.5) - (dy + radius) * np.float32(5**-0.5)
        distance = np.maximum(np.maximum(sides, dx - radius), np.abs(dy) - radius)
    elif shape == "cross":
        dy, arm = np.abs(dy), radius * np.float32(CROSS_ARM)
        distance = np.minimum(np.maximum(dx - radius, dy - arm), np.maximum(dx - arm, dy - radius))
    else:
        raise InputError(f"coverage: found shape {shape!r}; expected one of {', '.join(SHAPES)}")
    return np.clip(np.float32(0.5) - distance, 0, 1)


def _colours(table: dict[str, tuple[float, float, float]], words: Iterable[str]) -> np.ndarray:
    return np.array([table[word] for word in words], np.float32).reshape(-1, 1, 1, 3) * 2 - 1


def render_batch(scenes: Sequence[Scene]) -> np.ndarray:
    """Render N scenes to images, float32 [N, SIZE, SIZE, 3] in [-1, 1]."""
    place = np.array([(s.x, s.y, s.radius) for s in scenes], np.float32).reshape(-1, 3)
    names = np.array([s.shape for s in scenes])
    covered = np.empty((len(scenes), SIZE, SIZE, 1), np.float32)
    for shape in set(names.tolist()):
        chosen = names == shape
        covered[chosen, :, :, 0] = coverage(shape, *place[chosen].T)
    background = _colours(BACKGROUNDS, (s.background for s in scenes))
    images = covered * (_colours(INKS, (s.ink for s in scenes)) - background)
    images += background
    return images


def render(scene: Scene) -> np.ndarray:
    """Render one scene to an image, float32 [SIZE, SIZE, 3] in [-1, 1]."""
    return render_batch([scene])[0]


def caption(scene: Scene, mentioned: Sequence[str]) -> str:
    """Caption of a scene: an English phrase with exactly the attributes in `mentioned`.

    Raises: InputError for an unknown attribute.
    """
    for attribute in mentioned:
        if attribute not in ATTRIBUTES:
            expected = ", ".join(ATTRIBUTES)
            raise InputError(f"caption: found {attribute!r}; expected attributes among {expected}")
    words = ["a"]
    words += [getattr(scene, attribute) for attribute in ("size", "ink") if attribute in mentioned]
    words.append(scene.shape if "shape" in mentioned else "shape")
    if "position" in mentioned:
        words += ["at the", scene.position]
    if "background" in mentioned:
        words += ["on a", scene.background, "background"]
    return " ".join(words)


_CHOICE = {attribute: "|".join(words) for attribute, words in ATTRIBUTES.items()}
_CAPTION = re.compile(
    rf"a(?: (?P<size>{_CHOICE['size']}))?(?: (?P<ink>{_CHOICE['ink']}))?"
    rf" (?P<shape>{_CHOICE['shape']}|shape)(?: at the (?P<position>{_CHOICE['position']}))?"
    rf"(?: on a (?P<background>{_CHOICE['background']}) background)?"
)


def parse(caption: str) -> dict[str, str]:
    """Parse a caption to the words of its attributes: the inverse of `caption`.

    Raises: InputError for text that is not a caption of this world.
    """
    match = _CAPTION.fullmatch(caption)
    if match is None:
        raise InputError(
            f"caption: found {caption!r}; expected the form "
            "'a large blue square at the top left on a grey background', any of it left out"
        )
    words = {key: word for key, word in match.groupdict().items() if word not in (None, "shape")}
    check_words(words, "caption")
    return words


def sample_mentioned(rng: np.random.Generator) -> tuple[str, ...]:
    """Sample the attributes of a caption: sometimes all, sometimes none, mostly some."""
    uniform = rng.random(1 + len(ATTRIBUTES)).tolist()
    chance = 1.0 if uniform[0] < ALL_MENTIONED else MENTION_CHANCE
    return tuple(name for name, u in zip(ATTRIBUTES, uniform[1:], strict=True) if u < chance)


def vocabulary() -> tuple[str, ...]:
    """Vocabulary of the captions, sorted."""
    phrases = [word for words in ATTRIBUTES.values() for word in words]
    return tuple(
        sorted(set(" ".join(phrases).split()) | set("a shape at the on background".split()))
    )


def _sample(seed: int, index: int) -> tuple[str, Scene]:
    rng = np.random.default_rng([seed, index])
    scene = sample_scene(rng)
    return caption(scene, sample_mentioned(rng)), scene


def sample(seed: int, index: int) -> tuple[np.ndarray, str, Scene]:
    """Image [SIZE, SIZE, 3], caption and scene: a function of seed and index only."""
    text, scene = _sample(seed, index)
    return render(scene), text, scene


def sample_batch(seed: int, indices: Iterable[int]) -> tuple[np.ndarray, list[str], list[Scene]]:
    """Return `sample` of N indices: images [N, SIZE, SIZE, 3], captions and scenes."""
    drawn = [_sample(seed, int(index)) for index in indices]
    scenes = [scene for _, scene in drawn]
    return render_batch(scenes), [text for text, _ in drawn], scenes


def full_prompts(count: int, seed: int) -> list[str]:
    """Captions that name every attribute, in random order; repeats come after all have occurred."""
    every = [
        Scene(shape, ink, background, position, size, 0.0, 0.0, 0.0)
        for shape, (ink, background), position, size in product(
            SHAPES, CONTRASTING, POSITIONS, SIZES
        )
    ]
    order = np.random.default_rng(seed).permutation(len(every))
    return [caption(every[order[i % len(every)]], tuple(ATTRIBUTES)) for i in range(count)]


def partial_prompts(count: int, seed: int) -> list[str]:
    """Captions that leave at least one attribute open, in the frequencies of `sample`."""
    rng = np.random.default_rng(seed)
    prompts = []
    while len(prompts) < count:
        scene, mentioned = sample_scene(rng), sample_mentioned(rng)
        if len(mentioned) < len(ATTRIBUTES):
            prompts.append(caption(scene, mentioned))
    return prompts
