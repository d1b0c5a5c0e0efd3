"""Time, as the device itself tells it: a host's clock round asynchronous calls says nothing."""

import time
from collections.abc import Callable, Mapping
from math import ceil

import torch


class DeviceClock:
    """Seconds, by the events of a CUDA stream, for a runner that wants a clock to read."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.last = _record_event()

    def __call__(self) -> float:
        """Wait for what was launched, and return the device's time since the start.

        Differences are summed in float64: an event gives float32, too coarse after some seconds.
        """
        event = _record_event()
        event.synchronize()
        self.seconds += self.last.elapsed_time(event) / 1e3
        self.last = event
        return self.seconds


def make_clock(device: torch.device) -> Callable[[], float]:
    """The clock to time work on ``device`` with."""
    return DeviceClock() if device.type == "cuda" else time.perf_counter


def time_in_turn(
    contenders: Mapping[str, Callable[[], object]],
    device: torch.device,
    samples: int,
    max_repeats: int = 1,
    enough_seconds: float = 0.01,
) -> dict[str, list[float]]:
    """The seconds that one run of each contender takes, ``samples`` times, all in turn.

    In turn, so that a drift of the device's clocks meets them alike. A sample is the mean over as
    many runs as last for ``enough_seconds``, but no more than ``max_repeats``.
    """
    clock = make_clock(device)
    repeats = {}
    for name, run in contenders.items():
        once = _time(run, 1, clock)
        repeats[name] = min(max_repeats, ceil(enough_seconds / max(once, 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(samples):
        for name, run in contenders.items():
            seconds[name].append(_time(run, repeats[name], clock))
    return seconds


def capture(run: Callable[[], object]) -> Callable[[], None]:
    """The replay of a CUDA graph of ``run``, which must have run before."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _time(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) / repeats


def _record_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
