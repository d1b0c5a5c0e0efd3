"""``tokencache plan``: the work of a policy in each step, and its cost."""

import argparse
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..policies import (
    MODELS,
    DuCaConfig,
    Model,
    Plan,
    Policy,
    StepPlan,
    ToCaConfig,
    TokenCacheConfig,
    cache_bytes,
    fora,
    load_predictor,
    load_router,
    make_plan,
    published_cache_bytes,
    taylor_seer,
)

# by setting of a policy
_OPTIONS = {
    "preset": "--preset",
    "num_inference_steps": "--steps",
    "refresh_interval": "--refresh-interval",
    "fresh_ratio": "--fresh-ratio",
    "forecast_order": "--forecast-order",
    "trained": "--trained",
}
_ELEMENT_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


def _toca(model: Model, preset: str | None = None, **settings: Any) -> Policy:
    return ToCaConfig.preset(preset or model.preset, num_layers=model.preset_layers, **settings)


def _fora(
    model: Model,
    num_inference_steps: int | None = None,
    refresh_interval: int = 3,
    mixed_steps: bool = False,
) -> Policy:
    steps = _toca(model).num_inference_steps if num_inference_steps is None else num_inference_steps
    return fora(refresh_interval, steps)


def _duca(model: Model, **settings: Any) -> Policy:
    return DuCaConfig.preset(model.preset, num_layers=model.preset_layers, **settings)


def _taylor_seer(
    model: Model,
    num_inference_steps: int | None = None,
    refresh_interval: int = 5,
    forecast_order: int = 2,
) -> Policy:
    steps = _toca(model).num_inference_steps if num_inference_steps is None else num_inference_steps
    return taylor_seer(refresh_interval, steps, forecast_order)


def _l2c(model: Model, trained: Path) -> Policy:
    return load_router(trained)


def _tokencache(model: Model, trained: Path) -> Policy:
    predictor = load_predictor(trained)
    return TokenCacheConfig(predictor, predictor.num_steps)


@dataclass(frozen=True)
class _Row:
    """A policy's constructor for a model, and the options that it takes.

    ``is_published``: ``build(mixed_steps=True)`` gives the policy of ToCa's published code.
    """

    build: Callable[..., Policy]
    settings: tuple[str, ...]
    is_published: bool = False


