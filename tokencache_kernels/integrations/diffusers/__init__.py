"""One line on a diffusers transformer; the only place that imports diffusers' hooks."""

from .apply import apply_token_cache, remove_token_cache, reset_token_cache, token_cache_context

__all__ = ["apply_token_cache", "remove_token_cache", "reset_token_cache", "token_cache_context"]
