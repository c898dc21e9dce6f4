"""Sources are functions of the sample index: any split, any process; epochs are reshuffled."""

import shutil

import numpy as np
import pytest
from PIL import Image
from programs import run_python

from gadjax.data.embeddings import Origin, open_embeddings, write_embeddings
from gadjax.data.images import open_images
from gadjax.data.source import (
    EmbeddingSource,
    ImageSource,
    LatentSource,
    PromptSource,
    WorldSource,
    dropout_mask,
    prefetch,
)
from gadjax.errors import InputError
from gadjax.worlds import shapes

N, L = 10, 3
SHAPES = "gadjax.worlds.shapes"


def tokenize(texts):
    """Lengths of the first words."""
    ids = np.zeros((len(texts), 14), np.int32)
    for row, text in zip(ids, texts, strict=True):
        lengths = [len(word) for word in (text or "").split()]
        row[: len(lengths)] = lengths
    return ids, (ids > 0).astype(np.int32)


def prompt_source(seed=0, count=N):
    ids = np.arange(count * L, dtype=np.uint16).reshape(count, L)
    return PromptSource(ids, ids % 2, seed)


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    """With latents, each filled with its number."""
    folder = tmp_path_factory.mktemp("text")
    text = np.random.default_rng(0).normal(size=(N + 1, L, 2)).astype(np.float16)
    mask = np.arange((N + 1) * L).reshape(N + 1, L) % 2
    x0 = np.broadcast_to(np.arange(N)[:, None, None, None], (N, 2, 3, 1))
    write_embeddings(
        folder,
        [f"prompt {i}" for i in range(N)],
        [{"text": text[:N], "mask": mask[:N], "x0": x0}],
        {"text": text[N], "mask": mask[N]},
        origin=Origin("abc", "def", (2, 3, 1)),
        dtype="float16",
    )
    return open_embeddings(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Uniform images of grey value 10 i, with captions of i + 1 words."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(N):
        Image.new("L", (5, 4), 10 * i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a " * (i + 1))
    return open_images(folder)


@pytest.fixture(params=["prompts", "embeddings", "latents", "images", "world"])
def source(request, embeddings, pictures):
    return {
        "prompts": lambda: prompt_source(),
        "embeddings": lambda: EmbeddingSource(embeddings, 0),
        "latents": lambda: LatentSource(embeddings, 0, dropout=0.5),
        "images": lambda: ImageSource(pictures, (3, 3), tokenize, 0, dropout=0.5),
        "world": lambda: WorldSource(SHAPES, tokenize, seed=3, dropout=0.5),
    }[request.param]()


def joined(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], strict=True)


@pytest.mark.parametrize("start", [0, 16, 8 * 10**9])
def test_any_split_gives_the_same_global_batch(source, start):
    batch = source.batch(start, 8)
    for size in (4, 2, 1):
        same(batch, joined([source.batch(i, size) for i in range(start, start + 8, size)]))
    # Independent of earlier requests.
    same(batch, source.batch(start, 8))


def test_epochs_cover_every_prompt_once_and_are_reshuffled():
    which = prompt_source().batch(0, 5 * N)["which"].reshape(5, N)
    assert (np.sort(which) == np.arange(N)).all()
    assert len({tuple(epoch) for epoch in which.tolist()}) == 5
    # An epoch of one seed is no epoch of another, not even a later one.
    other = prompt_source(seed=1).batch(0, 5 * N)["which"].reshape(5, N)
    assert not {tuple(epoch) for epoch in which.tolist()} & {tuple(e) for e in other.tolist()}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_prompts_than_a_batch_are_repeated(count):
    which = prompt_source(count=count).batch(0, 12)["which"].reshape(-1, count)
    assert (np.sort(which) == np.arange(count)).all()


def test_prompts_come_with_their_tokens():
    batch = prompt_source().batch(3, 6)
    assert all(array.dtype == np.int32 for array in batch.values())
    ids = batch["which"][:, None] * L + np.arange(L)
    np.testing.assert_array_equal(batch["ids"], ids)
    np.testing.assert_array_equal(batch["mask"], ids % 2)


def test_embeddings_come_in_the_order_of_the_prompts(embeddings):
    batch, prompts = EmbeddingSource(embeddings, 0).batch(5, 9), prompt_source().batch(5, 9)
    np.testing.assert_array_equal(batch["which"], prompts["which"], strict=True)
    np.testing.assert_array_equal(batch["mask"], prompts["mask"], strict=True)
    assert batch["text"].dtype == np.float16 and type(batch["text"]) is np.ndarray
    np.testing.assert_array_equal(batch["text"], embeddings.text_NLD[batch["which"]])


def test_latents_and_images_have_the_same_order(embeddings, pictures):
    which = prompt_source().batch(5, 9)["which"]
    batch = LatentSource(embeddings, 0).batch(5, 9)
    text = EmbeddingSource(embeddings, 0).batch(5, 9)
    same({name: batch[name] for name in text}, text)
    expected = np.broadcast_to(which[:, None, None, None], (9, 2, 3, 1)).astype(np.float32)
    np.testing.assert_array_equal(batch["x0"], expected, strict=True)

    batch = ImageSource(pictures, (3, 3), tokenize, 0).batch(5, 9)
    assert {name: array.dtype.name for name, array in batch.items()} == {
        **dict.fromkeys(("ids", "mask", "which"), "int32"),
        "image": "float32",
    }
    np.testing.assert_array_equal(batch["which"], which)
    np.testing.assert_array_equal(batch["mask"].sum(1), which + 1)
    assert batch["image"].shape == (9, 3, 3, 3)
    grey = np.broadcast_to(which[:, None, None, None] * 10 / 127.5 - 1, batch["image"].shape)
    np.testing.assert_allclose(batch["image"], grey, rtol=0, atol=1e-7)


def test_sources_drop_the_same_captions(embeddings, pictures):
    gone = dropout_mask(0, 0.5, 3, 12)
    assert 0 < gone.sum() < 12
    ids = ImageSource(pictures, (3, 3), tokenize, 0, dropout=0.5).batch(3, 12)["ids"]
    np.testing.assert_array_equal(ids.any(1), ~gone)
    batch = LatentSource(embeddings, 0, dropout=0.5).batch(3, 12)
    full, null = LatentSource(embeddings, 0).batch(3, 12), embeddings.null
    expected = np.where(gone[:, None, None], null["text"], full["text"])
    np.testing.assert_array_equal(batch["text"], expected)
    expected = np.where(gone[:, None], null["mask"], full["mask"])
    np.testing.assert_array_equal(batch["mask"], expected)
    np.testing.assert_array_equal(batch["x0"], full["x0"])


def test_a_picture_that_cannot_be_read_ends_the_stream_with_its_name(pictures, tmp_path):
    folder = shutil.copytree(pictures.folder, tmp_path / "copy")
    (folder / "7.png").write_bytes(b"no picture")
    source = ImageSource(open_images(folder), (3, 3), tokenize, 0)
    place = list(prompt_source().batch(0, N)["which"]).index(7)
    batches = prefetch(lambda i: source.batch(i, 1), 0, N)
    assert [int(next(batches)["which"][0]) for _ in range(place)].count(7) == 0
    with pytest.raises(InputError, match="copy/7.png: found a picture that cannot be read"):
        next(batches)


def test_the_order_is_the_same_in_every_process_and_version():
    # A grain that shuffles otherwise would make a resumed run see other prompts.
    expected = [1, 2, 4, 5, 9, 7, 8, 6, 0, 3, 9, 6, 1, 8, 2, 0, 3, 5, 4, 7]
    assert prompt_source().batch(0, 2 * N)["which"].tolist() == expected
    code = (
        "import numpy as np; from gadjax.data.source import PromptSource;"
        f"ids = np.zeros(({N}, {L}));"
        f"print(PromptSource(ids, ids, 0).batch(0, {2 * N})['which'].tolist());"
        # Joining a cluster must come first, so data may not start the devices.
        "from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    )
    assert run_python("-c", code).stdout.splitlines() == [str(expected), "False"]


def test_a_world_gives_its_pictures_and_captions():
    batch = WorldSource(SHAPES, tokenize, seed=3).batch(20, 8)
    images, captions, _ = shapes.sample_batch(3, range(20, 28))
    ids, mask = tokenize(captions)
    same(batch, {"ids": ids, "mask": mask, "image": images})


def test_dropout_drops_its_share_of_captions_only():
    rate, count = 0.1, 4000
    source = WorldSource(SHAPES, tokenize, seed=3, dropout=rate)
    gone = dropout_mask(3, rate, 0, count)
    assert abs(gone.mean() - rate) < 4 * (rate * (1 - rate) / count) ** 0.5
    # No memory of the sample before: pairs are as frequent as they are by chance.
    pairs = (gone[1:] & gone[:-1]).mean()
    assert abs(pairs - rate**2) < 4 * (rate**2 / count) ** 0.5
    batch, full = source.batch(0, 64), WorldSource(SHAPES, tokenize, seed=3).batch(0, 64)
    np.testing.assert_array_equal(batch["image"], full["image"])
    np.testing.assert_array_equal(batch["ids"], np.where(gone[:64, None], 0, full["ids"]))
    np.testing.assert_array_equal(batch["mask"].any(1), ~gone[:64])
    # Another seed drops others, and what is drawn does not decide.
    assert (gone != dropout_mask(4, rate, 0, count)).any()
    _, captions, _ = shapes.sample_batch(3, range(count))
    complete = np.array([len(shapes.parse(text)) == len(shapes.ATTRIBUTES) for text in captions])
    share, others = gone[complete].mean(), gone[~complete].mean()
    assert abs(share - others) < 4 * (rate / complete.sum()) ** 0.5


@pytest.mark.parametrize("share", [0, 1])
def test_dropout_of_none_and_of_all(share):
    assert dropout_mask(0, share, 0, 50).tolist() == [bool(share)] * 50


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: WorldSource("no.such", tokenize, 0), r"world: found 'no.such' \(No module named"),
        (lambda: WorldSource("", tokenize, 0), "world: found ''"),
        (lambda: WorldSource(".shapes", tokenize, 0), "world: found '.shapes'"),
        (lambda: WorldSource("json", tokenize, 0), "'json'; expected a module with sample_batch"),
        (lambda: WorldSource(SHAPES, tokenize, 0, 1.5), "dropout: found 1.5; expected a share"),
        (lambda: WorldSource(SHAPES, tokenize, 0, float("nan")), "dropout: found nan"),
        (lambda: WorldSource(SHAPES, tokenize, -1), "seed: found -1; expected 0 to 2.64 - 1"),
        (lambda: prompt_source(seed=-1), "seed: found -1; expected 0 to 2.64 - 1"),
        (lambda: EmbeddingSource(None, -1), "seed: found -1; expected 0 to 2.64 - 1"),
        (lambda: LatentSource(None, -1), "seed: found -1; expected 0 to 2.64 - 1"),
        (lambda: LatentSource(None, 0, 1.5), "dropout: found 1.5; expected a share"),
        (lambda: ImageSource(None, (8, 8), tokenize, -1), "seed: found -1; expected 0 to 2.64 - 1"),
        (lambda: ImageSource(None, (8, 8), tokenize, 0, -0.1), "dropout: found -0.1; expected"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
