"""Folders of captioned pictures, in the two layouts that people have.

  metadata.jsonl or metadata.csv   a record for each picture: file_name, and its caption in a column
  NAME.txt beside NAME.png         the caption, its lines joined by spaces

The first is `imagefolder` of Hugging Face's datasets; pictures that it does not name are left out,
and a picture may have several captions. Folders are searched to any depth; hidden ones are not.
"""

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

from gadjax.data.prompts import check_prompt, read_prompts, read_records
from gadjax.errors import InputError
from gadjax.reading import open_file
from gadjax.shown import shown

# Pillow would also run Ghostscript on a .png that is PostScript, and tries dozens of readers.
FORMATS = ("PNG", "JPEG", "WEBP")
MOST = 100_000_000  # pixels of a picture, 400 MB when decoded: a small file can claim any number
# What is wrong with a picture is an error here, or nothing.
warnings.filterwarnings("ignore", module="PIL")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
METADATA = ("metadata.jsonl", "metadata.csv")
NAME = "file_name"
THREADS = 8  # Pillow decodes and resizes without the interpreter's lock


@dataclass(frozen=True, eq=False)
class Pictures:
    """Names below `folder` and captions, ordered by name, of one caption by that of the file."""

    folder: Path
    names: tuple[str, ...]
    captions: tuple[str, ...]

    def read(self, which: Sequence[int], size: tuple[int, int]) -> np.ndarray:
        """Pictures by their numbers, float32 [B, *size, 3] in [-1, 1]. Raises: as `read_image`."""
        paths = [self.folder / self.names[i] for i in which]
        with ThreadPoolExecutor(THREADS, thread_name_prefix="pictures") as pool:
            return np.stack(list(pool.map(lambda path: read_image(path, size), paths)))


def open_images(folder: Path, column: str = "prompt") -> Pictures:
    """List a folder's pictures and read their captions.

    No picture is opened: that would cost a round trip each at every start, minutes to an hour for
    a million on network storage, and show only some of what decoding them shows.
    Raises: InputError for a folder that is absent or without pictures, metadata that cannot be
    read or name what is not there, a picture without a caption.
    """
    folder = Path(folder)
    names = _pictures(folder)
    found = [folder / name for name in METADATA if (folder / name).exists()]
    if len(found) > 1:
        raise InputError(f"{folder}: found {' and '.join(METADATA)}; expected one of them")
    if not found:
        pairs = [(name, _caption(folder, name)) for name in sorted(names)]
    else:
        records = read_records(found[0], (NAME, column))
        pairs = [(str(PurePosixPath(name)), caption) for name, caption in records]
        for name, _ in pairs:
            if name not in names:
                raise InputError(
                    f"{found[0]}: found {NAME} {shown(name)}; expected one of the pictures in "
                    f"{folder}"
                )
        pairs.sort(key=lambda pair: pair[0])
    names, captions = zip(*pairs, strict=True)
    return Pictures(folder, names, captions)


def _pictures(folder: Path) -> set[str]:
    """Paths below `folder`."""

    def stop(error: OSError):
        raise InputError(f"{error.filename}: found {error.strerror}; expected a folder of pictures")

    found = set()
    for where, folders, files in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = PurePosixPath(Path(where).relative_to(folder).as_posix())
        found |= {
            str(below / name)
            for name in files
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        }
    if not found:
        raise InputError(f"{folder}: found no pictures; expected {', '.join(SUFFIXES)}")
    return found


def _caption(folder: Path, name: str) -> str:
    path = (folder / name).with_suffix(".txt")
    if not path.exists():
        raise InputError(
            f"{folder / name}: found no {path.name} beside it; expected its caption there, or "
            f"{' or '.join(METADATA)} in {folder}"
        )
    caption = " ".join(read_prompts(path))
    check_prompt(caption, str(path))
    return caption


def read_image(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The middle of a picture at `size` (height, width): float32 [*size, 3] in [-1, 1].

    It is turned as its camera says, made RGB, scaled (Lanczos) until it just covers `size`, and
    what is over is cut off evenly on both sides.
    Raises: InputError naming a file that cannot be decoded whole, is none of PNG, JPEG and WebP,
    or has more than 100 million pixels.
    """
    with open_file(path, "a picture") as file:
        try:
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MOST:
                    raise ValueError(f"{image.width} x {image.height} pixels; at most {MOST}")
                image = ImageOps.exif_transpose(image)
                if image.mode[0] in "IF":  # Pillow would clip them to 8 bits instead of scaling
                    raise ValueError(f"pixels of mode {image.mode}")
                image = ImageOps.fit(image.convert("RGB"), size[::-1], Image.Resampling.LANCZOS)
        except Exception as error:  # a damaged file fails in many ways
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"{path}: found a picture that cannot be read ({reason}); expected a whole one of "
                "8 bits a channel"
            ) from error
    return np.asarray(image, np.float32) / 127.5 - 1
