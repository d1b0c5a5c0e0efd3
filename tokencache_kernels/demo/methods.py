"""The ways of saving work that the demo compares, each by a name such as ``toca-3``."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..models import PUBLISHED
from ..policies import (
    DuCaConfig,
    FactorRouter,
    LearningToCacheConfig,
    Newton,
    Policy,
    ScoreSelector,
    StepSchedule,
    StepTable,
    Taylor,
    ToCaConfig,
    TokenCacheConfig,
    TokenSteps,
    TwoPhaseSchedule,
    fora,
    hsa,
    jit,
    load_predictor,
    load_router,
    load_table,
    make_plan,
    published_shape,
    taylor_seer,
)
from ..policies.learning_to_cache import MAX_LOGIT, list_cached_counters
from .model import SHAPE, build_scheduler

PRESET = "dit-xl-ddim50"
NUM_LAYERS: int = SHAPE["num_layers"]


@dataclass(frozen=True)
class Method:
    """One way of drawing an image that takes the dense model ``dense_steps`` steps."""

    name: str
    title: str
    dense_steps: int
    steps: int
    policy: Policy | TokenSteps | None = None  # None runs the model as it is

    @property
    def family(self) -> str:
        """The name of all methods of one kind, whatever their numbers."""
        return self.name.split("-")[0]

    @property
    def flops_ratio(self) -> float:
        """The FLOP reduction over the blocks of the dense model's steps."""
        if self.policy is None:
            return self.dense_steps / self.steps
        if isinstance(self.policy, TokenSteps):
            return self.policy.flops_ratio
        return make_plan(self.policy, published_shape(PUBLISHED["demo"])).flops_ratio


def parse_method(name: str, steps: int) -> Method:
    """Build the method called ``name``, for an image that takes the dense model ``steps`` steps.

    ``random``, ``toca`` and ``duca`` follow the published setting of DiT-XL with that refresh
    interval, and with that percentage of fresh tokens as the base of its ratios. ``l2c`` and
    ``tokencache`` are the shipped trained policies, with that percentage as threshold and as
    fraction of cached tokens. ``l2c-last`` makes the last step full. ``calibrated`` is the shipped
    step table with that number of full steps. ``even`` spreads as many evenly, up to the last step,
    and forecasts every sub-layer by that order. ``carried`` forecasts the model's output instead,
    and runs nothing in between. ``uniform`` skips that percentage of the sub-layers in every second
    step, all of them in turn. A number right behind another name is the order of the forecast.

    Raises:
        ValueError: there is no such method, and the message lists the methods; or a policy was
            trained for another number of steps.
        FileNotFoundError: the file of a trained policy is missing.
    """
    for usage, build in _METHODS.items():
        match = re.fullmatch(_to_pattern(usage), name)
        if match is None:
            continue
        numbers = {key: int(value) for key, value in match.groupdict().items() if value is not None}
        if _fits(numbers):
            title, policy = build(steps, **numbers)
            return Method(name, title, steps, numbers.get("steps", steps), policy)
    raise ValueError(f"parse_method: name must be {', '.join(_METHODS)}, got {name!r}")


def parse_those_trained(names: Sequence[str], steps: int) -> list[Method]:
    """Build the methods, but leave out those trained for another number of steps, and say so."""
    methods = []
    for name in names:
        try:
            methods.append(parse_method(name, steps))
        except (ValueError, FileNotFoundError) as error:
            print(f"Without {name}: {error}")
    return methods


@contextlib.contextmanager
def applied(model: Any, method: Method) -> Iterator[None]:
    """Run the model under the method's policy inside the block, and as it is again after it."""
    if method.policy is None:
        yield
        return
    from ..integrations.diffusers import apply_token_cache, remove_token_cache

    scheduler = build_scheduler() if isinstance(method.policy, TokenSteps) else None
    apply_token_cache(model, method.policy, scheduler=scheduler)
    try:
        yield
    finally:
        remove_token_cache(model)


def _to_pattern(usage: str) -> str:
    optional = usage.replace("[", "(?:").replace("]", ")?")
    return re.sub(r"<(\w+)>", r"(?P<\1>\\d+)", optional)


def _fits(numbers: dict[str, int]) -> bool:
    at_least_one = all(numbers.get(key, 1) >= 1 for key in ("steps", "interval", "full"))
    return at_least_one and numbers.get("percent", 0) <= 100 and numbers.get("order", 0) <= 2


_Built = tuple[str, Policy | TokenSteps | None]


def _dense(total: int) -> _Built:
    return "dense", None


def _fewer(total: int, steps: int) -> _Built:
    return f"dense, {steps} steps", None


def _fora(total: int, interval: int) -> _Built:
    return f"FORA, every {interval}", fora(interval, total)


def _taylor(total: int, order: int, interval: int) -> _Built:
    return f"TaylorSeer {order}, every {interval}", taylor_seer(interval, total, order)


