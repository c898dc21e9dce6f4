"""Folders of captioned pictures, in the two layouts that people have.

  metadata.jsonl or metadata.csv   a record for each picture: file_name, and its caption in a column
  NAME.txt beside NAME.png         the caption, its lines joined by spaces

The first is `imagefolder` of Hugging Face's datasets: file_name is below the metadata's own folder,
which may be the top or any below, and a picture may have several captions. Where there is metadata,
captions beside pictures are leftovers, and pictures that it does not name are left out. Folders are
searched to any depth, also behind links; hidden ones are not.
"""

import logging
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageColor, ImageOps

from gadjax.data.prompts import check_prompt, read_prompts, read_records
from gadjax.errors import InputError, escape_nonprintable, short_repr
from gadjax.io.untrusted import open_file

# Those of pictures that are decoded here, in the process: Pillow would also run Ghostscript on a
# .png that is PostScript, and tries dozens of readers of rare formats.
SUFFIXES = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".jpx", ".j2k"),
    "AVIF": (".avif",),
}
FORMATS = tuple(SUFFIXES)
ENDINGS = tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
MOST = 100_000_000  # pixels of a picture, 400 MB when decoded: a small file can claim any number
# What is wrong with a picture is an error here, or nothing.
warnings.filterwarnings("ignore", module="PIL")
METADATA = ("metadata.jsonl", "metadata.csv")
NAME = "file_name"
BACKGROUND = "white"
THREADS = 8  # Pillow decodes and resizes without the interpreter's lock

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Pictures:
    """Names below `folder` and captions, ordered by name, of one caption by that of the file.

    background: the colour under what is transparent.
    """

    folder: Path
    names: tuple[str, ...]
    captions: tuple[str, ...]
    background: str = BACKGROUND

    def read(self, which: Sequence[int], size: tuple[int, int]) -> np.ndarray:
        """Pictures by their numbers, float32 [B, *size, 3] in [-1, 1]. Raises: as `read_image`."""
        paths = [self.folder / self.names[i] for i in which]
        read = partial(read_image, size=size, background=self.background)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="pictures") as pool:
            return np.stack(list(pool.map(read, paths)))


def open_images(folder: Path, column: str = "prompt", background: str = BACKGROUND) -> Pictures:
    """List a folder's pictures and read their captions. What is left out is counted in the log.

    No picture is opened: that would cost a round trip each at every start, minutes to an hour for
    a million on network storage, and show only some of what decoding them shows.
    Raises: InputError for a folder that is absent or without pictures, metadata that cannot be
    read or name what is not there, a picture without a caption, a colour that is none.
    """
    folder = Path(folder)
    check_background(background)
    found = _listed(folder)
    if not found.metadata:
        names = sorted(found.pictures.values())
        pairs = [(name, _caption(folder, name, found.texts)) for name in names]
    else:
        pairs = [pair for path in found.metadata for pair in _records(folder, path, column, found)]
        unnamed = len(set(found.pictures.values()) - {name for name, _ in pairs})
        found.left["without metadata"] += unnamed
    pairs.sort(key=lambda pair: pair[0])
    if left := +found.left:
        said = ", ".join(f"{count} {kind}" for kind, count in sorted(left.items()))
        log.warning("%s: %d captions of pictures; left out: %s", folder, len(pairs), said)
    names, captions = zip(*pairs, strict=True)
    return Pictures(folder, names, captions, background)


def check_background(colour: str) -> None:
    """Raises: InputError."""
    try:
        ImageColor.getrgb(colour)
    except (ValueError, AttributeError):
        raise InputError(
            f"background: found {short_repr(colour)}; expected a colour, such as white or #808080"
        ) from None


