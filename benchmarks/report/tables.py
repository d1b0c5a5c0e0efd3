"""What was measured, a table for each device: ops, layers, models."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from .records import (
    Figure,
    Record,
    divide,
    fastest,
    group_cases,
    is_timed,
    list_baselines,
    list_devices,
    list_ours,
)
from .words import NOTHING, show_figure, show_time, write_table

LAYERS = ("layer", "layer-of-given-tokens")
# what records call the published way, and how it is called
PUBLISHED = ("eager/stream", "argsort/stream", "sdpa/stream")


def write_kernels(records: Sequence[Record]) -> str:
    """Each op: ours, the published way, and the strongest other."""
    wanted = [r for r in records if is_timed(r) and r["case"] not in (*LAYERS, "model")]
    head = (
        "op, problem, dtype", "ours", "as published", "strongest other",
        "over published", "over strongest", "of the ceiling",
    )  # fmt: skip
    return _by_device(wanted, head, _kernel_row)


def _kernel_row(name: str, contenders: list[Record]) -> list[str]:
    ours, strongest = fastest(list_ours(contenders)), fastest(list_baselines(contenders))
    published = fastest(r for way in PUBLISHED for r in list_baselines(contenders, way))
    share = None
    if ours is not None and "share_of_ceiling" in ours:
        share = Figure.of(ours["share_of_ceiling"], [ours])
    return [
        name,
        *map(show_time, (ours, published, strongest)),
        _show(divide(published, ours)),
        _show(divide(strongest, ours)),
        _show(share, "%"),
    ]


# the columns of layers: their titles, and what they are called in records
_OTHERS = {
    "eager": "eager/stream",
    "eager, in a graph": "eager/graph",
    "eager, compiled": "eager/compiled",
    "library's parts": "library/*",
    "all tokens": "dense/*",
}


def write_layers(records: Sequence[Record]) -> str:
    """Each partial layer: ours, and how many times longer the others take."""
    wanted = [r for r in records if is_timed(r) and r["case"] in LAYERS]
    return _by_device(wanted, ("problem, dtype", "ours", *_OTHERS), _layer_row)


def _layer_row(name: str, contenders: list[Record]) -> list[str]:
    ours = fastest(list_ours(contenders))
    cells = [name.removeprefix("layer, "), show_time(ours)]
    for pattern in _OTHERS.values():
        other = fastest(list_baselines(contenders, pattern))
        cells.append(_show(divide(other, ours)))
    return cells


def write_models(records: Sequence[Record]) -> str:
    """Whole runs and their steps, beside those of the dense model in its fastest way."""
    head = (
        "model, policy", "run", "times faster", "times fewer FLOPs", "full over dense step",
        "partial over dense step", "its share of FLOPs", "peak memory",
    )  # fmt: skip
    records = [r for r in records if r["case"] == "model" and is_timed(r)]
    written = []
    for device in list_devices(records):
        cases = group_cases(r for r in records if r["device"] == device).values()
        rows = [row for contenders in cases for row in _model_rows(contenders)]
        written.append(f"**{device}**\n\n{write_table(head, rows)}")
    return "\n\n".join(written) or NOTHING


def _model_rows(contenders: Sequence[Record]) -> Iterator[list[str]]:
    by_policy: dict[tuple[str, ...], list[Record]] = {}
    for record in contenders:
        name = tuple(record[field] for field in ("policy", "backend", "modulation"))
        by_policy.setdefault(name, []).append(record)
    dense = [r for r in contenders if r["policy"] == "dense" and r["baseline"]]
    for (policy, backend, modulation), found in by_policy.items():
        if found[0] in dense:
            continue
        notes = {"published": "as published", "precomputed": "modulation precomputed"}
        names = [policy, *(notes[name] for name in (backend, modulation) if name in notes)]
        run, dense_run = _best(found, "run"), _best(dense, "run")
        full, partial, step = (
            _best(found, "full_step"), _best(found, "partial_step"), _best(dense, "dense_step"),
        )  # fmt: skip
        yield [
            f"{found[0]['shape']}, {', '.join(names)}",
            show_time(run),
            _show(divide(dense_run, run)),
            _show(run and Figure.of(run["flops_ratio"], [run])),
            _show(divide(full, step)),
            _show(divide(partial, step), "%"),
            _show(partial and Figure.of(1 / partial["flops_ratio"], [partial]), "%"),
            f"{_show_memory(run)} (dense {_show_memory(dense_run)})",
        ]


def _best(records: Iterable[Record], what: str) -> Record | None:
    return fastest(r for r in records if r["what"] == what)


def _show_memory(record: Record | None) -> str:
    if record is None or record["peak_bytes"] is None:
        return "-"
    return f"{record['peak_bytes'] / 1e9:.2f} GB"


def _show(figure: Figure | None, unit: str = "x") -> str:
    return "-" if figure is None else show_figure(figure, unit)


def _by_device(
    records: Iterable[Record], head: Sequence[str], write_row: Callable[..., list[str]]
) -> str:
    records = list(records)
    written = []
    for device in list_devices(records):
        cases = group_cases(r for r in records if r["device"] == device)
        rows = [
            write_row(f"{case}, {shape}, {dtype}", contenders)
            for (_, case, shape, dtype, _), contenders in cases.items()
        ]
        written.append(f"**{device}**\n\n{write_table(head, rows)}")
    return "\n\n".join(written) or NOTHING