def _published(
    build: Callable[..., Policy],
    title: str,
    total: int,
    interval: int,
    percent: int | None = None,
    seed: int | None = None,
) -> _Built:
    policy = build(
        PRESET,
        num_inference_steps=total,
        num_layers=NUM_LAYERS,
        refresh_interval=interval,
        fresh_ratio=None if percent is None else percent / 100,
        seed=seed,
    )
    share = "" if percent is None else f", {percent} %"
    return f"{title}, every {interval}{share}", policy


def _forecasting(total: int, order: int, interval: int, percent: int | None = None) -> _Built:
    """ToCa whose stale tokens are forecast."""

    def build(name: str, **settings: Any) -> Policy:
        return replace(ToCaConfig.preset(name, **settings), carrier=Taylor(order))

    return _published(build, f"ToCa + forecast {order}", total, interval, percent)


def _l2c(total: int, percent: int | None = None) -> _Built:
    from .train_l2c import ROUTER

    router = load_router(ROUTER, num_layers=NUM_LAYERS, num_inference_steps=total)
    if percent is None:
        return "Learning-to-Cache", router
    return f"Learning-to-Cache, {percent} %", replace(router, threshold=percent / 100)


def _l2c_last(total: int) -> _Built:
    title, router = _l2c(total)
    assert isinstance(router, LearningToCacheConfig)
    return f"{title}, last full", replace(router, last_step_full=True)


def _l2c_forecast(total: int, order: int) -> _Built:
    title, router = _l2c(total)
    assert isinstance(router, LearningToCacheConfig)
    return f"{title} + forecast {order}", replace(router, carrier=Taylor(order))


def _tokencache_forecast(total: int, order: int) -> _Built:
    """Every second step full, which tames the tail, paid for by more tokens cached in between."""
    title, policy = _tokencache(total)
    assert isinstance(policy, TokenCacheConfig)
    schedule = TwoPhaseSchedule(1, 1)
    policy = replace(policy, schedule=schedule, cache_ratio=0.9, carrier=Taylor(order))
    return f"{title} + forecast {order}", policy


def _even(total: int, order: int, full: int) -> _Built:
    policy = ToCaConfig(
        StepSchedule.even(full, total),
        FactorRouter(0.0),
        ScoreSelector("none"),
        total,
        name="even",
        carrier=Taylor(order),
    )
    return f"forecast {order}, {full} even steps", policy


def _carried(total: int, order: int, full: int) -> _Built:
    steps = StepSchedule.even(full, total).steps
    return f"carried {order}, {full} even steps", StepTable.from_carrier(
        steps, Newton(order), total
    )


def _calibrated(total: int, full: int) -> _Built:
    from .calibrate import table_path

    table = load_table(table_path(full))
    if table.num_inference_steps != total:
        got = f"one for {table.num_inference_steps}"
        raise ValueError(f"calibrated-{full}: the table must be for {total} steps, got {got}")
    return f"calibrated, {full} steps", table


def _jit(total: int) -> _Built:
    return "JiT", jit(total)


def _hsa(total: int) -> _Built:
    return "HSA", hsa(total)


def _uniform(total: int, percent: int) -> _Built:
    """A router whose skips go round: in each step the share's worth of the sub-layers in turn."""
    width = 2 * NUM_LAYERS
    logits = torch.full((total, width), MAX_LOGIT)
    for turn, counter in enumerate(list_cached_counters(total, counts_down=True)):
        first, last = (place * width * percent // 100 for place in (turn, turn + 1))
        logits[counter, [entry % width for entry in range(first, last)]] = -MAX_LOGIT
    return f"every second step, {percent} % skipped", LearningToCacheConfig(logits, name="uniform")


def _tokencache(total: int, percent: int | None = None) -> _Built:
    from .train_tokencache import PREDICTOR

    policy = TokenCacheConfig(load_predictor(PREDICTOR), total)
    if percent is None:
        return "TokenCache", policy
    return f"TokenCache, {percent} % cached", replace(policy, cache_ratio=percent / 100)


# by usage: the constructor from a name's numbers and the steps of the dense model
_METHODS: dict[str, Callable[..., _Built]] = {
    "dense": _dense,
    "fewer-<steps>": _fewer,
    "fora-<interval>": _fora,
    "taylor<order>-<interval>": _taylor,
    "random-<interval>[-<percent>]": partial(
        _published, ToCaConfig.preset, "random tokens", seed=0
    ),
    "toca-<interval>[-<percent>]": partial(_published, ToCaConfig.preset, "ToCa"),
    "toca<order>-<interval>[-<percent>]": _forecasting,
    "duca-<interval>[-<percent>]": partial(_published, DuCaConfig.preset, "DuCa"),
    "calibrated-<full>": _calibrated,
    "even<order>-<full>": _even,
    "carried<order>-<full>": _carried,
    "tokencache<order>": _tokencache_forecast,
    "l2c<order>": _l2c_forecast,
    "l2c-last": _l2c_last,
    "tokencache[-<percent>]": _tokencache,
    "l2c[-<percent>]": _l2c,
    "uniform-<percent>": _uniform,
    "jit": _jit,
    "hsa": _hsa,
}
