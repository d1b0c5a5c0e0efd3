"""What is remembered between steps; storage only."""

from .features import FeatureCache
from .tokens import TokenState

__all__ = ["FeatureCache", "TokenState"]
