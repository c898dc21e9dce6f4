"""Data sources: training data as a pure function of the sample index, without iterator state.

Sample i of a source is the same for every batch size and number of processes, so a run resumes at
update * batch on any mesh; the critic's updates count as well. Process p of P takes
batch(update * B + p * B / P, B / P).
"""

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import islice
from types import ModuleType
from typing import Protocol, TypeVar

import grain
import numpy as np

from gadjax.data.embeddings import Embeddings
from gadjax.data.images import Pictures
from gadjax.errors import InputError
from gadjax.seeds import check_seed

T = TypeVar("T")
# Tokenizer: B prompts, None for no prompt -> ids_BL, mask_BL.
Tokenize = Callable[[Sequence[str | None]], tuple[np.ndarray, np.ndarray]]


class Source(Protocol):
    """Endless stream of samples, as arrays by name with the batch axis first."""

    def batch(self, index: int, size: int) -> dict[str, np.ndarray]:
        """Return samples index .. index + size - 1 of the stream."""
        ...


@dataclass(frozen=True)
class Order:
    """Shuffled indices 0 .. count - 1, reshuffled every epoch, determined by `seed`."""

    count: int
    seed: int

    @cached_property
    def _dataset(self) -> grain.MapDataset:
        # Every epoch has another order: repeat() requests ever larger indices, and shuffle() takes
        # its seed from the epoch of an index.
        return grain.MapDataset.range(self.count).seed(self.seed).shuffle().repeat()

    def __call__(self, index: int, size: int) -> np.ndarray:
        """Return entries index .. index + size - 1 of the stream, int32 [size]."""
        return np.array([self._dataset[i] for i in range(index, index + size)], np.int32)


def dropout_mask(seed: int, share: float, index: int, size: int) -> np.ndarray:
    """Caption dropout for classifier-free guidance (Ho & Salimans, arXiv:2207.12598).

    Args:
        seed: seed of the source.
        share: probability that a caption is dropped.
        index, size: samples index .. index + size - 1.

    Returns:
        True for the samples without their caption, bool [size].
    """
    # With a spawn key, because worlds draw sample i from the pair without one.
    keys = (np.random.SeedSequence([seed, i], spawn_key=(1,)) for i in range(index, index + size))
    return np.array([np.random.default_rng(key).random() < share for key in keys], bool)


class Seeded:
    """Base of sources with a seed, and where they have captions a share of them to drop."""

    seed: int
    dropout: float = 0.0

    def __post_init__(self):
        check_seed(self.seed)
        if not 0 <= self.dropout <= 1:
            raise InputError(f"dropout: found {self.dropout}; expected a share from 0 to 1")

    def drops(self, index: int, size: int) -> np.ndarray:
        """Samples without their caption, bool [size], as `dropout_mask`."""
        return dropout_mask(self.seed, self.dropout, index, size)


class Shuffled(Seeded):
    """Base of sources of len(self) samples in a shuffled order."""

    @cached_property
    def order(self) -> Order:
        return Order(len(self), self.seed)


@dataclass(frozen=True, eq=False)
class PromptSource(Shuffled):
    """Shuffled tokenized prompts: ids_NL and mask_NL, integers of any width.

    override: further arrays by name, N first (`gadjax.data.versions`), or None.
    batch: ids_BL, mask_BL, and the indices of the prompts which_B; all int32; and those arrays.

    Raises: InputError for a seed that `check_seed` refuses.
    """

    ids_NL: np.ndarray
    mask_NL: np.ndarray
    seed: int
    override: Mapping[str, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.ids_NL)

    def batch(self, index: int, size: int) -> dict[str, np.ndarray]:
        which = self.order(index, size)
        ids, mask = self.ids_NL[which], self.mask_NL[which]
        more = {name: x[which].astype(np.int32) for name, x in (self.override or {}).items()}
        return {"ids": ids.astype(np.int32), "mask": mask.astype(np.int32), "which": which} | more


@dataclass(frozen=True, eq=False)
class EmbeddingSource(Shuffled):
    """Shuffled precomputed prompt embeddings, in the order of PromptSource.

    batch: text_BLD in the folder's dtype, mask_BL int32, pooled_BP if the family has it, and the
    indices of the prompts which_B int32.

    Raises: InputError for a seed that `check_seed` refuses.
    """

    embeddings: Embeddings
    seed: int

    def __len__(self) -> int:
        return len(self.embeddings.prompts)

    def batch(self, index: int, size: int) -> dict[str, np.ndarray]:
        which = self.order(index, size)
        return self.embeddings.texts(which) | {"which": which}


