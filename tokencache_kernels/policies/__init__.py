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
from .plan import Plan, StepPlan, cache_bytes, make_plan, published_cache_bytes
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
from .selectors import GivenSelector, RandomSelector, ScoreSelector, Selector
from .shapes import (
    Costs,
    ModelShape,
    ModuleShape,
    StackShape,
    count_modulation,
    model_shape,
    published_shape,
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
    "REUSE",
    "ROUTER_PRESETS",
    "Action",
    "AdaptiveSchedule",
    "CacheRouter",
    "Carrier",
    "Chebyshev",
    "ContentPredictor",
    "Costs",
    "Decision",
    "DuCaConfig",
    "FactorRouter",
    "GivenSelector",
    "Hermite",
    "IntervalSchedule",
    "LastStepFull",
    "LayerGroup",
    "LearningToCacheConfig",
    "ModelShape",
    "ModuleShape",
    "Newton",
    "PercentileSchedule",
    "Plan",
    "Policy",
    "Predictor",
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
    "count_modulation",
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
    "model_shape",
    "published_cache_bytes",
    "published_shape",
    "random_tokens",
    "rank_scores",
    "save_predictor",
    "save_router",
    "save_table",
    "taylor_seer",
]
