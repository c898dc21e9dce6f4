"""A folder of embeddings reads back what was written, appears whole, and is checked on opening."""

import json
import os
import resource
import shutil
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from gadjax.cli.output import stop_on_write_error
from gadjax.data import embeddings
from gadjax.data.embeddings import Origin, open_embeddings, write_embeddings
from gadjax.errors import InputError, RunStopped
from gadjax.io.atomic import atomic_folder

PROMPTS = ["a red circle", 'a "cross"', "圆", "a square\nbelow", "a triangle"]
L, D = 3, 4


def encoded(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, L, D)).astype(np.float32), rng.integers(0, 2, (count, L))


def write(folder, text, mask, x0=None, pooled=None, sizes=(2, 2, 1), prompts=PROMPTS, **options):
    """Embed PROMPTS in batches of `sizes`; the last row of text, mask and pooled is the null."""
    places = [slice(a, a + n) for a, n in zip(np.cumsum((0, *sizes)), sizes, strict=False)]
    texts = {"text": text, "mask": mask} | ({} if pooled is None else {"pooled": pooled})
    arrays = texts | ({} if x0 is None else {"x0": x0})
    batches = ({name: array[some] for name, array in arrays.items()} for some in places)
    null = {name: array[-1] for name, array in texts.items()}
    with stop_on_write_error(folder), atomic_folder(folder) as out:  # as gadjax embed does
        write_embeddings(out, prompts, batches, null, **{"origin": Origin("abc"), **options})


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "new" / "text", *encoded(6))
    return tmp_path / "new" / "text"


def test_float32_comes_back_exactly(folder):
    text, mask = encoded(6)
    opened = open_embeddings(folder)
    assert opened.prompts == tuple(PROMPTS) and opened.origin == Origin("abc")
    assert opened.latent_NHWC is None
    assert isinstance(opened.text_NLD, np.memmap) and not opened.text_NLD.flags.writeable
    np.testing.assert_array_equal(opened.text_NLD, text[:5], strict=True)
    np.testing.assert_array_equal(opened.mask_NL, mask[:5].astype(bool), strict=True)
    assert list(opened.null) == ["text", "mask"]
    np.testing.assert_array_equal(opened.null["text"], text[5], strict=True)
    np.testing.assert_array_equal(opened.null["mask"], mask[5].astype(np.int32), strict=True)
    assert {type(array) for array in opened.null.values()} == {np.ndarray}
    # Other tools read it as well.
    np.testing.assert_array_equal(np.load(folder / "text.npy"), text, strict=True)
    assert sorted(os.listdir(folder)) == ["manifest.json", "mask.npy", "prompts.jsonl", "text.npy"]
    assert os.listdir(folder.parent) == ["text"]


@pytest.mark.parametrize("latent", [False, True])
def test_a_pooled_vector_comes_back(tmp_path, latent):
    pooled = np.random.default_rng(3).normal(size=(6, 4)).astype(np.float32)
    more = {"x0": latents(), "origin": PICTURED} if latent else {}
    write(tmp_path / "new", *encoded(6), pooled=pooled, **more)
    opened = open_embeddings(tmp_path / "new")
    np.testing.assert_array_equal(opened.pooled_NP, pooled[:5], strict=True)
    np.testing.assert_array_equal(opened.null["pooled"], pooled[5], strict=True)
    which = np.array([3, 0, 3])
    texts = opened.texts(which)
    assert list(texts) == ["text", "mask", "pooled"]
    np.testing.assert_array_equal(texts["pooled"], pooled[which], strict=True)
    np.testing.assert_array_equal(texts["mask"], encoded(6)[1][which].astype(np.int32), strict=True)
    assert (opened.latent_NHWC is not None) == latent


SHAPE = (4, 6, 2)
PICTURED = Origin("abc", "def", SHAPE)


def latents(count=5):
    return np.random.default_rng(9).normal(size=(count, *SHAPE)).astype(np.float32)


@pytest.fixture
def pictured(tmp_path):
    write(tmp_path / "pictured", *encoded(6), latents(), origin=PICTURED)
    return tmp_path / "pictured"


def test_latents_come_back_with_their_prompts(pictured, folder, tmp_path):
    opened = open_embeddings(pictured)
    assert opened.origin == PICTURED and not opened.latent_NHWC.flags.writeable
    np.testing.assert_array_equal(opened.latent_NHWC, latents(), strict=True)
    for name in ("text.npy", "mask.npy", "prompts.jsonl"):
        assert (pictured / name).read_bytes() == (folder / name).read_bytes()
    write(tmp_path / "half", *encoded(6), latents(), origin=PICTURED, dtype="float16", sizes=(5,))
    half = open_embeddings(tmp_path / "half").latent_NHWC
    np.testing.assert_array_equal(half, latents().astype(np.float16), strict=True)