@dataclass(frozen=True, eq=False)
class ImageSource(Shuffled):
    """Shuffled captioned images of a folder, decoded on demand.

    size: (height, width) after scaling and cropping. dropout: share of captions that are replaced
    by the negative prompt.
    batch: ids_BL, mask_BL and the indices of the images which_B, int32; image_BHWC.

    Raises: InputError for a share outside 0 .. 1, a seed as above.
    """

    pictures: Pictures
    size: tuple[int, int]
    tokenize: Tokenize
    seed: int
    dropout: float = 0.0

    def __len__(self) -> int:
        return len(self.pictures.names)

    def batch(self, index: int, size: int) -> dict[str, np.ndarray]:
        which = self.order(index, size)
        captions = [self.pictures.captions[i] for i in which]
        ids, mask = self.tokenize(_drop_captions(captions, self.drops(index, size)))
        image = self.pictures.read(which, self.size)
        return {"ids": ids, "mask": mask, "image": image, "which": which}


@dataclass(frozen=True, eq=False)
class LatentSource(Shuffled):
    """Shuffled precomputed embeddings and latents, in the order of ImageSource.

    embeddings: with latents. dropout: as ImageSource's.
    batch: text_BLD in the folder's dtype, mask_BL and which_B int32, pooled_BP if the family
    has it, x0_BHWC float32.

    Raises: InputError for a share outside 0 .. 1, a seed as above.
    """

    embeddings: Embeddings
    seed: int
    dropout: float = 0.0

    def __len__(self) -> int:
        return len(self.embeddings.prompts)

    def batch(self, index: int, size: int) -> dict[str, np.ndarray]:
        which, drop_B = self.order(index, size), self.drops(index, size)
        batch = self.embeddings.texts(which) | {"which": which}
        for name, value in self.embeddings.null.items():
            batch[name][drop_B] = value
        return batch | {"x0": self.embeddings.latent_NHWC[which].astype(np.float32)}


@dataclass(frozen=True, eq=False)
class WorldSource(Seeded):
    """Captioned images of a synthetic world, rendered on demand; sample i is image i of the world.

    world: a module with sample_batch(seed, indices) -> (images_BHWC, captions, scenes), such as
    gadjax.worlds.shapes. dropout: as ImageSource's. batch: ids_BL and mask_BL int32, image_BHWC.

    Raises: InputError for a module that is not a world, a share outside 0 .. 1, a seed as above.
    """

    world: str
    tokenize: Tokenize
    seed: int
    dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        _world(self.world)

    def batch(self, index: int, size: int) -> dict[str, np.ndarray]:
        images, captions, _ = _world(self.world).sample_batch(self.seed, range(index, index + size))
        ids, mask = self.tokenize(_drop_captions(captions, self.drops(index, size)))
        return {"ids": ids, "mask": mask, "image": images}


@dataclass(frozen=True, eq=False)
class CachedSource:
    """Shuffled samples in memory: `arrays` by name, all with N samples first.

    batch: rows of the arrays.
    """

    arrays: dict[str, np.ndarray]
    seed: int

    @cached_property
    def order(self) -> Order:
        return Order(len(next(iter(self.arrays.values()))), self.seed)

    def batch(self, index: int, size: int) -> dict[str, np.ndarray]:
        which = self.order(index, size)
        return {name: array[which] for name, array in self.arrays.items()}


def _drop_captions(captions: Sequence[str], drop_B: np.ndarray) -> list[str | None]:
    return [None if drop else text for text, drop in zip(captions, drop_B, strict=True)]


def _world(name: str) -> ModuleType:
    try:
        module = import_module(name)
    except (ImportError, TypeError, ValueError) as error:
        raise InputError(f"world: found {name!r} ({error}); expected a module") from error
    if not hasattr(module, "sample_batch"):
        raise InputError(f"world: found {name!r}; expected a module with sample_batch")
    return module


def prefetch(
    fn: Callable[[int], T], start: int, stop: int, depth: int = 2
) -> Generator[T, None, None]:
    """Prefetch fn(start), ..., fn(stop - 1) in one thread; yields the results in order.

    An exception of fn is raised in its place in that order. Closing the iterator waits for the call
    in progress and ends the thread.

    Args:
        fn: function of the index.
        start, stop: range of the index.
        depth: largest number of results computed ahead of the consumer, at least 1.
    """
    if depth < 1:
        raise ValueError(f"depth of {depth}; at least 1")
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        indices = iter(range(start, stop))
        pending = deque(pool.submit(fn, index) for index in islice(indices, depth))
        try:
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(fn, index) for index in islice(indices, 1))
                yield result
        finally:
            for future in pending:
                future.cancel()
