"""Sheets of small pictures as data URIs: one image a prompt, models down and noises across."""

import base64
import io

import numpy as np
from PIL import Image

from gadjax.io.image_grid import to_uint8

SIDES = 160, 112, 80  # largest side of a picture on a sheet, in pixels; see `page_data`
PIXELS = 64  # pictures of at most this side are kept as they are, without loss
# Of WebP. Without loss, the quality is the effort: 80 takes 17 times as long for 4 % less.
LOSSLESS = {"lossless": True, "quality": 20, "method": 2}
LOSSY = {"quality": 80}


def is_small(images_RCHWC: np.ndarray) -> bool:
    """True for pictures that are shown pixel by pixel."""
    return max(images_RCHWC.shape[-3:-1]) <= PIXELS


def sheet_size(images_RCHWC: np.ndarray, largest: int = SIDES[0]) -> tuple[int, int]:
    """Height and width of one picture on a sheet; `largest` of them is its largest side."""
    height, width = images_RCHWC.shape[-3:-1]
    scale = 1 if is_small(images_RCHWC) else min(1.0, largest / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def sheet(images_RCHWC: np.ndarray, largest: int = SIDES[0]) -> str:
    """Sheet of R rows and C columns of uint8 pictures: a data URI of one WebP image."""
    height, width = sheet_size(images_RCHWC, largest)
    rows, columns = images_RCHWC.shape[:2]
    image = Image.new("RGB", (columns * width, rows * height))
    for r, images_CHWC in enumerate(images_RCHWC):
        for c, picture in enumerate(images_CHWC):
            tile = Image.fromarray(to_uint8(picture))
            if tile.size != (width, height):
                tile = tile.resize((width, height), Image.Resampling.LANCZOS)
            image.paste(tile, (c * width, r * height))
    data = io.BytesIO()
    image.save(data, "WEBP", **(LOSSLESS if is_small(images_RCHWC) else LOSSY))
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()