def test_latents_of_another_autoencoder_or_size_are_refused(pictured, folder):
    opened = open_embeddings(pictured)
    opened.check("abc", L)
    opened.check_latents("def", SHAPE)
    for wrong, message in (
        (("x", SHAPE), "manifest.json: found vae 'def'; expected 'x' .latents of another"),
        (("def", (4, 8, 2)), r"found latent \(4, 6, 2\); expected \(4, 8, 2\)"),
    ):
        with pytest.raises(InputError, match=message):
            opened.check_latents(*wrong)
    with pytest.raises(InputError, match="found no latents; expected those of images"):
        open_embeddings(folder).check_latents("def", SHAPE)


def test_float16_rounds_and_other_dtypes_are_taken(tmp_path):
    text, mask = encoded(6)
    write(tmp_path / "half", text, mask, dtype="float16", sizes=(5,))
    opened = open_embeddings(tmp_path / "half")
    np.testing.assert_array_equal(opened.text_NLD, text[:5].astype(np.float16), strict=True)
    brain = text.astype(ml_dtypes.bfloat16)
    write(tmp_path / "brain", brain, mask.astype(np.float32))
    opened = open_embeddings(tmp_path / "brain")
    np.testing.assert_array_equal(opened.text_NLD, brain[:5].astype(np.float32), strict=True)


def test_another_encoder_or_length_is_refused(folder):
    opened = open_embeddings(folder)
    opened.check("abc", L)
    with pytest.raises(InputError, match=r"manifest.json: found fingerprint 'abc'; expected 'x'"):
        opened.check("x", L)
    with pytest.raises(InputError, match=r"manifest.json: found length 3; expected 120"):
        opened.check("abc", 120)


def spoilt(place, value):
    text, mask = encoded(6)
    text[place] = value
    return text, mask


@pytest.mark.parametrize(
    "text_mask, options, error, message",
    [
        (encoded(6), {"sizes": (2, 2)}, ValueError, "4 rows for 5 prompts"),
        (encoded(8), {"sizes": (4, 4)}, ValueError, "8 rows for 5 prompts"),
        ((encoded(6)[0], encoded(7)[1]), {"sizes": (6,)}, ValueError, "6 rows for 5"),
        ((encoded(6)[0], encoded(6)[1][:, 1:]), {}, ValueError, "batch: found .*as the empty"),
        (spoilt((3, 1, 2), np.nan), {}, InputError, "^prompt 4: found values not finite in float"),
        (spoilt((5, 0, 0), np.inf), {}, InputError, "^the empty prompt: found values not finite"),
        (spoilt((1, 0, 0), 7e4), {"dtype": "float16"}, InputError, "^prompt 2: .* in float16"),
        (encoded(6), {"dtype": "bfloat16"}, InputError, "dtype: found 'bfloat16'; expected one of"),
        (encoded(6), {"prompts": ["a", " ", "b", "c", "d"]}, InputError, "jsonl:2: found ' '"),
        (encoded(6), {"prompts": []}, InputError, "found no prompt"),
        (encoded(6), {"origin": PICTURED}, ValueError, r"batch: found .*'x0': \(2, 4, 6, 2\)}"),
        ((*encoded(6), latents()), {}, ValueError, "batch: found .*x0"),
        (
            (*encoded(6), latents()[:, 1:]),
            {"origin": PICTURED},
            ValueError,
            "batch: found .*x0",
        ),
        ((*encoded(6), latents(4)), {"origin": PICTURED}, ValueError, "batch: found .*x0"),
        (
            (*encoded(6), np.where(np.arange(5)[:, None, None, None] == 2, np.nan, latents())),
            {"origin": PICTURED},
            InputError,
            "^prompt 3: found values not finite in float32",
        ),
    ],
)
def test_invalid_input_writes_nothing(tmp_path, text_mask, options, error, message):
    with pytest.raises(error, match=message):
        write(tmp_path / "out", *text_mask, **options)
    assert os.listdir(tmp_path) == []


def test_an_existing_path_is_refused(folder):
    before = (folder / "manifest.json").stat()
    with pytest.raises(InputError, match="found a folder with files in it; expected a new"):
        write(folder, *encoded(6))
    assert (folder / "manifest.json").stat() == before
    with pytest.raises(InputError, match="found File exists for .*; expected a folder"):
        write(folder / "manifest.json" / "out", *encoded(6))