_TOCA_SETTINGS = ("num_inference_steps", "refresh_interval", "fresh_ratio")
_POLICIES = {
    "toca": _Row(_toca, ("preset", *_TOCA_SETTINGS), is_published=True),
    "random": _Row(partial(_toca, seed=0), ("preset", *_TOCA_SETTINGS), is_published=True),
    "fora": _Row(_fora, ("num_inference_steps", "refresh_interval"), is_published=True),
    "duca": _Row(_duca, _TOCA_SETTINGS),
    "taylor-seer": _Row(
        _taylor_seer, ("num_inference_steps", "refresh_interval", "forecast_order")
    ),
    "l2c": _Row(_l2c, ("trained",)),
    "tokencache": _Row(_tokencache, ("trained",)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the picture and the policy."""
    parser.add_argument("--model", required=True, choices=MODELS)
    parser.add_argument("--height", type=int, help="of the picture in pixels")
    parser.add_argument("--width", type=int, help="of the picture in pixels")
    parser.add_argument("--text-tokens", type=int, help="the length of the prompt")
    parser.add_argument(
        "--batch", type=int, help="rows of a forward; guidance doubles the pictures"
    )
    parser.add_argument("--dtype", choices=_ELEMENT_SIZES, help="default: the published code's")
    parser.add_argument("--policy", default="toca", choices=_POLICIES)
    parser.add_argument("--preset", help="a published setting; default: the model's own")
    parser.add_argument(
        "--steps", dest="num_inference_steps", type=int, help="the sampler's; default: as published"
    )
    parser.add_argument("--refresh-interval", type=int, help="default: as published")
    parser.add_argument("--fresh-ratio", type=float, help="default: as published")
    parser.add_argument("--forecast-order", type=int, help="0, 1 or 2; default: 2")
    parser.add_argument(
        "--trained",
        type=Path,
        metavar="FILE",
        help="the router of l2c, the predictor of tokencache",
    )
    parser.add_argument(
        "--published", action="store_true", help="list the steps of the published code, not ours"
    )


def run(options: argparse.Namespace) -> int:
    """Print the steps, then the totals: ours, and the published code's where there is one."""
    model, row = MODELS[options.model], _POLICIES[options.policy]
    picture = {name: getattr(options, name) for name in ("height", "width", "text_tokens", "batch")}
    settings = _given_settings(options, row)
    dtype = options.dtype or model.dtype
    size = _ELEMENT_SIZES[dtype]

    shape = model.shape(**picture)
    plan = make_plan(row.build(model, **settings), shape)
    columns = {"ours": _totals(plan, cache_bytes(plan, shape, size))}
    if row.is_published and model.published is not None:
        shape = model.shape(**picture, as_published=True)
        published = make_plan(row.build(model, **settings, mixed_steps=True), shape)
        memory = published_cache_bytes(model.published, shape, size)
        columns = {"published": _totals(published, memory), **columns}
        plan = published if options.published else plan
    elif options.published:
        raise ValueError("--published must be left out where there is no published code")

    print(
        f"{options.model} under {options.policy}: {len(plan.steps)} steps, {shape.batch} in a "
        f"batch, {dtype}; the tokens computed in each, layer by layer\n"
    )
    print("\n".join(describe_steps(plan)) + "\n")
    _print_columns(columns)
    return 0


def _given_settings(options: argparse.Namespace, row: _Row) -> dict[str, Any]:
    settings = {}
    for name, option in _OPTIONS.items():
        value = getattr(options, name)
        if value is not None and name not in row.settings:
            raise ValueError(f"{option} must be left out for {options.policy}, got {value}")
        if value is not None:
            settings[name] = value
    if "trained" in row.settings and "trained" not in settings:
        raise ValueError(f"--trained must be given for {options.policy}, got nothing")
    return settings


def describe_steps(plan: Plan) -> list[str]:
    """The steps that do the same, and under them the fresh tokens of each module, by layer."""
    groups: dict[str, list[int]] = {}
    for index, step in enumerate(plan.steps):
        groups.setdefault(_describe_step(step), []).append(index)
    return [f"steps {_join_ranges(indices)}:{what}" for what, indices in groups.items()]


def _describe_step(step: StepPlan) -> str:
    if step.is_full:
        return " all"
    if step.is_skipped:
        return " no block runs"
    lines = []
    for stream, module in dict.fromkeys((site.stream, site.module) for site in step.decisions):
        fresh = step.num_fresh(stream, module)
        if any(fresh):
            lines.append(f"\n    {stream} {module}: {_join_equal(fresh)}")
    return "".join(lines) or " none"


def _join_ranges(indices: list[int]) -> str:
    """``0-2, 6`` for 0, 1, 2, 6."""
    starts = [index for index in indices if index - 1 not in indices]
    ends = [index for index in indices if index + 1 not in indices]
    return ", ".join(
        str(start) if start == end else f"{start}-{end}"
        for start, end in zip(starts, ends, strict=True)
    )


def _join_equal(counts: Iterable[int]) -> str:
    """``256 0x27`` for 256 and then 27 times 0."""
    runs = [(count, len(list(run))) for count, run in itertools.groupby(counts)]
    return " ".join(str(count) if times == 1 else f"{count}x{times}" for count, times in runs)


def _totals(plan: Plan, memory: dict[str, int]) -> dict[str, str]:
    """One column of the table of totals."""
    total = sum(memory.values())
    return {
        "full steps": str(len(plan.full_steps)),
        "TFLOP": f"{plan.flops / 1e12:.5g}",
        "dense TFLOP": f"{plan.dense_flops / 1e12:.5g}",
        "times fewer FLOPs": f"{plan.flops_ratio:.2f}",
        **{f"{name}, MiB": f"{size / 2**20:.1f}" for name, size in memory.items() if size},
        "cache, GB": f"{total / 1e9:.3f}",
    }


def _print_columns(columns: dict[str, dict[str, str]]) -> None:
    rows = dict.fromkeys(row for column in columns.values() for row in column)
    # the sum comes last, whatever either column has above it
    rows["cache, GB"] = rows.pop("cache, GB")
    print(f"{'':20}" + "".join(f"{title:>12}" for title in columns))
    for row in rows:
        cells = (column.get(row, "-") for column in columns.values())
        print(f"{row:20}" + "".join(f"{cell:>12}" for cell in cells))
