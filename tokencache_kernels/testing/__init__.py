"""Shipped because users test too: inputs, error budgets, tiny models."""

from .budget import assert_within_budget, error_budget
from .inputs import distinct_scores, in_float64, randn, random_indices
from .models import tiny_dit, tiny_flux, tiny_pixart
from .tape import Tape

__all__ = [
    "Tape",
    "assert_within_budget",
    "distinct_scores",
    "error_budget",
    "in_float64",
    "randn",
    "random_indices",
    "tiny_dit",
    "tiny_flux",
    "tiny_pixart",
]
