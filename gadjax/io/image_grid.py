"""Image grids: labelled rows, one column per prompt and noise; PNG files."""

import io
from bisect import bisect
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gadjax.errors import InputError, escape_nonprintable
from gadjax.io.storage import write_atomic

GAP, MARGIN, MAX_LINES = 4, 12, 4  # pixels between images and around the grid; lines of a caption
MAX_CHARS = 1000  # of a caption, more than fit
LABEL_COLOR, CAPTION_COLOR = (32, 32, 32), (96, 96, 96)


def grid(
    rows: list[tuple[str, np.ndarray]], captions: list[str] | None = None, scale: int = 3
) -> Image.Image:
    """Image grid on white: one labelled row of images per (label, x_NHWC in [-1, 1]).

    Args:
      rows: labels and images, all of one shape [N, H, W, 3]; also uint8.
      captions: N texts above the columns, wrapped.
      scale: integer magnification; images of at most 64 pixels are enlarged without interpolation.

    Raises: InputError where rows or captions differ in number or shape.
    """
    shapes = {tuple(x.shape) for _, x in rows}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 4 or shape[3] != 3:
        row_shapes = [tuple(x.shape) for _, x in rows]
        raise InputError(f"preview: found rows of {row_shapes}; expected one shape [N, H, W, 3]")
    count, height, width = shape[0], shape[1] * scale, shape[2] * scale
    if captions is not None and len(captions) != count:
        raise InputError(f"preview: found {len(captions)} captions; expected {count}")

    size = int(np.clip(height / 8, 11, 18))
    font, small = ImageFont.load_default(size + 1), ImageFont.load_default(size)
    line = round(size * 1.3)
    texts = [wrap_text(text, small, width - GAP) for text in captions or []]
    left = MARGIN + max(round(font.getlength(label)) for label, _ in rows) + MARGIN
    top = MARGIN + line * max((len(text) for text in texts), default=0) + (GAP if texts else 0)
    sheet = Image.new(
        "RGB",
        (
            left + count * (width + GAP) - GAP + MARGIN,
            top + len(rows) * (height + GAP) - GAP + MARGIN,
        ),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(texts):
        for number, words in enumerate(reversed(text)):  # bottom-aligned
            place = left + column * (width + GAP), top - GAP - number * line
            draw.text(place, words, CAPTION_COLOR, small, anchor="ld")
    resampling = Image.Resampling.NEAREST if max(shape[1:3]) <= 64 else Image.Resampling.LANCZOS
    for number, (label, x_NHWC) in enumerate(rows):
        y = top + number * (height + GAP)
        draw.text((left - MARGIN, y + height // 2), label, LABEL_COLOR, font, anchor="rm")
        for column, image in enumerate(to_uint8(x_NHWC)):
            tile = Image.fromarray(image).resize((width, height), resampling)
            sheet.paste(tile, (left + column * (width + GAP), y))
    return sheet


def to_uint8(x: np.ndarray) -> np.ndarray:
    """Convert [-1, 1] to 0 .. 255: values outside are clipped, NaN is black; uint8 is kept."""
    if x.dtype == np.uint8:
        return x
    x = np.nan_to_num(np.asarray(x, np.float32), nan=-1.0, posinf=1.0, neginf=-1.0)
    return np.rint(np.clip(x * 127.5 + 127.5, 0, 255)).astype(np.uint8)


def from_uint8(x: np.ndarray) -> np.ndarray:
    """Convert 0 .. 255 to [-1, 1], float32; what is not uint8 is kept."""
    return np.float32(x) / np.float32(127.5) - 1 if x.dtype == np.uint8 else x


def wrap_text(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Wrap text into at most MAX_LINES lines; the rest becomes an ellipsis.

    Args:
      text: any characters; nonprintable ones are escaped.
      font: of the caption.
      width: of a line, in pixels.
    """
    lines = [""]
    text = text if len(text) <= MAX_CHARS else text[:MAX_CHARS] + "…"
    for word in text.split():
        longer = f"{lines[-1]} {escape_nonprintable(word)}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(escape_nonprintable(word))
    cut = len(lines) > MAX_LINES
    lines = lines[:MAX_LINES]
    for number, line in enumerate(lines):
        end = "…" if cut and number == MAX_LINES - 1 else ""
        if font.getlength(line + end) > width:
            fits = bisect(range(len(line)), width, key=lambda n: font.getlength(line[:n] + "…"))
            line, end = line[: max(fits - 1, 0)], "…"
        lines[number] = line + end
    return lines


def save_png(image: Image.Image, path: Path) -> None:
    """Write an image as PNG, atomically."""
    data = io.BytesIO()
    image.save(data, format="PNG")
    write_atomic(path, data.getvalue())
