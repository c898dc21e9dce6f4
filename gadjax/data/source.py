"""Training data as a pure function of a sample's number: no iterator, no state to save.

Sample i of a source is the same for every batch size and number of processes, so a run continues
at update * batch on any mesh; the critic's updates count as well. Process p of P takes
batch(update * B + p * B / P, B / P).
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
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
# B texts, None for no prompt -> ids_BL, mask_BL
Tokenize = Callable[[Sequence[str | None]], tuple[np.ndarray, np.ndarray]]


class Source(Protocol):
    """An endless stream, as arrays by name with a leading sample axis."""

    def batch(self, index: int, size: int) -> dict[str, np.ndarray]:
        """Samples index .. index + size - 1 of the stream."""
        ...


@dataclass(frozen=True)
class Order:
    """0 .. count - 1 again and again, each time in another order that `seed` decides."""

    count: int
    seed: int

    @cached_property
    def _dataset(self) -> grain.MapDataset:
        # Every pass has its own order: repeat() asks for ever larger numbers and shuffle() seeds
        # itself by the pass a number falls in.
        return grain.MapDataset.range(self.count).seed(self.seed).shuffle().repeat()

    def __call__(self, index: int, size: int) -> np.ndarray:
        """Places index .. index + size - 1 of the stream, int32 [size]."""
        return np.array([self._dataset[i] for i in range(index, index + size)], np.int32)


def dropped(seed: int, share: float, index: int, size: int) -> np.ndarray:
    """Which of samples index .. index + size - 1 go without their caption, bool [size].

    A share does, for classifier-free guidance (Ho & Salimans, arXiv:2207.12598).
    """
    # A spawn key, as worlds draw sample i from the bare pair.
    keys = (np.random.SeedSequence([seed, i], spawn_key=(1,)) for i in range(index, index + size))
    return np.array([np.random.default_rng(key).random() < share for key in keys], bool)


@dataclass(frozen=True, eq=False)
class PromptSource:
    """Shuffled prompts that were tokenised once: ids_NL and mask_NL, integers of any width.

    batch: ids_BL, mask_BL, and the prompts' numbers which_B; all int32.

    Raises: InputError for a seed that `check_seed` refuses.
    """

    ids_NL: np.ndarray
    mask_NL: np.ndarray
    seed: int

    def __post_init__(self):
        check_seed(self.seed)

    @cached_property
    def order(self) -> Order:
        return Order(len(self.ids_NL), self.seed)

    def batch(self, index: int, size: int) -> dict[str, np.ndarray]:
        which = self.order(index, size)
        ids, mask = self.ids_NL[which], self.mask_NL[which]
        return {"ids": ids.astype(np.int32), "mask": mask.astype(np.int32), "which": which}


@dataclass(frozen=True, eq=False)
class EmbeddingSource:
    """Shuffled prompts that were encoded ahead of time; the order is PromptSource's.

    batch: text_BLD in the folder's dtype, mask_BL int32, pooled_BP where there is one, and the
    prompts' numbers which_B int32.

    Raises: InputError for a seed that `check_seed` refuses.
    """

    embeddings: Embeddings
    seed: int

    def __post_init__(self):
        check_seed(self.seed)

    @cached_property
    def order(self) -> Order:
        return Order(len(self.embeddings.prompts), self.seed)

    def batch(self, index: int, size: int) -> dict[str, np.ndarray]:
        which = self.order(index, size)
        return self.embeddings.texts(which) | {"which": which}


@dataclass(frozen=True, eq=False)
class ImageSource:
    """Shuffled captioned pictures of a folder, decoded as they are needed.

    size: (height, width) that they are scaled and cut to. dropout: the share of captions that are
    replaced by what guidance leads away from.
    batch: ids_BL, mask_BL and the pictures' numbers which_B, int32; image_BHWC.

    Raises: InputError for a share outside 0 .. 1, a seed as above.
    """

    pictures: Pictures
    size: tuple[int, int]
    tokenize: Tokenize
    seed: int
    dropout: float = 0.0

    def __post_init__(self):
        check_seed(self.seed)
        _check_share(self.dropout)

    @cached_property
    def order(self) -> Order:
        return Order(len(self.pictures.names), self.seed)

    def batch(self, index: int, size: int) -> dict[str, np.ndarray]:
        which = self.order(index, size)
        captions = [self.pictures.captions[i] for i in which]
        ids, mask = self.tokenize(_without(captions, dropped(self.seed, self.dropout, index, size)))
        image = self.pictures.read(which, self.size)
        return {"ids": ids, "mask": mask, "image": image, "which": which}


@dataclass(frozen=True, eq=False)
class LatentSource:
    """What ImageSource gives, where pictures and captions were encoded ahead of time.

    embeddings: with latents. batch: text_BLD in the folder's dtype, mask_BL and which_B int32,
    x0_BHWC float32.

    Raises: InputError for a share outside 0 .. 1, a seed as above.
    """

    embeddings: Embeddings
    seed: int
    dropout: float = 0.0

    def __post_init__(self):
        check_seed(self.seed)
        _check_share(self.dropout)

    @cached_property
    def texts(self) -> EmbeddingSource:
        return EmbeddingSource(self.embeddings, self.seed)

    def batch(self, index: int, size: int) -> dict[str, np.ndarray]:
        batch, gone = self.texts.batch(index, size), dropped(self.seed, self.dropout, index, size)
        for name, value in self.embeddings.null.items():
            batch[name][gone] = value
        return batch | {"x0": self.embeddings.latent_NHWC[batch["which"]].astype(np.float32)}


@dataclass(frozen=True, eq=False)
class WorldSource:
    """Captioned pictures drawn as they are needed; sample i is number i of a world.

    world: a module with sample_batch(seed, indices) -> (images_BHWC, captions, scenes), such as
    gadjax.worlds.shapes. dropout: as ImageSource's. batch: ids_BL and mask_BL int32, image_BHWC.

    Raises: InputError for a module that is no world, a share outside 0 .. 1, a seed as above.
    """

    world: str
    tokenize: Tokenize
    seed: int
    dropout: float = 0.0

    def __post_init__(self):
        check_seed(self.seed)
        _check_share(self.dropout)
        _world(self.world)

    def batch(self, index: int, size: int) -> dict[str, np.ndarray]:
        images, captions, _ = _world(self.world).sample_batch(self.seed, range(index, index + size))
        ids, mask = self.tokenize(_without(captions, dropped(self.seed, self.dropout, index, size)))
        return {"ids": ids, "mask": mask, "image": images}


@dataclass(frozen=True, eq=False)
class CachedSource:
    """Shuffled samples that were made ready once: `arrays` by name, all with N leading.

    batch: the arrays' rows.
    """

    arrays: dict[str, np.ndarray]
    seed: int

    @cached_property
    def order(self) -> Order:
        return Order(len(next(iter(self.arrays.values()))), self.seed)

    def batch(self, index: int, size: int) -> dict[str, np.ndarray]:
        which = self.order(index, size)
        return {name: array[which] for name, array in self.arrays.items()}


def _without(captions: Sequence[str], gone: np.ndarray) -> list[str | None]:
    return [None if out else text for text, out in zip(captions, gone, strict=True)]


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise InputError(f"dropout: found {share}; expected a share from 0 to 1")


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
    """fn(start), ..., fn(stop - 1), computed in one thread up to `depth` ahead of the consumer.

    What fn raises is raised in its turn. Closing the iterator waits for the call in progress and
    ends the thread.
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
