"""Data are a function of a sample's number: any split, any process, every epoch another order."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from gadjax.data.embeddings import open_embeddings, write_embeddings
from gadjax.data.source import EmbeddingSource, PromptSource, WorldSource, prefetch
from gadjax.errors import InputError
from gadjax.worlds import shapes

N, L = 10, 3
SHAPES = "gadjax.worlds.shapes"


def tokenize(texts):
    """Lengths of the first words."""
    ids = np.zeros((len(texts), 14), np.int32)
    for row, text in zip(ids, texts, strict=True):
        lengths = [len(word) for word in text.split()]
        row[: len(lengths)] = lengths
    return ids, (ids > 0).astype(np.int32)


def prompt_source(seed=0, count=N):
    ids = np.arange(count * L, dtype=np.uint16).reshape(count, L)
    return PromptSource(ids, ids % 2, seed)


@pytest.fixture
def embedding_source(tmp_path):
    text = np.random.default_rng(0).normal(size=(N + 1, L, 2)).astype(np.float16)
    mask = np.arange((N + 1) * L).reshape(N + 1, L) % 2
    batches = [(text[:N], mask[:N])]
    write_embeddings(
        tmp_path / "text",
        [f"prompt {i}" for i in range(N)],
        batches,
        (text[N], mask[N]),
        fingerprint="abc",
        dtype="float16",
    )
    return EmbeddingSource(open_embeddings(tmp_path / "text"), seed=0)


@pytest.fixture(params=["prompts", "embeddings", "world"])
def source(request):
    if request.param == "embeddings":
        return request.getfixturevalue("embedding_source")
    world = WorldSource(SHAPES, tokenize, seed=3, dropout=0.5)
    return world if request.param == "world" else prompt_source()


def joined(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], strict=True)


@pytest.mark.parametrize("start", [0, 16, 8 * 10**9])
def test_any_split_gives_the_same_global_batch(source, start):
    whole = source.batch(start, 8)
    for size in (4, 2, 1):
        same(whole, joined([source.batch(i, size) for i in range(start, start + 8, size)]))
    # Whatever was asked for before.
    same(whole, source.batch(start, 8))


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


def test_embeddings_come_in_the_order_of_the_prompts(embedding_source):
    batch, prompts = embedding_source.batch(5, 9), prompt_source().batch(5, 9)
    np.testing.assert_array_equal(batch["which"], prompts["which"], strict=True)
    np.testing.assert_array_equal(batch["mask"], prompts["mask"], strict=True)
    assert batch["text"].dtype == np.float16 and type(batch["text"]) is np.ndarray
    expected = embedding_source.embeddings.text_NLD[batch["which"]]
    np.testing.assert_array_equal(batch["text"], expected)


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
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines() == [str(expected), "False"]


def test_a_world_gives_its_pictures_and_captions():
    batch = WorldSource(SHAPES, tokenize, seed=3).batch(20, 8)
    images, captions, _ = shapes.sample_batch(3, range(20, 28))
    ids, mask = tokenize(captions)
    same(batch, {"ids": ids, "mask": mask, "image": images})


def test_dropout_takes_its_share_of_captions_and_nothing_else():
    rate, count = 0.1, 4000
    source = WorldSource(SHAPES, tokenize, seed=3, dropout=rate)
    dropped = np.array([source.dropped(i) for i in range(count)])
    assert abs(dropped.mean() - rate) < 4 * (rate * (1 - rate) / count) ** 0.5
    # No memory of the sample before: pairs are as frequent as they are by chance.
    pairs = (dropped[1:] & dropped[:-1]).mean()
    assert abs(pairs - rate**2) < 4 * (rate**2 / count) ** 0.5
    batch, full = source.batch(0, 64), WorldSource(SHAPES, tokenize, seed=3).batch(0, 64)
    np.testing.assert_array_equal(batch["image"], full["image"])
    np.testing.assert_array_equal(batch["ids"], np.where(dropped[:64, None], 0, full["ids"]))
    np.testing.assert_array_equal(batch["mask"].any(1), ~dropped[:64])
    # Another seed drops others, and what is drawn does not decide.
    other = WorldSource(SHAPES, tokenize, seed=4, dropout=rate)
    assert (dropped != [other.dropped(i) for i in range(count)]).any()
    _, captions, _ = shapes.sample_batch(3, range(count))
    complete = np.array([len(shapes.parse(text)) == len(shapes.ATTRIBUTES) for text in captions])
    share, others = dropped[complete].mean(), dropped[~complete].mean()
    assert abs(share - others) < 4 * (rate / complete.sum()) ** 0.5


@pytest.mark.parametrize("dropout, expected", [(0, 0), (1, 50)])
def test_dropout_of_none_and_of_all(dropout, expected):
    source = WorldSource(SHAPES, tokenize, seed=0, dropout=dropout)
    assert sum(source.dropped(i) for i in range(50)) == expected


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: WorldSource("no.such", tokenize, 0), r"world: found 'no.such' \(No module named"),
        (lambda: WorldSource("", tokenize, 0), "world: found ''"),
        (lambda: WorldSource(".shapes", tokenize, 0), "world: found '.shapes'"),
        (lambda: WorldSource("json", tokenize, 0), "'json'; expected a module with sample_batch"),
        (lambda: WorldSource(SHAPES, tokenize, 0, 1.5), "dropout: found 1.5; expected a share"),
        (lambda: WorldSource(SHAPES, tokenize, 0, float("nan")), "dropout: found nan"),
        (lambda: WorldSource(SHAPES, tokenize, -1), "seed: found -1; expected zero or more"),
        (lambda: prompt_source(seed=-1), "seed: found -1; expected zero or more"),
        (lambda: EmbeddingSource(None, -1), "seed: found -1; expected zero or more"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetch_keeps_the_order_and_uses_one_thread():
    names = []

    def fn(index):
        names.append(threading.current_thread().name)
        return index**2

    assert list(prefetch(fn, 3, 20)) == [i**2 for i in range(3, 20)]
    assert set(names) == {"prefetch_0"} and workers() == []
    assert list(prefetch(fn, 5, 5)) == [] and list(prefetch(fn, 5, 4)) == []
    assert list(prefetch(fn, 0, 2, depth=9)) == [0, 1]
    with pytest.raises(ValueError, match="depth of 0"):
        next(prefetch(fn, 0, 3, depth=0))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_prefetch_runs_so_far_ahead_and_no_further(depth):
    started = []
    ahead = threading.Semaphore(0)

    def fn(index):
        started.append(index)
        ahead.release()
        return index

    items = prefetch(fn, 0, 10, depth)
    for taken in range(3):
        assert next(items) == taken
        # While the consumer holds `taken`, exactly `depth` later ones are computed.
        for _ in range(depth + 1 if taken == 0 else 1):
            assert ahead.acquire(timeout=5)
        time.sleep(0.02)
        assert started == list(range(taken + depth + 1))
    items.close()
    assert workers() == []


def test_prefetch_raises_in_turn_and_ends():
    def fn(index):
        if index == 3:
            raise InputError("sample 3")
        return index

    items = prefetch(fn, 0, 10)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="sample 3"):
        next(items)
    assert workers() == []
    assert list(items) == []


def test_closing_prefetch_ends_the_thread_and_drops_what_waits():
    started = []

    def fn(index):
        started.append(index)
        time.sleep(0.05)
        return index

    items = prefetch(fn, 0, 100, depth=4)
    assert next(items) == 0 and len(workers()) == 1
    items.close()
    assert workers() == [] and len(started) <= 3
    prefetch(fn, 0, 100).close()  # never begun
    for item in prefetch(fn, 0, 100):  # left and collected
        assert item == 0
        break
    assert workers() == []
