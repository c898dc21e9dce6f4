"""Noises of many pictures, made batch by batch.

Those of 10,000 latents of 128 x 128 x 16 would take 10 GB. N pictures, P prompts, S seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gadjax.pipelines.sampling import Noises, noise_rows

Sets = Mapping[str, tuple[Sequence[str], Noises]]  # name -> prompts and noises of N pictures


@dataclass(frozen=True)
class SeedNoises:
    """Noises [S P, H, W, C] of P prompts at S seeds, seed after seed; made when asked for.

    first: the first seed.
    shared: let all prompts start from the noise of the first one.
    """

    first: int
    seeds: int
    prompts: int
    latent: tuple[int, int, int]
    shared: bool = False

    def __len__(self) -> int:
        return self.seeds * self.prompts

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        seeds, prompts = np.divmod(np.asarray(rows), self.prompts)
        chosen = np.zeros_like(prompts) if self.shared else prompts
        return noise_rows([self.first + int(seed) for seed in seeds], chosen, self.latent)

    def all(self) -> np.ndarray:
        """Noises as an array."""
        return self[np.arange(len(self))]


@dataclass(frozen=True)
class ChainedNoises:
    """Noises of several sets, one after another."""

    parts: Sequence[Noises]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        rows, start, noises = np.asarray(rows), 0, None
        for part in self.parts:
            inside = (rows >= start) & (rows < start + len(part))
            if inside.any():
                # As many rows of each part, so that JAX compiles one program for their noise.
                values = part[np.clip(rows - start, 0, len(part) - 1)]
                noises = values if noises is None else noises
                noises = np.where(inside[:, None, None, None], values, noises)
            start += len(part)
        return noises
