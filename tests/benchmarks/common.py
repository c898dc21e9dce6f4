"""Shared parts of the benchmarks: figures, network sizes and programs, clocks."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.diffusion.denoiser import Denoiser
from gadjax.diffusion.schedules import DDPM
from gadjax.models import pixart
from gadjax.models.module import functional
from gadjax.models.pixart.net import Config
from gadjax.types import Batch, Cond

MIB = 2**20


@dataclass(frozen=True)
class Figure:
    """One measured number.

    value: None where it could not be measured; `note` then has the reason.
    most, least: its aim, where it has one.
    note: conditions of the measurement.
    """

    name: str
    value: float | None
    most: float | None = None
    least: float | None = None
    note: str = ""

    @property
    def aim(self) -> str:
        if self.most is None and self.least is None:
            return ""
        return f"<= {self.most:.3g}" if self.least is None else f">= {self.least:.3g}"

    @property
    def holds(self) -> bool | None:
        """True if the aim is met; None without a value or an aim."""
        if self.value is None or not self.aim:
            return None
        return self.value <= self.most if self.least is None else self.value >= self.least


@dataclass(frozen=True)
class Size:
    """Size of a PixArt. side: of the latents, whose tokens are side^2 / 4. text: prompt tokens."""

    layers: int
    heads: int
    head_dim: int
    side: int
    text: int = 16
    caption: int = 64
    batch: int = 1

    @property
    def tokens(self) -> int:
        return (self.side // 2) ** 2

    @property
    def config(self) -> Config:
        return Config(
            num_attention_heads=self.heads,
            attention_head_dim=self.head_dim,
            num_layers=self.layers,
            sample_size=self.side,
            caption_channels=self.caption,
        )

    def __str__(self) -> str:
        return f"L{self.layers} d{self.heads * self.head_dim}, {self.tokens} tokens"


# PixArt-XL at 512 and at 1024 pixels, as its published configurations say.
XL_512 = Size(28, 16, 72, 64, text=120, caption=4096)
XL_1024 = Size(28, 16, 72, 128, text=120, caption=4096)


def make_network(size: Size, dtype=jnp.float32, remat: bool | str = True):
    """Network as pure functions, and as a denoiser."""
    network = functional(pixart.FAMILY.build(size.config, dtype=dtype, remat=remat))
    predict = pixart.FAMILY.predictor(network.apply, size.config)
    text_kv = partial(network.apply, method=pixart.FAMILY.text_kv)
    return network, Denoiser(predict, DDPM(), "eps", text_kv=text_kv)


def make_batch(size: Size, seed: int = 0) -> Batch:
    """Random noises and prompts; every prompt is as long as it may be."""
    rng = np.random.default_rng(seed)
    b, side = size.batch, size.side

    def cond():
        text = jnp.asarray(rng.standard_normal((b, size.text, size.caption), np.float32))
        extras = pixart.FAMILY.extras(size.config, b, 8 * side, 8 * side)
        return Cond(text, jnp.ones((b, size.text), jnp.int32), extras)

    return Batch(
        cond=cond(),
        null=cond(),
        noise=jnp.asarray(rng.standard_normal((b, side, side, 4), np.float32)),
        key=jax.random.split(jax.random.key(seed), b),
        stratum=jnp.arange(b, dtype=jnp.int32),
    )


def clock() -> Callable[[], float]:
    """Clock in seconds: processor time on a CPU, which others may share; else wall time."""
    return time.process_time if jax.default_backend() == "cpu" else time.perf_counter


def seconds(runs: dict[str, Callable[[], object]], rounds: int = 3) -> dict[str, float]:
    """Shortest time of `rounds` runs of each program, in turn, after one that is not counted.

    A run does its work, or returns the arrays that it makes.
    """
    now, times = clock(), {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            begin = now()
            jax.block_until_ready(run())
            if turn:
                times[name].append(now() - begin)
    return {name: min(values) for name, values in times.items()}


def temp(compiled) -> float:
    """Temporary bytes of a compiled program, beside its arguments and results."""
    return float(compiled.memory_analysis().temp_size_in_bytes)


def relative(value, expected) -> float:
    """Relative error |value - expected| / |expected| over all leaves."""
    return (_dot(value, expected, np.subtract) / _dot(expected, expected)) ** 0.5


def cosine(a, b) -> float:
    return _dot(a, b) / (_dot(a, a) * _dot(b, b)) ** 0.5


def _dot(a, b, f=None) -> float:
    """Inner product <a, b>, or with f the squared norm of f(a, b), in float64."""
    total = 0.0
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        x, y = (np.asarray(v, np.float64).ravel() for v in (x, y))
        x, y = (x, y) if f is None else (f(x, y),) * 2
        total += float(x @ y)
    return total
