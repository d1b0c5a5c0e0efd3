"""Policies: when (schedule), where (router), which (selector), how (carrier); and their costs."""

from .carriers import REUSE, Carrier, Chebyshev, Hermite, Newton, Taylor
from .decisions import Action, Decision, Policy, Site, Step, count_fresh, list_remembered
from .duca import DuCaConfig
from .learning_to_cache import (
    ROUTER_PRESETS,
    CacheRouter,
    LearningToCacheConfig,
    RouterPreset,
    import_router,
    load_router,
    save_router,
)
from .models import MODELS, SHAPES, Model, PublishedCode, published_cache_bytes
from .plan import Plan, StepPlan, cache_bytes, make_plan
from .predictors import (
    ContentPredictor,
    Predictor,
    TablePredictor,
    load_predictor,
    rank_scores,
    save_predictor,
)
from .routers import FactorRouter, Router
from .run_plan import LayerGroup, RunPlan
from .schedules import AdaptiveSchedule, IntervalSchedule, LastStepFull, Schedule, StepSchedule
from .selectors import RandomSelector, ScoreSelector, Selector
from .shapes import (
    ModelShape,
    ModuleShape,
    StackShape,
    dit_shape,
    flux_shape,
    opensora_shape,
    pixart_shape,
)
from .step_table import StepTable, load_policy, load_table, save_table
from .toca import ToCaConfig, fora, random_tokens, taylor_seer
from .token_steps import TokenSteps, hsa, jit
from .tokencache import (
    PercentileSchedule,
    TokenCacheConfig,
    TwoPhaseSchedule,
    choose_blocks,
    count_fresh_tokens,
)

__all__ = [
    "MODELS",
    "REUSE",
    "ROUTER_PRESETS",
    "SHAPES",
    "Action",
    "AdaptiveSchedule",
    "CacheRouter",
    "Carrier",
    "Chebyshev",
    "ContentPredictor",
    "Decision",
    "DuCaConfig",
    "FactorRouter",
    "Hermite",
    "IntervalSchedule",
    "LastStepFull",
    "LayerGroup",
    "LearningToCacheConfig",
    "Model",
    "ModelShape",
    "ModuleShape",
    "Newton",
    "PercentileSchedule",
    "Plan",
    "Policy",
    "Predictor",
    "PublishedCode",
    "RandomSelector",
    "Router",
    "RouterPreset",
    "RunPlan",
    "Schedule",
    "ScoreSelector",
    "Selector",
    "Site",
    "StackShape",
    "Step",
    "StepPlan",
    "StepSchedule",
    "StepTable",
    "TablePredictor",
    "Taylor",
    "ToCaConfig",
    "TokenCacheConfig",
    "TokenSteps",
    "TwoPhaseSchedule",
    "cache_bytes",
    "choose_blocks",
    "count_fresh",
    "count_fresh_tokens",
    "dit_shape",
    "flux_shape",
    "fora",
    "hsa",
    "import_router",
    "jit",
    "list_remembered",
    "load_policy",
    "load_predictor",
    "load_router",
    "load_table",
    "make_plan",
    "opensora_shape",
    "pixart_shape",
    "published_cache_bytes",
    "random_tokens",
    "rank_scores",
    "save_predictor",
    "save_router",
    "save_table",
    "taylor_seer",
]
