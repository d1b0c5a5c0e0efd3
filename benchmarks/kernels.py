"""The stage ``kernels``: each op against the published way, next to what the device can do.

A case is one op at one shape. Its contenders run in turn over the same sets of inputs: on a GPU as
they are called (``stream``) and as a replayed graph (``graph``); for the leading shapes also the
published way as ``torch.compile`` makes it, in a graph too. Ours is timed only where its result is
that of the published way.
"""

import faulthandler
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import Any

import torch

from tokencache_kernels import backends

from .cases import LEADING, OPS, SHAPES, TINY, Op, Shape, bind
from .records import append_record, describe_run, is_same_code, read_records
from .timing import capture, time_in_turn

DTYPE = torch.bfloat16
BACKENDS = ("triton", "native")
# a few roundings; the tests hold each backend to far less
MAX_ERROR = 2e-2
# programs that wait for each other may wait for ever: a case that takes this long has failed
MAX_SECONDS = 240

Inputs = dict[str, Any]
Call = Callable[[], Any]


@dataclass(frozen=True)
class Ceilings:
    """What the device can do, in bytes and in operations a second."""

    bytes: float
    flops: float

    def share(self, record: dict[str, Any]) -> float:
        """How near to the least time that the work must take it was done."""
        floor = max(record["bytes"] / self.bytes, record["flops"] / self.flops)
        return 1e3 * floor / record["median_ms"]


@dataclass(frozen=True)
class Way:
    """One way to do an op's work: ``bind`` makes inputs into a call, to be timed in some modes."""

    name: str
    bind: Callable[[Inputs], Call]
    modes: tuple[str, ...]


