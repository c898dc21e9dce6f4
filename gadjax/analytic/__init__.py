"""Objectives tried in seconds, on teachers whose every answer is a formula."""

from gadjax.analytic.bench import Bench
from gadjax.analytic.result import Result, table
from gadjax.analytic.teachers import Gaussian, Mixture

__all__ = ["Bench", "Gaussian", "Mixture", "Result", "table"]
