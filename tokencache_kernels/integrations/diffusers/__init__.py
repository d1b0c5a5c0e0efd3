"""One line on a diffusion transformer or its pipeline."""

from .apply import (
    apply_token_cache,
    remove_token_cache,
    reset_token_cache,
    token_cache_context,
)
from .captured_steps import count_graph_steps
from .descriptions import register_model
from .inspection import InspectedRun, InspectedSite, inspect_token_cache
from .modulation import precompute_modulation, remove_precomputed_modulation
from .summary import CacheSummary, cache_summary

__all__ = [
    "CacheSummary",
    "InspectedRun",
    "InspectedSite",
    "apply_token_cache",
    "cache_summary",
    "count_graph_steps",
    "inspect_token_cache",
    "precompute_modulation",
    "register_model",
    "remove_precomputed_modulation",
    "remove_token_cache",
    "reset_token_cache",
    "token_cache_context",
]