@dataclass(frozen=True)
class _Listing:
    """pictures, texts: composed name -> name, below the folder, of pictures and of .txt files: what
    a Mac has written has its accents as characters of their own. left: how many by kind."""

    pictures: dict[str, str]
    texts: dict[str, str]
    metadata: list[PurePosixPath]
    left: Counter


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _listed(folder: Path) -> _Listing:
    """Raises: InputError for a folder that cannot be read, or has no pictures."""
    found = _Listing({}, {}, [], Counter())
    kinds = {**dict.fromkeys(ENDINGS, found.pictures), ".txt": found.texts}
    for below, files in _walk(folder, found.left):
        for name in files:
            path = below / name
            if name.startswith("."):
                continue
            if name in METADATA:
                found.metadata.append(path)
                continue
            ending = path.suffix.lower()
            if ending not in kinds:
                found.left[escape_nonprintable(ending) or "without suffix"] += 1
            elif kinds[ending].setdefault(_composed(str(path)), str(path)) != str(path):
                raise InputError(
                    f"{folder / path}: found another file of that name, with its accents written "
                    "in another way; expected one"
                )
    if not found.pictures:
        raise InputError(f"{folder}: found no pictures; expected {', '.join(ENDINGS)}")
    where = [path.parent for path in found.metadata]
    if twice := next((place for place in where if where.count(place) > 1), None):
        raise InputError(f"{folder / twice}: found {' and '.join(METADATA)}; expected one of them")
    return found


def _walk(folder: Path, left: Counter) -> Iterator[tuple[PurePosixPath, list[str]]]:
    """Path below `folder`, names of files: of every folder once, however many links lead there.

    A link may lead out of `folder`, as to where pictures are stored, but not to what is around it:
    a link to / would be a walk through the whole disk.
    """

    def stop(error: OSError):
        raise InputError(f"{error.filename}: found {error.strerror}; expected a folder of pictures")

    real = Path(os.path.realpath(folder))
    around = {(x.st_dev, x.st_ino) for x in (place.stat() for place in real.parents)}
    seen: set[tuple[int, int]] = set()
    waiting = [(folder, PurePosixPath())]
    while waiting:
        begin, name = waiting.pop(0)
        for where, folders, files in os.walk(begin, onerror=stop):
            status = os.stat(where)
            if (key := (status.st_dev, status.st_ino)) in seen | around:
                left["links to folders around it or read already"] += 1
                folders.clear()
                continue
            seen.add(key)
            below = name / PurePosixPath(Path(where).relative_to(begin).as_posix())
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            links = [inner for inner in folders if os.path.islink(os.path.join(where, inner))]
            waiting += [(Path(where, inner), below / inner) for inner in links]
            yield below, files


def _records(
    folder: Path, metadata: PurePosixPath, column: str, found: _Listing
) -> Iterator[tuple[str, str]]:
    """(a picture's name below `folder`, caption)."""
    for name, caption in read_records(folder / metadata, (NAME, column)):
        picture = found.pictures.get(_composed(str(metadata.parent / name)))
        if picture is None:
            raise InputError(
                f"{folder / metadata}: found {NAME} {short_repr(name)}; expected one of the pictures in "
                f"{folder / metadata.parent}"
            )
        yield picture, caption


def _caption(folder: Path, name: str, texts: dict[str, str]) -> str:
    beside = PurePosixPath(name).with_suffix(".txt")
    found = texts.get(_composed(str(beside)))
    if found is None:
        raise InputError(
            f"{folder / name}: found no {beside.name} beside it; expected its caption there, or "
            f"{' or '.join(METADATA)} in {folder}"
        )
    path = folder / found
    caption = " ".join(read_prompts(path))
    check_prompt(caption, str(path))
    return caption


def read_image(path: Path, size: tuple[int, int], background: str = BACKGROUND) -> np.ndarray:
    """The middle of a picture at `size` (height, width): float32 [*size, 3] in [-1, 1].

    It is turned as its camera says, laid on `background` where it is transparent, made RGB, scaled
    (Lanczos) until it just covers `size`, and what is over is cut off evenly on both sides. Of
    several in one file it is the first.
    Raises: InputError naming a file that cannot be decoded whole, is of none of FORMATS, or has
    more than 100 million pixels.
    """
    with open_file(path, "a picture") as file:
        try:
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MOST:
                    raise ValueError(f"{image.width} x {image.height} pixels; at most {MOST}")
                image = ImageOps.exif_transpose(image)
                if image.mode[0] in "IF":  # Pillow would clip them to 8 bits instead of scaling
                    raise ValueError(f"pixels of mode {image.mode}")
                if image.has_transparency_data:  # what is hidden below differs by program
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
                image = ImageOps.fit(image.convert("RGB"), size[::-1], Image.Resampling.LANCZOS)
        except Exception as error:  # a damaged file fails in many ways
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"{path}: found a picture that cannot be read ({reason}); expected a whole one of "
                "8 bits a channel"
            ) from error
    return np.asarray(image, np.float32) / 127.5 - 1
