"""The makers of predictors, where programs for version 0.1 import them; now in ``learn``."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """Look up ``make_table_predictor`` or ``make_content_predictor`` where it is now."""
    if name in ("make_table_predictor", "make_content_predictor"):
        return getattr(importlib.import_module("tokencache_kernels.learn.train_predictor"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
