"""Token-wise caching for diffusion transformers: fused ops, policies, one line for diffusers.

Names are loaded on first use: importing the package imports neither torch nor Triton.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

# a name is exported to a type checker by its alias
if TYPE_CHECKING:
    from .errors import *  # noqa: F403, I001
    from .ops import *  # noqa: F403
    from .policies import (
        DuCaConfig as DuCaConfig,
        LearningToCacheConfig as LearningToCacheConfig,
        ToCaConfig as ToCaConfig,
        TokenCacheConfig as TokenCacheConfig,
        fora as fora,
        import_router as import_router,
        load_predictor as load_predictor,
        load_router as load_router,
        random_tokens as random_tokens,
        taylor_seer as taylor_seer,
    )

_HOMES = {
    ".errors": (
        "BackendUnavailableError",
        "CacheMissError",
        "DivergedError",
        "TokenCacheError",
        "UnsupportedInputError",
    ),
    ".ops": (
        "QkNorm",
        "RowNorm",
        "add_branches",
        "add_branches_",
        "attention",
        "attention_entropy",
        "attention_received",
        "attention_with_entropy",
        "blend",
        "drop_packed_weights",
        "gather_modulate",
        "gather_rows",
        "head_norms",
        "invert_indices",
        "linear",
        "linear_scatter",
        "linear_scatter_",
        "mlp",
        "mlp_",
        "project_qkv",
        "project_qkv_",
        "row_pass",
        "row_pass_",
        "scatter_rows",
        "scatter_rows_",
        "select_cycle",
        "select_cycle_",
        "select_tokens",
        "select_tokens_",
        "token_change",
    ),
    ".policies": (
        "DuCaConfig",
        "LearningToCacheConfig",
        "ToCaConfig",
        "TokenCacheConfig",
        "fora",
        "import_router",
        "load_predictor",
        "load_router",
        "random_tokens",
        "taylor_seer",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name], __name__), name)
