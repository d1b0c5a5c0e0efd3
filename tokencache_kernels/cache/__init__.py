"""Storage between steps, and nothing else."""

from .features import FeatureCache
from .loans import Loans
from .tokens import TokenState
from .trend import NO_TREND, Trend

__all__ = ["NO_TREND", "FeatureCache", "Loans", "TokenState", "Trend"]