def test_a_small_disk_is_refused_before_encoding(tmp_path, monkeypatch):
    monkeypatch.setattr(
        embeddings.shutil, "disk_usage", lambda path: SimpleNamespace(free=6 * L * (D * 4 + 1) - 1)
    )
    with pytest.raises(InputError, match="GB of free space; expected"):
        write(tmp_path / "out", *encoded(6))
    free = 6 * L * (D * 4 + 1) + 5 * 4 * 6 * 2 * 4 - 1
    monkeypatch.setattr(embeddings.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(InputError, match="GB of free space; expected"):
        write(tmp_path / "out", *encoded(6), latents(), origin=PICTURED)
    assert os.listdir(tmp_path) == []


def test_a_write_that_fails_stops_and_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        with pytest.raises(RunStopped, match="out: cannot be written: File too large"):
            write(tmp_path / "out", *encoded(6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    def batches():
        yield dict(zip(("text", "mask"), encoded(2), strict=True))
        raise KeyboardInterrupt

    null = {"text": np.zeros((L, D)), "mask": np.ones(L)}
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out") as out:
        write_embeddings(out, PROMPTS, batches(), null, origin=Origin("abc"))
    assert os.listdir(tmp_path) == []


def edit(key, value):
    def change(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest[key] = value
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return change


def cut(name, size):
    return lambda folder: os.truncate(folder / name, size)


def put(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def save(name, array):
    return lambda folder: np.save(folder / name, array, allow_pickle=True)


@pytest.mark.parametrize(
    "damage, message",
    [
        (shutil.rmtree, "manifest.json: found no such file; expected a folder written by"),
        (put("manifest.json", b"{"), "manifest.json: corrupt: found "),
        (put("manifest.json", b"\xff"), "manifest.json: corrupt: found "),
        (put("manifest.json", b"[]"), "manifest.json: found a list; expected a JSON object"),
        (edit("version", 2), "manifest.json: found version 2; expected 1"),
        (edit("count", "5"), "manifest.json: found count '5'; expected a positive integer"),
        (edit("width", True), "manifest.json: found width True"),
        (edit("dtype", "object"), "manifest.json: found dtype 'object'; expected float32 or flo"),
        (edit("dtype", ["float32"]), r"manifest.json: found dtype \['float32'\]"),
        (edit("fingerprint", None), "manifest.json: found fingerprint None; expected text"),
        (edit("count", 4), r"text.npy: found float32 \(6, 3, 4\); expected float32 \(5, 3, 4\)"),
        (edit("width", 5), r"text.npy: found float32 \(6, 3, 4\); expected float32 \(6, 3, 5\)"),
        (edit("dtype", "float16"), r"text.npy: found float32 .*; expected float16"),
        (lambda folder: (folder / "text.npy").unlink(), "text.npy: found no such file"),
        (cut("text.npy", 0), "text.npy: found a truncated or corrupt file"),
        (cut("text.npy", 50), "text.npy: found a truncated or corrupt file"),
        (cut("text.npy", 200), "text.npy: found a truncated or corrupt file"),
        (put("text.npy", b"PK" * 100), "text.npy: found a truncated or corrupt file"),
        (save("text.npy", np.zeros((6, 3, 4), object)), "text.npy: found a truncated or corrupt"),
        (save("text.npy", np.zeros((4, 3, 6), "f4").T), "text.npy: found float32"),
        (save("text.npy", np.zeros((6, 3, 4), ">f4")), "text.npy: found >f4"),
        (save("mask.npy", np.zeros((6, 2), bool)), r"mask.npy: found bool \(6, 2\)"),
        (lambda folder: os.truncate(folder / "mask.npy", 999), "mask.npy: found 999 bytes"),
        (put("prompts.jsonl", b'{"prompt": "a"}'), "prompts.jsonl: found 1 prompts; expected 5"),
        (put("prompts.jsonl", b'{"a": 1}'), "prompts.jsonl:1: found keys"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        open_embeddings(folder)
    assert "\n" not in str(caught.value) and "; expected " in str(caught.value)


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut("latents.npy", 500), "latents.npy: found a truncated or corrupt file; expected float"),
        (lambda folder: os.truncate(folder / "latents.npy", 1999), "latents.npy: found 1999 bytes"),
        (lambda folder: (folder / "latents.npy").unlink(), "latents.npy: found no such file"),
        (edit("latent", [4, 6]), r"found latent \[4, 6\]; expected three positive integers"),
        (edit("latent", [4, 6, "2"]), "expected three positive integers"),
        (edit("latent", [6, 4, 2]), r"latents.npy: found float32 \(5, 4, 6, 2\); expected float32"),
        (edit("vae", None), "manifest.json: found vae None; expected text"),
    ],
)
def test_damaged_latents_are_refused_in_one_line(pictured, damage, message):
    damage(pictured)
    with pytest.raises(InputError, match=message) as caught:
        open_embeddings(pictured)
    assert "\n" not in str(caught.value)


def test_any_damaged_header_is_refused_or_changes_nothing(folder):
    text, _ = encoded(6)
    good = (folder / "text.npy").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        bad = bytearray(good)
        bad[rng.integers(128)] = rng.integers(256)
        (folder / "text.npy").write_bytes(bad)
        try:
            opened = open_embeddings(folder)
        except InputError:
            continue
        np.testing.assert_array_equal(opened.text_NLD, text[:5], strict=True)
