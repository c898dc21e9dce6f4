"""Image folders: the same samples in every layout, scaling and cropping, one-line errors."""

import json
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from gadjax.data.images import ENDINGS, SUFFIXES, open_images, read_image
from gadjax.errors import InputError

CAPTIONS = {
    "b.png": "a red, round thing",
    "a/c.jpg": "blue",
    "a/B.WEBP": "two lines",
    "d.jpeg": "圆",
}


def picture(height, width, seed=0):
    """Smooth in places and noise in others, with values at both ends."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3)).repeat(4, 0).repeat(4, 1)
    noise = rng.integers(-60, 60, (height, width, 3))
    return np.clip(coarse[:height, :width] + noise, 0, 255).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """The pictures of CAPTIONS without any captions, and what is none of them."""
    (tmp_path / "a").mkdir()
    (tmp_path / ".cache").mkdir()
    for number, name in enumerate(CAPTIONS):
        Image.fromarray(picture(8, 6, number)).save(tmp_path / name)
    for name in (".hidden.png", ".cache/e.png", "notes.md", "a/f.psd"):
        (tmp_path / name).write_text("no picture")
    return tmp_path


def sidecar(folder):
    for name, caption in CAPTIONS.items():
        (folder / name).with_suffix(".txt").write_text(caption.replace("two ", "\ufefftwo\n\n "))


def jsonl(folder, column="prompt"):
    records = [{"file_name": name, column: text, "id": 3} for name, text in CAPTIONS.items()]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))


def csv(folder):
    lines = [f'3,"{text}",./{name}' for name, text in CAPTIONS.items()]
    (folder / "metadata.csv").write_text("\n".join(["id,prompt,file_name", *lines]))


@pytest.mark.parametrize("write", [sidecar, jsonl, csv])
def test_every_layout_gives_the_same_samples(folder, write):
    write(folder)
    result = open_images(folder)
    assert result.names == ("a/B.WEBP", "a/c.jpg", "b.png", "d.jpeg")
    assert result.captions == tuple(CAPTIONS[name] for name in result.names)
    assert open_images(str(folder)).names == result.names


def test_images_are_read_by_index(folder):
    sidecar(folder)
    result = open_images(folder)
    which = np.array([3, 0, 2, 0, 1, 2] * 4, np.int32)
    images = result.read(which, (4, 6))
    assert images.shape == (24, 4, 6, 3) and images.dtype == np.float32
    for i, image in zip(which, images, strict=True):
        np.testing.assert_array_equal(image, read_image(folder / result.names[i], (4, 6)))


def test_metadata_overrides_caption_files(folder):
    jsonl(folder, "text")
    (folder / "b.txt").write_text("another caption")
    with open(folder / "metadata.jsonl", "a") as file:
        file.write('\n{"file_name": "b.png", "text": "a second caption"}')
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(lines[:1] + lines[2:]))  # without a/c.jpg
    result = open_images(folder, "text")
    assert result.names == ("a/B.WEBP", "b.png", "b.png", "d.jpeg")
    assert result.captions[1:3] == (CAPTIONS["b.png"], "a second caption")


def lanczos(length, start, size, target):
    """[target, length] weights of an output's pixels over a side from `start`, `size` long."""
    step = size / target
    width = max(step, 1)
    centres = start + (np.arange(target) + 0.5) * step
    x = (np.arange(length) + 0.5 - centres[:, None]) / width
    weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
@pytest.mark.parametrize(
    "shape", [(16, 16), (40, 30), (31, 100), (57, 18), (200, 12), (9, 5), (7, 33)]
)
def test_a_picture_is_scaled_to_cover_and_cut_in_the_middle(tmp_path, shape, size):
    # Of middling values: Pillow keeps bytes between its two passes, and which is first may vary.
    pixels = picture(*shape) // 2 + 64
    Image.fromarray(pixels).save(tmp_path / "a.png")
    # The largest part in the middle that has the shape of the result, in pixels of the original.
    part = np.array(size) * min(shape[0] / size[0], shape[1] / size[1])
    rows, columns = (
        lanczos(n, (n - p) / 2, p, target) for n, p, target in zip(shape, part, size, strict=True)
    )
    expected = np.einsum("hy,wx,yxc->hwc", rows, columns, pixels.astype(float))
    result = read_image(tmp_path / "a.png", size)
    assert result.shape == (*size, 3) and result.dtype == np.float32
    error = np.abs((result + 1) * 127.5 - expected)
    # Both passes round by half a level, the first's passes through weights of up to 1.6 together.
    assert error.max() < 0.5 + 0.8 and error.mean() < 0.4


