"""``tokencache plan``: the work of a policy in each step, and its cost."""

import argparse
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..models import PUBLISHED, Published
from ..policies import (
    DuCaConfig,
    Plan,
    Policy,
    RandomSelector,
    StepPlan,
    ToCaConfig,
    TokenCacheConfig,
    cache_bytes,
    count_modulation,
    fora,
    load_predictor,
    load_router,
    make_plan,
    published_cache_bytes,
    published_shape,
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


# where nothing is published for a model: --steps, --refresh-interval, --fresh-ratio
_STEPS, _INTERVAL, _RATIO = 50, 3, 0.1


def _toca(
    model: Published,
    preset: str | None = None,
    num_inference_steps: int | None = None,
    refresh_interval: int | None = None,
    fresh_ratio: float | None = None,
    seed: int | None = None,
    mixed_steps: bool = False,
) -> ToCaConfig:
    name = preset or model.preset
    if name:
        return ToCaConfig.preset(
            name, num_layers=model.preset_layers, num_inference_steps=num_inference_steps,
            refresh_interval=refresh_interval, fresh_ratio=fresh_ratio, seed=seed,
            mixed_steps=mixed_steps,
        )  # fmt: skip
    return ToCaConfig.constant(
        _RATIO if fresh_ratio is None else fresh_ratio,
        _INTERVAL if refresh_interval is None else refresh_interval,
        _STEPS if num_inference_steps is None else num_inference_steps,
        selector=None if seed is None else RandomSelector(seed),
    )


def _steps(model: Published, num_inference_steps: int | None) -> int:
    if num_inference_steps is not None:
        return num_inference_steps
    return _toca(model).num_inference_steps


def _fora(
    model: Published,
    num_inference_steps: int | None = None,
    refresh_interval: int = 3,
    mixed_steps: bool = False,
) -> Policy:
    return fora(refresh_interval, _steps(model, num_inference_steps))


def _duca(model: Published, **settings: Any) -> Policy:
    if not model.preset:
        return DuCaConfig(_toca(model, **settings))
    return DuCaConfig.preset(model.preset, num_layers=model.preset_layers, **settings)


def _taylor_seer(
    model: Published,
    num_inference_steps: int | None = None,
    refresh_interval: int = 5,
    forecast_order: int = 2,
) -> Policy:
    return taylor_seer(refresh_interval, _steps(model, num_inference_steps), forecast_order)


def _l2c(model: Published, trained: Path) -> Policy:
    return load_router(trained)


def _tokencache(model: Published, trained: Path) -> Policy:
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
    parser.add_argument("--model", required=True, choices=PUBLISHED)
    parser.add_argument("--height", type=int, help="of the picture in pixels")
    parser.add_argument("--width", type=int, help="of the picture in pixels")
    parser.add_argument("--frames", type=int, help="of a video's latents")
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
    model, row = PUBLISHED[options.model], _POLICIES[options.policy]
    names = ("height", "width", "frames", "text_tokens", "batch")
    picture = {name: getattr(options, name) for name in names}
    settings = _given_settings(options, row)
    dtype = options.dtype or model.dtype
    size = _ELEMENT_SIZES[dtype]

    shape = published_shape(model, **picture)
    plan = make_plan(row.build(model, **settings), shape)
    columns = {"ours": _totals(plan, cache_bytes(plan, shape, size))}
    if row.is_published and model.code is not None:
        shape = published_shape(model, **picture, as_published=True)
        published = make_plan(row.build(model, **settings, mixed_steps=True), shape)
        memory = published_cache_bytes(model.code, shape, size)
        columns = {"published": _totals(published, memory), **columns}
        plan = published if options.published else plan
    elif options.published:
        raise ValueError("--published must be left out where there is no published code")

    print(
        f"{options.model} under {options.policy}: {len(plan.steps)} steps, {shape.batch} in a "
        f"batch, {dtype}; the tokens computed in each, layer by layer"
    )
    print(_describe_modulation(model, size))
    print("\n".join(describe_steps(plan)) + "\n")
    _print_columns(columns)
    return 0


def _describe_modulation(model: Published, element_size: int) -> str:
    """Say which weights ``precompute_modulation`` frees."""
    count = count_modulation(model.spec, model.sizes)
    if not count:
        return ""
    share = f", {count / model.parameters:.1%} of all" if model.parameters else ""
    return (
        f"precompute_modulation: {count / 1e6:.0f} million weights, "
        f"{count * element_size / 1e9:.2f} GB, may leave the device between runs{share}\n"
    )


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
