"""Targets and first predictions beside what was measured, and why they differ."""

from collections.abc import Mapping, Sequence

from . import design, targets
from .claims import Claim
from .records import Figure, Record, is_gpu, list_devices
from .words import NOT_MEASURED, show_figure, write_table

# a prediction that is off by more needs an explanation
FACTOR = 1.5
UNEXPLAINED = "**unexplained**"


def write_gpu_targets(records: Sequence[Record], predicted: Sequence[Record], name: str) -> str:
    """Each target, what is predicted of the device of that name, and whether it is met."""
    devices = _devices(records, on_gpu=True)
    rows = []
    for claim in targets.ON_GPU:
        expected = claim.measure(predicted)
        cell = "-" if expected is None else show_figure(expected, claim.unit)
        found = [_judge(claim, figure) for figure in _measure(claim, records, devices)]
        rows.append([claim.what, _show_bounds(claim), cell, *found])
    head = ("target", "wanted", f"predicted, {name}", *(devices or ["measured"]))
    return write_table(head, rows)


def write_cpu_targets(records: Sequence[Record]) -> str:
    """Each target, and whether it is met."""
    devices = _devices(records, on_gpu=False)
    rows = []
    for claim in targets.ON_CPU:
        found = [_judge(claim, figure) for figure in _measure(claim, records, devices)]
        rows.append([claim.what, _show_bounds(claim), *found])
    return write_table(("target", "wanted", *(devices or ["measured"])), rows)


def write_design(records: Sequence[Record], explanations: Mapping[str, str]) -> str:
    """What was predicted at first, and what came of it."""
    devices = _devices(records, on_gpu=True)
    rows = []
    for claim in design.list_claims():
        figures = _measure(claim, records, devices)
        shown = [show_figure(figure, claim.unit) for figure in figures]
        is_off = any(f is not None and not claim.is_met_by(f.value, FACTOR) for f in figures)
        why = explanations.get(claim.key, UNEXPLAINED if is_off else "")
        rows.append([claim.what, _show_bounds(claim), *shown, why])
    head = ("prediction", "predicted", *(devices or ["measured"]), "why they differ")
    return write_table(head, rows)


def _devices(records: Sequence[Record], on_gpu: bool) -> list[str]:
    return [device for device in list_devices(records) if is_gpu(device) == on_gpu]


def _measure(
    claim: Claim, records: Sequence[Record], devices: Sequence[str]
) -> list[Figure | None]:
    """On each device; where there is none, nothing."""
    return [claim.measure([r for r in records if r["device"] == d]) for d in devices] or [None]


def _judge(claim: Claim, figure: Figure | None) -> str:
    if figure is None:
        return NOT_MEASURED
    verdict = "met" if claim.is_met_by(figure.value) else "**missed**"
    return f"{show_figure(figure, claim.unit)}, {verdict}"


def _show_bounds(claim: Claim) -> str:
    low, high = (
        None if bound is None else show_figure(Figure(bound, False), claim.unit)
        for bound in (claim.low, claim.high)
    )
    if low == high:
        return str(low)
    if high is None:
        return f"at least {low}"
    return f"at most {high}" if low is None else f"{low} to {high}"
