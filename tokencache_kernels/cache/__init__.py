"""What is remembered between steps; storage only."""

from .features import NO_TREND, FeatureCache, Trend
from .tokens import TokenState

__all__ = ["NO_TREND", "FeatureCache", "TokenState", "Trend"]
