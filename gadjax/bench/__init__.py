"""Objectives tried in seconds, on teachers whose every answer is a formula."""

from gadjax.bench.bench import Bench
from gadjax.bench.result import Result, table
from gadjax.bench.teachers import Gaussian, Mixture

__all__ = ["Bench", "Gaussian", "Mixture", "Result", "table"]
