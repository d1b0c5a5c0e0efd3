"""What the roofline predicts of every benchmark, beside what was measured on such a device.

Predicted and measured are those of replayed graphs, but for what eager PyTorch is called for.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .records import Figure, Record, fastest, list_devices
from .verdicts import FACTOR, UNEXPLAINED
from .words import NOT_MEASURED, show_duration, show_figure, show_number, write_table

Prediction = Mapping[str, Any]


def write_kernels(
    predicted: Prediction, records: Sequence[Record], explanations: Mapping[str, str]
) -> str:
    """Ops: ours and the published way."""

    def show(one: Prediction) -> list[str]:
        name, eager, *_ = one["launches"]
        ms, launches = one["ms"], one["launches"]
        return [
            f"{one['case']}, {one['shape']}",
            f"{launches[name]:.0f} / {launches[eager]:.0f}",
            show_duration(one["floor_ms"]),
            show_duration(ms[f"{name}/graph"]),
            f"{show_number(ms[f'{eager}/stream'] / ms[f'{name}/graph'])}x",
        ]

    head = ("op, problem", "launches, ours / published", "least", "ours", "over published, eager")
    return _write(head, show, "kernels", predicted, records, explanations)


def write_layers(
    predicted: Prediction, records: Sequence[Record], explanations: Mapping[str, str]
) -> str:
    """Partial layers, over the published way and over all tokens."""

    def show(one: Prediction) -> list[str]:
        ms, launches = one["ms"], one["launches"]
        others = ("eager/stream", "eager/graph", "eager/compiled", "dense/graph")
        return [
            one["shape"],
            f"{launches['auto']:.1f} / {launches['eager']:.0f}",
            show_duration(one["floor_ms"]),
            show_duration(ms["auto/graph"]),
            *(
                f"{show_number(ms[other] / ms['auto/graph'])}x" if other in ms else "-"
                for other in others
            ),
        ]

    head = (
        "partial layer", "launches, ours / published", "least", "ours", "over published, eager",
        "in a graph", "compiled", "over all tokens, in a graph",
    )  # fmt: skip
    return _write(head, show, "layers", predicted, records, explanations)


def write_runs(
    predicted: Prediction, records: Sequence[Record], explanations: Mapping[str, str]
) -> str:
    """Whole runs, over the dense model."""
    runs = predicted["runs"]["predictions"]
    # its first contender, for each model
    dense = {one["shape"]: one for one in reversed(runs) if _names(one) == _DENSE}

    def show(one: Prediction) -> list[str]:
        base = dense[one["shape"]]
        step = base["steps_ms"]["dense_step"]
        shares = (one["steps_ms"].get(f"{kind}_step") for kind in ("full", "partial"))
        return [
            ", ".join((one["shape"], *_names(one))),
            show_duration(one["ms"]["graph"]),
            f"{show_number(base['ms']['graph'] / one['ms']['graph'])}x",
            f"{show_number(base['ms']['stream'] / one['ms']['stream'])}x",
            f"{show_number(base['ms']['compiled'] / one['ms']['graph'])}x",
            f"{show_number(base['flops'] / one['flops'])}x",
            *("-" if share is None else f"{100 * share / step:.0f}%" for share in shares),
        ]

    head = (
        "run", "in graphs", "over dense in a graph", "eager over eager", "over dense, compiled",
        "fewer FLOPs",
        "full step, of a dense one", "partial step, of a dense one",
    )  # fmt: skip
    return _write(head, show, "runs", predicted, records, explanations)


_DENSE = ("dense", "torch", "per-step")


def _names(one: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(one[name] for name in ("policy", "backend", "modulation"))


def as_records(predicted: Prediction) -> list[Record]:
    """As if they had been measured, ours in graphs, for claims to be read off them."""
    found = []
    for kind in ("kernels", "layers", "runs"):
        for one in predicted[kind]["predictions"]:
            for way, milliseconds in one["ms"].items():
                backend, _, mode = way.rpartition("/")
                backend = backend or one["backend"]
                is_ours = backend == "auto" or one.get("modulation") == "precomputed"
                if is_ours and mode != "graph":
                    continue
                found.append(
                    {
                        **one,
                        "device": "predicted",
                        "dirty": False,
                        "what": "run",
                        "backend": backend,
                        "mode": mode,
                        "baseline": not is_ours,
                        "median_ms": milliseconds,
                        "share_of_ceiling": one["floor_ms"] / milliseconds,
                    }
                )
    return found


def _write(
    head: Sequence[str],
    show: Callable[[Prediction], list[str]],
    kind: str,
    predicted: Prediction,
    records: Sequence[Record],
    explanations: Mapping[str, str],
) -> str:
    devices = [name for name in list_devices(records) if predicted["device"] in name]
    rows = []
    for one in predicted[kind]["predictions"]:
        names = (name for name in ("case", "shape", "policy", "backend", "modulation"))
        key = "/".join(("predicted", *(one[name] for name in names if name in one)))
        found = [_compare(one, [r for r in records if r["device"] == d]) for d in devices]
        is_off = any(f is not None and not 1 / FACTOR <= f.value <= FACTOR for f in found)
        why = explanations.get(key, UNEXPLAINED if is_off else "")
        rows.append([*show(one), *(map(show_figure, found) if found else [NOT_MEASURED]), why])
    measured = [f"measured over predicted, {device}" for device in devices] or ["measured"]
    table = write_table((*head, *measured, "why they differ"), rows)
    return f"{table}\n\nPredicted at commit {predicted[kind]['git'][:9]}."


def _compare(one: Prediction, records: Sequence[Record]) -> Figure | None:
    """How many times longer ours took in a graph than was predicted."""
    wanted = {name: one[name] for name in ("case", "shape", "dtype")}
    if "policy" in one:
        names = ("policy", "backend", "modulation")
        wanted |= {"what": "run", **{name: one[name] for name in names}}
    found = (r for r in records if wanted.items() <= r.items() and r.get("mode") == "graph")
    measured = fastest(r for r in found if "policy" in one or not r["baseline"])
    if measured is None:
        return None
    in_graph = one["ms"].get("graph") or one["ms"]["auto/graph"]
    return Figure.of(measured["median_ms"] / in_graph, [measured])
