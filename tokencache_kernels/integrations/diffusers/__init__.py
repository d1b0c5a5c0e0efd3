"""One line on a diffusers transformer; the only place that imports diffusers' hooks."""

from .apply import apply_token_cache, remove_token_cache, reset_token_cache, token_cache_context
from .graphs import count_graph_steps
from .modulation import precompute_modulation, remove_precomputed_modulation

__all__ = [
    "apply_token_cache",
    "count_graph_steps",
    "precompute_modulation",
    "remove_precomputed_modulation",
    "remove_token_cache",
    "reset_token_cache",
    "token_cache_context",
]
