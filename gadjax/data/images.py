"""Image folders with captions, in two common layouts.

  metadata.jsonl or metadata.csv   a record per image: file_name, and its caption in a column
  NAME.txt next to NAME.png        the caption, its lines joined by spaces

The first is `imagefolder` of Hugging Face's datasets: file_name is relative to the folder of the
metadata file, which may be the top folder or any below, and an image may have several captions. If
there is metadata, caption files are ignored, and images that it does not name are left out. Folders
are searched to any depth, symbolic links included, hidden ones excluded.
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

# Formats that are decoded in this process. Otherwise Pillow would run Ghostscript on a .png that is
# PostScript, and try dozens of decoders of rare formats.
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
MAX_PIXELS = 100_000_000  # 400 MB when decoded: a small file can claim any number
# Pillow's warnings about an image are either an error here, or irrelevant.
warnings.filterwarnings("ignore", module="PIL")
METADATA = ("metadata.jsonl", "metadata.csv")
NAME = "file_name"
BACKGROUND = "white"
THREADS = 8  # Pillow decodes and resizes without the interpreter's lock

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Pictures:
    """Captioned images of a folder, ordered by name; several captions in the metadata's order.

    names are paths below `folder`. background: colour under transparent pixels.
    """

    folder: Path
    names: tuple[str, ...]
    captions: tuple[str, ...]
    background: str = BACKGROUND

    def read(self, indices: Sequence[int], size: tuple[int, int]) -> np.ndarray:
        """Decode images by index, float32 [B, *size, 3] in [-1, 1]. Raises: as `read_image`."""
        paths = [self.folder / self.names[i] for i in indices]
        read = partial(read_image, size=size, background=self.background)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="pictures") as pool:
            return np.stack(list(pool.map(read, paths)))


def open_images(folder: Path, column: str = "prompt", background: str = BACKGROUND) -> Pictures:
    """List the images of a folder and read their captions; the log counts skipped files by kind.

    No image is opened: that would cost a round trip per image at every start, minutes to an hour
    for a million on network storage, and find only some of the faults that decoding finds.

    Args:
        folder: searched to any depth.
        column: column of the captions in the metadata.
        background: colour under transparent pixels.

    Raises:
        InputError: the folder is absent or has no images, the metadata cannot be read or names a
            missing file, an image has no caption, or the colour is not one.
    """
    folder = Path(folder)
    check_background(background)
    listing = _list_files(folder)
    if not listing.metadata:
        names = sorted(listing.pictures.values())
        pairs = [(name, _caption(folder, name, listing.texts)) for name in names]
    else:
        pairs = [
            pair for path in listing.metadata for pair in _records(folder, path, column, listing)
        ]
        unnamed = len(set(listing.pictures.values()) - {name for name, _ in pairs})
        listing.skipped["without metadata"] += unnamed
    pairs.sort(key=lambda pair: pair[0])
    if skipped := +listing.skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items()))
        log.warning("%s: %d captions of images; left out: %s", folder, len(pairs), kinds)
    names, captions = zip(*pairs, strict=True)
    return Pictures(folder, names, captions, background)


def check_background(colour: str) -> None:
    """Check a colour by its name or hexadecimal code. Raises: InputError."""
    try:
        ImageColor.getrgb(colour)
    except (ValueError, AttributeError):
        raise InputError(
            f"background: found {short_repr(colour)}; expected a colour, such as white or #808080"
        ) from None


@dataclass(frozen=True)
class _Listing:
    """Files of an image folder, by path below it.

    pictures, texts: NFC-normalised path -> path, of images and of .txt files; macOS writes accents
    as separate characters (NFD). metadata: metadata files. skipped: numbers of files by kind.
    """

    pictures: dict[str, str]
    texts: dict[str, str]
    metadata: list[PurePosixPath]
    skipped: Counter


def _normalized(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _list_files(folder: Path) -> _Listing:
    """List the files. Raises: InputError if the folder cannot be read, or has no images."""
    listing = _Listing({}, {}, [], Counter())
    kinds = {**dict.fromkeys(ENDINGS, listing.pictures), ".txt": listing.texts}
    for below, files in _walk(folder, listing.skipped):
        for name in files:
            path = below / name
            if name.startswith("."):
                continue
            if name in METADATA:
                listing.metadata.append(path)
                continue
            ending = path.suffix.lower()
            if ending not in kinds:
                listing.skipped[escape_nonprintable(ending) or "without suffix"] += 1
            elif kinds[ending].setdefault(_normalized(str(path)), str(path)) != str(path):
                raise InputError(
                    f"{folder / path}: found another file of that name, with its accents written "
                    "in another way; expected one"
                )
    if not listing.pictures:
        raise InputError(f"{folder}: found no pictures; expected {', '.join(ENDINGS)}")
    where = [path.parent for path in listing.metadata]
    if twice := next((place for place in where if where.count(place) > 1), None):
        raise InputError(f"{folder / twice}: found {' and '.join(METADATA)}; expected one of them")
    return listing


def _walk(folder: Path, skipped: Counter) -> Iterator[tuple[PurePosixPath, list[str]]]:
    """Yield (path below `folder`, file names) of every folder once, however many links lead there.

    A link may lead out of `folder`, for instance to the storage of the images, but not to a folder
    that contains it: a link to / would walk the whole disk.
    """

    def stop(error: OSError):
        raise InputError(f"{error.filename}: found {error.strerror}; expected a folder of pictures")

    real = Path(os.path.realpath(folder))
    parents = {(x.st_dev, x.st_ino) for x in (place.stat() for place in real.parents)}
    visited: set[tuple[int, int]] = set()
    waiting = [(folder, PurePosixPath())]
    while waiting:
        begin, name = waiting.pop(0)
        for where, folders, files in os.walk(begin, onerror=stop):
            status = os.stat(where)
            if (key := (status.st_dev, status.st_ino)) in visited | parents:
                skipped["links to parent folders or to folders read already"] += 1
                folders.clear()
                continue
            visited.add(key)
            below = name / PurePosixPath(Path(where).relative_to(begin).as_posix())
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            links = [inner for inner in folders if os.path.islink(os.path.join(where, inner))]
            waiting += [(Path(where, inner), below / inner) for inner in links]
            yield below, files


def _records(
    folder: Path, metadata: PurePosixPath, column: str, listing: _Listing
) -> Iterator[tuple[str, str]]:
    """Yield (path of an image below `folder`, caption) of a metadata file."""
    for name, caption in read_records(folder / metadata, (NAME, column)):
        picture = listing.pictures.get(_normalized(str(metadata.parent / name)))
        if picture is None:
            raise InputError(
                f"{folder / metadata}: found {NAME} {short_repr(name)}; expected one of the "
                f"images in {folder / metadata.parent}"
            )
        yield picture, caption


def _caption(folder: Path, name: str, texts: dict[str, str]) -> str:
    sidecar = PurePosixPath(name).with_suffix(".txt")
    text = texts.get(_normalized(str(sidecar)))
    if text is None:
        raise InputError(
            f"{folder / name}: found no {sidecar.name} next to it; expected its caption there, or "
            f"{' or '.join(METADATA)} in {folder}"
        )
    path = folder / text
    caption = " ".join(read_prompts(path))
    check_prompt(caption, str(path))
    return caption


def read_image(path: Path, size: tuple[int, int], background: str = BACKGROUND) -> np.ndarray:
    """Decode an image to RGB at `size`, scaled and centre-cropped.

    It is rotated by its EXIF orientation, composed over `background` if it is transparent,
    converted to RGB, scaled (Lanczos) to just cover `size`, and cropped evenly on both sides. Of a
    file with several images the first is read.

    Args:
        path: file in one of FORMATS.
        size: (height, width) of the result.
        background: colour under transparent pixels.

    Returns:
        float32 [*size, 3] in [-1, 1].

    Raises:
        InputError: the file cannot be decoded completely, is in none of FORMATS, or has more than
            MAX_PIXELS.
    """
    with open_file(path, "a picture") as file:
        try:
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS}")
                image = ImageOps.exif_transpose(image)
                if image.mode[0] in "IF":  # Pillow would clip them to 8 bits instead of scaling
                    raise ValueError(f"pixels of mode {image.mode}")
                if image.has_transparency_data:  # hidden colours differ by program
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
                image = ImageOps.fit(image.convert("RGB"), size[::-1], Image.Resampling.LANCZOS)
        except Exception as error:  # a damaged file raises many types
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"{path}: found a picture that cannot be read ({reason}); expected a whole one of "
                "8 bits a channel"
            ) from error
    return np.asarray(image, np.float32) / 127.5 - 1
