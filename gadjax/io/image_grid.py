"""Pictures side by side: labelled rows, one column per prompt and noise."""

import io
from bisect import bisect
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gadjax.errors import InputError, escape_nonprintable
from gadjax.io.storage import write_atomic

GAP, MARGIN, LINES = 4, 12, 4  # pixels between pictures and around all; lines of a caption
LONGEST = 1000  # characters of a caption, more than fit
INK, PALE = (32, 32, 32), (96, 96, 96)


def grid(
    rows: list[tuple[str, np.ndarray]], captions: list[str] | None = None, scale: int = 3
) -> Image.Image:
    """A white sheet with one labelled row of pictures per (label, x_NHWC in [-1, 1]).

    captions: N texts above the columns, wrapped. Pictures are enlarged `scale` times; those of 64
    pixels and less with their pixels kept sharp.
    Raises: InputError where rows or captions differ in number or shape.
    """
    shapes = {tuple(x.shape) for _, x in rows}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 4 or shape[3] != 3:
        found = [tuple(x.shape) for _, x in rows]
        raise InputError(f"preview: found rows of {found}; expected one shape [N, H, W, 3]")
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
        for number, words in enumerate(reversed(text)):  # the last line sits on the pictures
            place = left + column * (width + GAP), top - GAP - number * line
            draw.text(place, words, PALE, small, anchor="ld")
    how = Image.Resampling.NEAREST if max(shape[1:3]) <= 64 else Image.Resampling.LANCZOS
    for number, (label, x_NHWC) in enumerate(rows):
        y = top + number * (height + GAP)
        draw.text((left - MARGIN, y + height // 2), label, INK, font, anchor="rm")
        for column, picture in enumerate(to_uint8(x_NHWC)):
            tile = Image.fromarray(picture).resize((width, height), how)
            sheet.paste(tile, (left + column * (width + GAP), y))
    return sheet


def to_uint8(x: np.ndarray) -> np.ndarray:
    """[-1, 1] to 0 .. 255; what is outside is clipped, what is not a number is black."""
    x = np.nan_to_num(np.asarray(x, np.float32), nan=-1.0, posinf=1.0, neginf=-1.0)
    return np.rint(np.clip(x * 127.5 + 127.5, 0, 255)).astype(np.uint8)


def wrap_text(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` pixels, at most four; what does not fit ends in an ellipsis."""
    lines = [""]
    text = text if len(text) <= LONGEST else text[:LONGEST] + "…"
    for word in text.split():
        longer = f"{lines[-1]} {escape_nonprintable(word)}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(escape_nonprintable(word))
    cut = len(lines) > LINES
    lines = lines[:LINES]
    for number, line in enumerate(lines):
        end = "…" if cut and number == LINES - 1 else ""
        if font.getlength(line + end) > width:
            fits = bisect(range(len(line)), width, key=lambda n: font.getlength(line[:n] + "…"))
            line, end = line[: max(fits - 1, 0)], "…"
        lines[number] = line + end
    return lines


def save_png(image: Image.Image, path: Path) -> None:
    """Write a whole file or none."""
    data = io.BytesIO()
    image.save(data, format="PNG")
    write_atomic(path, data.getvalue())
