"""Pictures of what was measured; where nothing of a kind was, none is drawn."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from .records import (
    Record,
    fastest,
    group_cases,
    list_baselines,
    list_devices,
    list_ours,
)
from .tables import LAYERS

# device, horizontal, vertical, name of the curve
Point = tuple[str, float, float, str]


def draw_all(records: Sequence[Record], folder: Path) -> None:
    """Draw what can be drawn, anew; remove what cannot."""
    for name, plot in PLOTS.items():
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)
        if name in list_plots(records):
            plot.draw(records, path)


def list_plots(records: Sequence[Record]) -> list[str]:
    """The names of the plots that the records are enough for."""
    return [name for name, plot in PLOTS.items() if plot.collect(records)]


def collect_runs(records: Iterable[Record]) -> list[Point]:
    """Of each policy's run, how many times fewer FLOPs and how many times faster."""
    points = []
    runs = [r for r in records if r["case"] == "model" and r.get("what") == "run"]
    for (device, _, shape, _, _), contenders in group_cases(runs).items():
        dense = fastest(r for r in contenders if r["policy"] == "dense" and r["baseline"])
        for policy in dict.fromkeys(r["policy"] for r in list_ours(contenders)):
            run = fastest(r for r in list_ours(contenders) if r["policy"] == policy)
            if policy != "dense" and dense is not None and run is not None:
                faster = dense["median_ms"] / run["median_ms"]
                points.append((device, run["flops_ratio"], faster, f"{policy}, {shape}"))
    return points


def collect_layers(records: Iterable[Record]) -> list[Point]:
    """Of each partial layer, the share of fresh tokens, and how many times longer all take."""
    points = []
    layers = [r for r in records if r["case"] in LAYERS]
    for (device, _, _, dtype, _), found in group_cases(layers).items():
        dense, ours = fastest(list_baselines(found, "dense/*")), fastest(list_ours(found))
        if dense is not None and ours is not None:
            sizes = ours["sizes"]
            curve = f"{sizes['B']} x {sizes['N']} tokens, D = {sizes['D']}, {dtype}"
            gain = dense["median_ms"] / ours["median_ms"]
            points.append((device, 100 * sizes["S"] / sizes["N"], gain, curve))
    return points


def collect_kernels(records: Iterable[Record]) -> list[Point]:
    """Of our fastest kernel for each problem, the least time at the ceilings, and their share."""
    points = []
    ops = [r for r in records if "share_of_ceiling" in r and r["case"] not in LAYERS]
    for (device, case, *_), found in group_cases(ops).items():
        ours = fastest(list_ours(found))
        if ours is not None:
            share = ours["share_of_ceiling"]
            points.append((device, 1e3 * ours["median_ms"] * share, 100 * share, case))
    return points


def _draw_runs(records: Sequence[Record], path: Path) -> None:
    with _panels(collect_runs(records), path) as panels:
        for panel, points in panels:
            _draw_curves(panel, points, line="none")
            most = max(fewer for _, fewer, _, _ in points)
            panel.plot([1, most], [1, most], ":", color="grey", label="as fast as the FLOPs say")
            panel.set(xlabel="times fewer FLOPs", ylabel="times faster than dense, measured")
            panel.legend(fontsize="small")


def _draw_layers(records: Sequence[Record], path: Path) -> None:
    with _panels(collect_layers(records), path) as panels:
        for panel, points in panels:
            _draw_curves(panel, points)
            panel.axhline(1, linestyle=":", color="grey", label="break-even")
            panel.set(xlabel="fresh tokens (%)", ylabel="times faster than all tokens")
            panel.set_yscale("log")
            for ticks in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
                ticks("{x:g}")
            panel.legend(fontsize="small")


def _draw_kernels(records: Sequence[Record], path: Path) -> None:
    with _panels(collect_kernels(records), path) as panels:
        for panel, points in panels:
            _draw_curves(panel, points, line="none")
            panel.axhline(100, linestyle=":", color="grey")
            panel.set(xlabel="least time at the ceilings (us)", ylabel="of the ceiling (%)")
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter("{x:g}")
            panel.legend(fontsize="small", ncols=2)


class Plot(NamedTuple):
    """What it shows, how it is drawn, and the points that it needs."""

    title: str
    draw: Callable[[Sequence[Record], Path], None]
    collect: Callable[[Iterable[Record]], list[Point]]


# by name of the file
PLOTS = {
    "speed-flops": Plot("Speed of whole runs against their FLOPs", _draw_runs, collect_runs),
    "break-even": Plot("Partial layers over all tokens", _draw_layers, collect_layers),
    "roofline": Plot("Our ops under the roofline", _draw_kernels, collect_kernels),
}


def _draw_curves(panel, points: Iterable[Point], line: str = "-") -> None:
    curves: dict[str, list[tuple[float, float]]] = {}
    for _, x, y, name in points:
        curves.setdefault(name, []).append((x, y))
    for name, curve in curves.items():
        panel.plot(*zip(*sorted(curve), strict=True), linestyle=line, marker="o", label=name)


class _panels:
    """A figure with a panel for each device, saved at the end."""

    def __init__(self, points: Sequence[Point], path: Path):
        from matplotlib.figure import Figure

        self._path = path
        devices = list_devices({"device": device} for device, *_ in points)
        self._figure = Figure(figsize=(7 * len(devices), 4.5), layout="constrained")
        axes = self._figure.subplots(1, len(devices), squeeze=False)[0]
        self._panels = []
        for panel, device in zip(axes, devices, strict=True):
            panel.set_title(device, fontsize="medium")
            self._panels.append((panel, [point for point in points if point[0] == device]))

    def __enter__(self):
        return self._panels

    def __exit__(self, *_):
        self._figure.savefig(self._path, dpi=120)
