"""Policies: when (schedule) x where (router) x which (selector), and what they will cost."""

from .decisions import Action, Decision, Policy, Site, Step, count_fresh
from .plan import Plan, StepPlan, cache_bytes, make_plan
from .routers import FactorRouter, Router
from .schedules import AdaptiveSchedule, IntervalSchedule, Schedule
from .selectors import RandomSelector, ScoreSelector, Selector
from .shapes import (
    SHAPES,
    ModelShape,
    ModuleShape,
    StackShape,
    dit_shape,
    flux_shape,
    opensora_shape,
    pixart_shape,
)
from .toca import ToCaConfig, fora, random_tokens

__all__ = [
    "SHAPES",
    "Action",
    "AdaptiveSchedule",
    "Decision",
    "FactorRouter",
    "IntervalSchedule",
    "ModelShape",
    "ModuleShape",
    "Plan",
    "Policy",
    "RandomSelector",
    "Router",
    "Schedule",
    "ScoreSelector",
    "Selector",
    "Site",
    "StackShape",
    "Step",
    "StepPlan",
    "ToCaConfig",
    "cache_bytes",
    "count_fresh",
    "dit_shape",
    "flux_shape",
    "fora",
    "make_plan",
    "opensora_shape",
    "pixart_shape",
    "random_tokens",
]
