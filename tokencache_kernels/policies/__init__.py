"""Policies: when (schedule) x where (router) x which (selector), and what they will cost."""

from .decisions import Action, Decision, Policy, Site, Step, count_fresh
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
from .schedules import AdaptiveSchedule, IntervalSchedule, Schedule
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
from .toca import ToCaConfig, fora, random_tokens
from .tokencache import (
    PercentileSchedule,
    TokenCacheConfig,
    TwoPhaseSchedule,
    choose_blocks,
    count_fresh_tokens,
)

__all__ = [
    "MODELS",
    "SHAPES",
    "Action",
    "AdaptiveSchedule",
    "ContentPredictor",
    "Decision",
    "FactorRouter",
    "IntervalSchedule",
    "Model",
    "ModelShape",
    "ModuleShape",
    "PercentileSchedule",
    "Plan",
    "Policy",
    "Predictor",
    "PublishedCode",
    "RandomSelector",
    "Router",
    "Schedule",
    "ScoreSelector",
    "Selector",
    "Site",
    "StackShape",
    "Step",
    "StepPlan",
    "TablePredictor",
    "ToCaConfig",
    "TokenCacheConfig",
    "TwoPhaseSchedule",
    "cache_bytes",
    "choose_blocks",
    "count_fresh",
    "count_fresh_tokens",
    "dit_shape",
    "flux_shape",
    "fora",
    "load_predictor",
    "make_plan",
    "opensora_shape",
    "pixart_shape",
    "published_cache_bytes",
    "random_tokens",
    "rank_scores",
    "save_predictor",
]
