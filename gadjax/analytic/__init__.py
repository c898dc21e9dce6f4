"""Closed-form teachers, on which an objective is tried in seconds."""

from gadjax.analytic.bench import Bench
from gadjax.analytic.result import Result, table
from gadjax.analytic.teachers import Gaussian, Mixture

__all__ = ["Bench", "Gaussian", "Mixture", "Result", "table"]