def test_a_picture_of_the_right_size_is_left_as_it_is(tmp_path):
    pixels = picture(24, 16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    result = read_image(tmp_path / "a.png", (24, 16))
    np.testing.assert_array_equal(np.rint((result + 1) * 127.5), pixels)
    assert result.min() >= -1 and result.max() <= 1
    # Wider by twice eight pixels: these are gone.
    Image.fromarray(np.pad(pixels, ((0, 0), (8, 8), (0, 0)))).save(tmp_path / "b.png")
    np.testing.assert_array_equal(read_image(tmp_path / "b.png", (24, 16)), result)


def test_exif_orientation_is_applied(tmp_path):
    pixels = picture(16, 24)
    for orientation, turned in ((1, pixels), (3, pixels[::-1, ::-1]), (6, np.rot90(pixels, -1))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
        result = read_image(tmp_path / "a.png", turned.shape[:2])
        np.testing.assert_array_equal(np.rint((result + 1) * 127.5), turned)


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("1", 1, (255, 255, 255)),
        ("L", 100, (100, 100, 100)),
        ("LA", (100, 0), (255, 255, 255)),
        ("LA", (100, 255), (100, 100, 100)),
        ("P", 0, (20, 40, 60)),
        ("RGBA", (20, 40, 60, 255), (20, 40, 60)),
        ("RGBA", (20, 40, 60, 51), (208, 212, 216)),  # a fifth of it, on white
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, colour, expected):
    image = Image.new(mode, (5, 4), colour)
    if mode == "P":
        image.putpalette((20, 40, 60))
    image.save(tmp_path / "a.png")
    result = np.rint((read_image(tmp_path / "a.png", (4, 4)) + 1) * 127.5)
    np.testing.assert_array_equal(result, np.broadcast_to(expected, (4, 4, 3)))


def test_colours_under_transparency_have_no_effect(tmp_path):
    """A red square on a transparent ground, as programs save it that leave black or green below."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[2:6, 2:6] = 255, 0, 0, 255
    palette = Image.fromarray(pixels[..., 3] // 255, "P")
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=0)
    plain = Image.new("L", (8, 8), 128)
    plain.save(tmp_path / "grey.png", transparency=128)
    for name, under in (("black.png", 0), ("green.png", 255), ("green.webp", 255)):
        pixels[pixels[..., 3] == 0, 1] = under
        Image.fromarray(pixels).save(tmp_path / name, lossless=True, exact=True)
    names = "palette.png", "black.png", "green.png", "green.webp"
    for colour, ground in (("white", 255), ("#808080", 128)):
        expected_pixels = np.full((8, 8, 3), ground)
        expected_pixels[2:6, 2:6] = 255, 0, 0
        for name in names:
            result = np.rint((read_image(tmp_path / name, (8, 8), colour) + 1) * 127.5)
            np.testing.assert_array_equal(result, expected_pixels)
        all_of_it = read_image(tmp_path / "grey.png", (8, 8), colour)
        np.testing.assert_array_equal(np.rint((all_of_it + 1) * 127.5), ground)
    with pytest.raises(InputError, match="background: found 'no colour'; expected a colour"):
        open_images(tmp_path, background="no colour")


def test_every_format_is_listed_and_skipped_files_are_logged(tmp_path, caplog):
    pixels = picture(8, 8) // 8 * 8
    for ending in ENDINGS:
        kind = next(kind for kind, endings in SUFFIXES.items() if ending in endings)
        options = {"lossless": True} if kind in ("WEBP", "JPEG2000") else {}
        name = tmp_path / f"{ending[1:].upper()}{ending}"
        image = Image.fromarray(pixels)
        image.save(name, kind, **options, **{"quality": 100} if kind == "AVIF" else {})
        name.with_suffix(".txt").write_text("a")
    for name in ("b.psd", "c.psd", "d.heic", "README"):
        (tmp_path / name).write_text("")
    result = open_images(tmp_path)
    assert len(result.names) == len(ENDINGS)
    skipped = "left out: 1 .heic, 2 .psd, 1 without suffix"
    assert [record.getMessage().partition("; ")[2] for record in caplog.records] == [skipped]
    images = np.rint((result.read(range(len(result.names)), (8, 8)) + 1) * 127.5)
    for name, image in zip(result.names, images, strict=True):
        near = 40 if name.startswith(("JP", "JF", "GI", "AV", "J2")) else 0
        assert np.abs(image - pixels).mean() <= near, name


def test_folders_behind_links_are_read_once(tmp_path, caplog):
    store, folder = tmp_path / "store", tmp_path / "pictures"
    (store / "deep").mkdir(parents=True)
    folder.mkdir()
    for number, name in enumerate((store / "a.png", store / "deep" / "b.png", folder / "own.png")):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(name)
        name.with_suffix(".txt").write_text(name.stem)
    (folder / "images").symlink_to(store)
    assert open_images(folder).names == ("images/a.png", "images/deep/b.png", "own.png")
    assert not caplog.records
    (store / "back").symlink_to(folder)
    (store / "deep" / "up").symlink_to("..")
    (folder / "twice").symlink_to(store)
    (folder / "around").symlink_to("/")
    assert open_images(folder).names == ("images/a.png", "images/deep/b.png", "own.png")
    assert "4 links to parent folders or to folders read already" in caplog.text
    records = [{"file_name": f"images/{name}", "prompt": name} for name in ("a.png", "deep/b.png")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert open_images(folder).captions == ("a.png", "deep/b.png")


def test_metadata_below_the_top_wins_over_leftovers(tmp_path, caplog):
    for place, name in (("train", "a"), ("test", "b"), ("test", "left")):
        (tmp_path / place).mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / place / f"{name}.png")
        (tmp_path / place / f"{name}.txt").write_text("leftover")
    for place, name in (("train", "a"), ("test", "b")):
        line = json.dumps({"file_name": f"{name}.png", "prompt": f"of {place}"})
        (tmp_path / place / "metadata.jsonl").write_text(line)
    result = open_images(tmp_path)
    assert result.names == ("test/b.png", "train/a.png")
    assert result.captions == ("of test", "of train")
    assert "left out: 1 without metadata" in caplog.text
    Image.new("RGB", (4, 4)).save(tmp_path / "top.png")
    (tmp_path / "metadata.csv").write_text("file_name,prompt\ntop.png,of the top\n")
    assert open_images(tmp_path).captions == ("of test", "of the top", "of train")


@pytest.mark.parametrize("caption", ["txt", "jsonl"])
def test_decomposed_accents_of_macos(tmp_path, caption):
    """macOS decomposes names (NFD): an e and an accent."""
    name = unicodedata.normalize("NFD", "é.png")
    Image.new("RGB", (4, 4)).save(tmp_path / name)
    if caption == "txt":
        (tmp_path / "é.txt").write_text("x")
    else:
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "é.png", "prompt": "x"}))
    assert open_images(tmp_path).names == (name,)
    Image.new("RGB", (4, 4)).save(tmp_path / "é.png")
    with pytest.raises(InputError, match="found another file of that name, with its accents"):
        open_images(tmp_path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("kept", [0, 0.01, 0.5, 0.9])
def test_a_truncated_image_is_named(tmp_path, suffix, kept):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(picture(40, 40)).save(path)
    os.truncate(path, int(kept * path.stat().st_size))
    with pytest.raises(InputError, match=f"a{suffix}: found a picture that cannot be r") as caught:
        read_image(path, (8, 8))
    assert "\n" not in str(caught.value)


def test_other_unreadable_images(tmp_path):
    with pytest.raises(InputError, match="a.png: found No such file .*; expected a picture"):
        read_image(tmp_path / "a.png", (8, 8))
    Image.new("I;16", (8, 8), 1000).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="pixels of mode I;16.; expected a whole one of 8 bits"):
        read_image(tmp_path / "a.png", (8, 8))


def line(text):
    return lambda folder: (folder / "metadata.jsonl").write_text(text)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda folder: None,
            r"a/B.WEBP: found no B.txt next to it; expected its caption there, or",
        ),
        (
            lambda folder: (jsonl(folder), csv(folder)),
            r"found metadata.jsonl and metadata.csv; exp",
        ),
        (
            lambda folder: jsonl(folder, "text"),
            r"metadata.jsonl:1: found keys .*; expected 'prompt'",
        ),
        (
            line('{"prompt": "a"}'),
            r"metadata.jsonl:1: found keys \['prompt'\]; expected 'file_name'",
        ),
        (
            line('{"prompt": "a", "file_name": "x.png"}'),
            r"metadata.jsonl: found file_name 'x.png'; expected one of the images in ",
        ),
        (
            line('{"prompt": "a", "file_name": "a/f.psd"}'),
            r"metadata.jsonl: found file_name 'a/f.psd'",
        ),
        (
            line('{"prompt": "", "file_name": "b.png"}'),
            r"metadata.jsonl:1: found '' as 'prompt'; exp",
        ),
        (line('{"prompt": "a", "file_name": 3}'), r"metadata.jsonl:1: found 3 as 'file_name'"),
        (line("{"), r"metadata.jsonl:1: found broken JSON"),
        (line(""), r"metadata.jsonl: found no prompt"),
        (
            lambda folder: (sidecar(folder), (folder / "b.txt").write_bytes(b"\xff")),
            r"b.txt:1: found byte 0xff, which is not UTF-8",
        ),
        (
            lambda folder: (sidecar(folder), (folder / "b.txt").write_text(" \n")),
            r"b.txt: found no prompt; expected at least one",
        ),
    ],
)
def test_errors_of_a_folder_are_one_line(folder, change, message):
    change(folder)
    with pytest.raises(InputError, match=message) as caught:
        open_images(folder)
    assert "\n" not in str(caught.value) and "; expected " in str(caught.value)


def test_a_folder_that_is_absent_or_has_no_pictures(tmp_path):
    with pytest.raises(InputError, match="x: found No such file or directory; expected a folder"):
        open_images(tmp_path / "x")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.psd", "prompt": "a"}')
    with pytest.raises(InputError, match="found no pictures; expected .png, .apng, .jpg"):
        open_images(tmp_path)
    with pytest.raises(InputError, match="jsonl: found Not a directory; expected a folder"):
        open_images(tmp_path / "metadata.jsonl")