def run_stage(out: Path, deadline: float, rehearse: bool, only: str, commit: str | None) -> int:
    """Time the cases that ``out`` does not hold yet until the deadline; end with a table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = out / "kernels.jsonl"
    facts = {**describe_run(device, commit), "dtype": "bfloat16", "rehearsal": rehearse}
    records = [record for record in read_records(path) if is_same_code(record, facts)]
    done = {(record["case"], record["shape"]) for record in records}
    cases = [
        case for case in list_cases(rehearse, only) if (case[0].name, case[1].name) not in done
    ]
    ceilings = measure_ceilings(device, rehearse)
    facts["ceiling_gbps_measured"] = ceilings.bytes / 1e9
    facts["ceiling_tflops_measured"] = ceilings.flops / 1e12
    print(
        f"{facts['device']}: copies {ceilings.bytes / 1e9:.3g} GB/s, multiplies "
        f"{ceilings.flops / 1e12:.3g} TFLOP/s; {len(cases)} cases to time, {len(done)} done before"
    )
    for number, (op, shape) in enumerate(cases):
        if time.monotonic() > deadline:
            print(f"the budget is spent: {len(cases) - number} cases are left for another call")
            break
        faulthandler.dump_traceback_later(MAX_SECONDS, exit=True)
        for record in time_case(op, shape, device, rehearse):
            if "error" not in record:
                record["share_of_ceiling"] = ceilings.share(record)
            records.append({**record, **facts})
            append_record(path, records[-1])
            print(describe(record), flush=True)
        faulthandler.cancel_dump_traceback_later()
    print_table(records)
    return int(any("error" in record for record in records))


def list_cases(rehearse: bool, only: str) -> list[tuple[Op, Shape]]:
    """The most informative first: every op at one shape, then at the next."""
    return [
        (op, shape)
        for shape in ((TINY,) if rehearse else SHAPES)
        for op in OPS.values()
        if op.fits(shape) and only in f"{op.name}/{shape.name}"
    ]


def measure_ceilings(device: torch.device, rehearse: bool) -> Ceilings:
    """The rates of a large copy, counting reads and writes, and of a large matrix product."""
    num_bytes, side = (2**16, 32) if rehearse else (2**30, 8192)
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, side, side, dtype=DTYPE, device=device)
    runs = {"copy": lambda: target.copy_(source), "multiply": lambda: a @ b}
    times = time_in_turn(runs, device, samples=2 if rehearse else 20)
    return Ceilings(
        bytes=2 * num_bytes / statistics.median(times["copy"]),
        flops=2 * side**3 / statistics.median(times["multiply"]),
    )


def time_case(
    op: Op, shape: Shape, device: torch.device, rehearse: bool
) -> Iterator[dict[str, Any]]:
    """A record for each contender; for a way that fails, one with the error in place of times."""
    case = {
        "case": op.name,
        "shape": shape.name,
        "sizes": vars(shape),
        "bytes": op.count_bytes(shape, DTYPE.itemsize),
        "flops": op.count_flops(shape),
    }
    num_sets = 2 if rehearse else op.num_sets(shape, DTYPE)
    make_inputs = partial(op.make_inputs, shape, DTYPE, device)
    sets = [make_inputs(seed) for seed in range(num_sets)]
    runs = {}
    for way in list_ways(op, device, with_compiled=shape in LEADING):
        try:
            if way.name not in op.baselines:
                check_result(way, op, make_inputs)
            for mode in way.modes:
                runs[way.name, mode] = prepare_run([way.bind(inputs) for inputs in sets], mode)
        except Exception as error:
            yield {**case, "backend": way.name, "error": f"{type(error).__name__}: {error}"}
            if device.type == "cuda":
                # raises where the device is lost, and so ends the stage
                torch.cuda.synchronize()
    max_repeats = 1 if rehearse else ceil(20 / num_sets)
    times = time_in_turn(runs, device, samples=2 if rehearse else 30, max_repeats=max_repeats)
    for (name, mode), seconds in times.items():
        milliseconds = [1e3 * second / num_sets for second in seconds]
        p20, *_, p80 = statistics.quantiles(milliseconds, n=5, method="inclusive")
        yield {
            **case,
            "backend": name,
            "mode": mode,
            "baseline": name in op.baselines,
            "median_ms": statistics.median(milliseconds),
            "p20_ms": p20,
            "p80_ms": p80,
            "runs": len(milliseconds),
            "input_sets": num_sets,
        }


def list_ways(op: Op, device: torch.device, with_compiled: bool) -> Iterator[Way]:
    """Ours on each backend that is fast and can run here; then the baselines."""
    on_gpu = device.type == "cuda"
    modes = ("stream", "graph") if on_gpu else ("stream",)
    for backend in BACKENDS:
        if backends.unavailable(backend, op.name, device, DTYPE) is None:
            ours = partial(bind, op.ours, backend=backend)
            yield Way(backend, ours, modes)
            if (backend, op.name) == ("triton", "mlp_"):
                yield Way("triton-persistent", partial(bind_persistent, ours), modes)
    for name, baseline in op.baselines.items():
        yield Way(name, partial(bind, baseline), modes)
    if on_gpu and with_compiled:
        name, published = next(iter(op.baselines.items()))
        # the graph is ours, as for the others, so that all rotate over the same sets
        compiled = torch.compile(published, mode="max-autotune-no-cudagraphs", dynamic=False)
        yield Way(name, partial(bind, compiled), ("compiled",))


def bind_persistent(bind_ours: Callable[[Inputs], Call], inputs: Inputs) -> Call:
    """Our call with the one persistent launch in place of three."""
    from tokencache_kernels.backends.triton._launch import on_trial

    call = bind_ours(inputs)
    with on_trial("mlp_") as trial:
        call()
    (heuristic,) = trial.seen.values()
    setting = replace(heuristic, is_persistent=True)

    def run() -> Any:
        with on_trial("mlp_", setting):
            return call()

    return run


def check_result(way: Way, op: Op, make_inputs: Callable[[int], Inputs]) -> None:
    """Compare the results on equal inputs, which the calls may change."""
    published = next(iter(op.baselines.values()))
    ours, wanted = way.bind(make_inputs(0))().float(), bind(published, make_inputs(0))().float()
    error = ((ours - wanted).norm() / wanted.norm()).item()
    if not error <= MAX_ERROR:
        raise ValueError(f"the result is off by {error:.2g} of its norm, allowed {MAX_ERROR}")


def prepare_run(calls: Sequence[Call], mode: str) -> Callable[[], None]:
    """Make all calls one run, a captured graph unless in mode ``stream``; it has run once."""

    def run() -> None:
        for call in calls:
            call()

    run()
    return run if mode == "stream" else capture(run)


def describe(record: dict[str, Any]) -> str:
    """One line of progress."""
    what = f"{record['case']} {record['shape']} {record['backend']}"
    if "error" in record:
        return f"{what}: {record['error']}"
    return (
        f"{what} {record['mode']}: {record['median_ms']:.4f} ms "
        f"({record['p20_ms']:.4f} to {record['p80_ms']:.4f}), "
        f"{record['share_of_ceiling']:.0%} of the ceiling"
    )


def print_table(records: list[dict[str, Any]]) -> None:
    """A line a case: the fastest of ours beside the published way as called and the fastest other.

    In microseconds. ``dense`` counts as an other: it is what caching must beat.
    """
    timed = [record for record in records if "error" not in record]
    print(f"\n{'case':38}{'ours':>9} {'':24}{'published':>10}{'fastest other':>15}")
    for (op, shape), group in groupby(timed, key=lambda record: (record["case"], record["shape"])):
        contenders = sorted(group, key=lambda record: record["median_ms"])
        others = [record for record in contenders if record["baseline"]]
        published = next(iter(OPS[op].baselines))
        called = [r for r in others if (r["backend"], r["mode"]) == (published, "stream")]
        ours = [record for record in contenders if not record["baseline"]]
        cells = [
            f"{1e3 * found[0]['median_ms']:9.1f}" if found else f"{'-':>9}"
            for found in (ours, called, others)
        ]
        ours_by, other_by = (
            f"{found[0]['backend']} {found[0]['mode']}" if found else "" for found in (ours, others)
        )
        print(f"{op + ' ' + shape:38}{cells[0]} {ours_by:24} {cells[1]}{cells[2]} {other_by}")
