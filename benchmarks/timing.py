"""Time, as the device itself tells it: a host's clock round asynchronous calls says nothing."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from math import ceil
from typing import Any

import torch


class DeviceClock:
    """Seconds, by the events of a CUDA stream, for a runner that wants a clock to read."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.last = _record_event()

    def __call__(self) -> float:
        """Wait for the launches, and return the device's time since the start.

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
    contenders: Mapping[Any, Callable[[], object]],
    device: torch.device,
    samples: int,
    sample_seconds: float = 0.005,
    all_seconds: float = 20,
) -> dict[Any, list[float]]:
    """The seconds that one run of each contender takes, ``samples`` times, all in turn.

    In turn, so that a drift of the device's clocks meets them alike. A sample is the mean over as
    many runs as last for ``sample_seconds``. Where all samples would take longer than
    ``all_seconds``, there are fewer of them, but no fewer than 5.
    """
    clock = make_clock(device)
    once = {name: _time(run, 1, clock) for name, run in contenders.items()}
    repeats = {name: max(1, ceil(sample_seconds / max(time, 1e-9))) for name, time in once.items()}
    a_round = sum(max(time, sample_seconds) for time in once.values())
    samples = min(samples, max(5, int(all_seconds / max(a_round, 1e-9))))
    seconds: dict[Any, list[float]] = {name: [] for name in contenders}
    for _ in range(samples):
        for name, run in contenders.items():
            seconds[name].append(_time(run, repeats[name], clock))
    return seconds


def time_parts(parts: Iterable[Callable[[], object]], device: torch.device) -> list[float]:
    """The seconds that each part takes, run one after the other without a wait in between."""
    if device.type != "cuda":
        ends = [time.perf_counter()]
        for run in parts:
            run()
            ends.append(time.perf_counter())
        return [end - start for start, end in pairwise(ends)]
    events = [_record_event()]
    for run in parts:
        run()
        events.append(_record_event())
    events[-1].synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]


def summarise(seconds: Sequence[float], parts: int = 1) -> dict[str, float | int]:
    """Summarise one of the equal parts of a run for its record, from the seconds of some runs."""
    milliseconds = [1e3 * second / parts for second in seconds]
    p20, *_, p80 = statistics.quantiles(milliseconds, n=5, method="inclusive")
    return {
        "median_ms": statistics.median(milliseconds),
        "p20_ms": p20,
        "p80_ms": p80,
        "runs": len(milliseconds),
    }


def capture(run: Callable[[], object]) -> Callable[[], None]:
    """The replay of a CUDA graph of ``run``."""
    # libraries and compilers set things up at a first call, on a first stream, which cannot be
    # captured
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    current = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, stream=stream):
            run()
    finally:
        # a capture that fails would stay on its own
        torch.cuda.set_stream(current)
    return graph.replay


def measure_peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Measure the peak memory of a call on a GPU, beyond the memory before."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _time(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) / repeats


def _record_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
