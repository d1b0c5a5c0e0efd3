"""The stage ``kernels``: each op against its alternatives, and against the device's ceilings.

A case is one op at one shape in one dtype. Its contenders run in turn over the same sets of inputs:
on a GPU as they are called (``stream``) and as a replayed graph (``graph``), and at the leading
shapes also as ``torch.compile`` makes it, in a graph too. A contender is timed only if its result
is that of the paper's composition.
"""

import argparse
import faulthandler
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from tokencache_kernels import backends, ops

from . import cases, published, tune
from .cases import OPS, Inputs, Op, Shape, bind
from .records import describe_run
from .stages import (
    MAX_SECONDS,
    Journal,
    Record,
    describe_error,
    in_time,
    is_wanted,
    work_through,
)
from .timing import capture, measure_peak_bytes, summarise, time_in_turn

# a few roundings; the tests hold each backend to far less
MAX_ERROR = 2e-2
# the least duration of a sample
SAMPLE_SECONDS = 0.005
# the upper bound of a case in which the compiler tries many ways to multiply
COMPILED_SECONDS = 45

Call = Callable[[], Any]


@dataclass(frozen=True)
class Ceilings:
    """The ceilings of a device, in bytes and in operations a second."""

    bytes: float
    flops: float

    @property
    def fields(self) -> Record:
        """As records name them."""
        return {
            "ceiling_gbps_measured": self.bytes / 1e9,
            "ceiling_tflops_measured": self.flops / 1e12,
        }

    def share(self, record: Record) -> float:
        """Return the fraction of the roofline achieved."""
        floor = max(record["bytes"] / self.bytes, record["flops"] / self.flops)
        return 1e3 * floor / record["median_ms"]


@dataclass(frozen=True)
class Case:
    """One op at one shape in one dtype.

    ``is_leading``: it is timed under ``torch.compile``, too. ``is_first``: before other cases.
    """

    op: Op
    shape: Shape
    dtype: torch.dtype
    is_leading: bool
    is_first: bool = False

    @property
    def key(self) -> Record:
        """The common fields of its records."""
        return {"case": self.op.name, "shape": self.shape.name, "dtype": name_dtype(self.dtype)}

    @property
    def seconds(self) -> int:
        """Upper bound in seconds; the case is not started if less is left."""
        return COMPILED_SECONDS if self.is_leading else 0


@dataclass(frozen=True)
class Way:
    """One way to do an op's work: ``bind`` makes inputs into a call, to be timed in some modes.

    ``is_comparable``: its result must equal the paper's composition. ``notes``: further fields of
    its records.
    """

    name: str
    bind: Callable[[Inputs], Call]
    modes: tuple[str, ...]
    is_baseline: bool = True
    is_comparable: bool = True
    make_notes: Callable[[], Record] = dict


def run_stage(options: argparse.Namespace, deadline: float) -> int:
    """Time the ops, and give the rest of the time to launch settings."""
    found = list_cases(options.device, options.rehearse)
    for group in ([case for case in found if case.is_first], found):
        records = time_ops("kernels", group, options, deadline)
    status = has_failed(records)
    if tune.can_tune(options) and not options.no_tuning:
        status |= tune.run_stage(options, deadline)
    return status


def time_ops(
    stage: str, found: Sequence[Case], options: argparse.Namespace, deadline: float
) -> list[Record]:
    """Time the cases that have no records yet; return the records of all."""
    facts = describe_run(options.device, options.commit, options.session)
    journal = Journal(options.out, stage, {**facts, "rehearsal": options.rehearse})
    found = select_cases(found, options)
    # another process may be here for the table alone
    todo = [case for case in found if not journal.is_done(case.key)]
    dtypes = {case.dtype for case in todo} if time.monotonic() < deadline else set()
    ceilings = measure_all_ceilings(dtypes, options, journal)
    measure = partial(
        time_case, ceilings=ceilings, device=options.device, journal=journal,
        rehearse=options.rehearse, with_compiled=not (options.rehearse or options.no_compiled),
    )  # fmt: skip
    work_through(journal, found, in_time(measure, journal, deadline), deadline)
    return journal.records


def select_cases(found: Sequence[Case], options: argparse.Namespace) -> list[Case]:
    """Those that were asked for."""
    return [case for case in found if is_wanted(case.key, options.only)]


def has_failed(records: list[Record]) -> int:
    """1 if any contender of ours, or a whole case, has failed."""
    return int(any("error" in record and not record.get("baseline") for record in records))


def list_cases(device: torch.device, rehearse: bool) -> list[Case]:
    """The most informative first: the ops that a step is made of at a few shapes, then the others.

    Those of the stage ``attention`` are left to it.
    """
    dtypes, leading = (torch.bfloat16,), cases.LEADING
    groups = (leading[:2], (*leading[2:], *cases.SHAPES[4:7], *cases.RATIOS), cases.SHAPES[7:])
    if rehearse:
        leading, groups = (cases.TINY,), ((cases.TINY,),)
    elif device.type == "cpu":
        dtypes, leading = (torch.bfloat16, torch.float32), cases.CPU_SHAPES[:1]
        groups = (cases.CPU_SHAPES,)
    others = [op for op in OPS.values() if op not in (*cases.KEY_OPS, *cases.attention.OPS)]
    return [
        Case(
            op,
            shape,
            dtype,
            is_leading=shape in leading,
            is_first=shape in leading[:2] and group is cases.KEY_OPS,
        )
        for shapes in groups
        for group in (cases.KEY_OPS, others)
        for shape in shapes
        for dtype in dtypes
        for op in group
        if op.fits(shape) and is_news(op, shape)
    ]


def is_news(op: Op, shape: Shape) -> bool:
    """Tell whether the op depends on the fraction of fresh tokens, if only that differs."""
    if shape not in cases.RATIOS:
        return True
    fewer = replace(shape, S=1)
    return op.count_bytes(shape, 2) != op.count_bytes(fewer, 2)


def measure_all_ceilings(
    dtypes: set[torch.dtype], options: argparse.Namespace, journal: Journal
) -> dict[torch.dtype, Ceilings]:
    """The ceilings for each dtype, recorded."""
    found = {}
    for dtype in sorted(dtypes, key=str):
        key = {"case": "ceilings", "shape": "large", "dtype": name_dtype(dtype)}
        journal.enter(key)
        found[dtype] = measure_ceilings(options.device, options.rehearse, dtype)
        journal.write({**key, **found[dtype].fields})
        journal.leave()
        gbps, tflops = found[dtype].fields.values()
        print(
            f"{journal.facts['device']}, {key['dtype']}: copies {gbps:.4g} GB/s, multiplies "
            f"{tflops:.3g} TFLOP/s", flush=True,
        )  # fmt: skip
    return found


def measure_ceilings(device: torch.device, rehearse: bool, dtype: torch.dtype) -> Ceilings:
    """The rates of a large copy, counting reads and writes, and of a large matrix product."""
    num_bytes, side = (2**30, 8192) if device.type == "cuda" else (2**28, 2048)
    if rehearse:
        num_bytes, side = 2**16, 32
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, side, side, dtype=dtype, device=device)
    out = torch.empty_like(a)
    runs = {"copy": lambda: target.copy_(source), "multiply": lambda: torch.mm(a, b, out=out)}
    if device.type == "cpu" and backends.unavailable("native", "linear", device, dtype) is None:
        # a processor may have a faster product than torch.mm: oneDNN's, of packed weights
        runs["multiply packed"] = lambda: ops.linear(a[None], b, backend="native")
    for run in runs.values():
        run()
    times = time_in_turn(runs, device, samples=2 if rehearse else 20)
    copy, *products = map(statistics.median, times.values())
    return Ceilings(bytes=2 * num_bytes / copy, flops=2 * side**3 / min(products))


def time_case(
    case: Case,
    ceilings: dict[torch.dtype, Ceilings],
    device: torch.device,
    journal: Journal,
    rehearse: bool,
    with_compiled: bool = False,
) -> Iterator[Record]:
    """A record for each contender; for one that fails, one with the error in place of times."""
    op, shape, dtype = case.op, case.shape, case.dtype
    release_memory()
    common = {
        **case.key,
        "sizes": vars(shape),
        "bytes": op.count_bytes(shape, dtype.itemsize),
        "flops": op.count_flops(shape),
        **ceilings[dtype].fields,
    }
    make_inputs = partial(op.make_inputs, shape, dtype, device)
    sets = [make_inputs(seed) for seed in range(2 if rehearse else op.num_sets(shape, dtype))]

    def prepare(way: Way, mode: str) -> tuple[Call, Record]:
        if way.is_comparable and mode != "graph":
            check_result(way, op, make_inputs)
        calls = [way.bind(inputs) for inputs in sets]
        run = prepare_run(calls, mode)
        return run, {**way.make_notes(), "peak_bytes": measure_peak_bytes(calls[0], device)}

    ways = list_ways(op, dtype, device, case.is_leading and with_compiled)
    timed = time_ways(ways, prepare, len(sets), case.key, common, device, journal, rehearse)
    yield from add_shares(timed, ceilings[dtype])


def time_ways(
    ways: Iterable[Any],
    prepare: Callable[[Any, str], tuple[Call, Record]],
    num_parts: int,
    key: Record,
    common: Record,
    device: torch.device,
    journal: Journal,
    rehearse: bool,
) -> Iterator[Record]:
    """A record for each mode of each way, all timed in turn; an error ends a way.

    ``prepare`` gives the run, of ``num_parts`` equal parts, and further fields of its record.
    """
    failed = journal.failed(key)
    runs, records = {}, {}
    for way in ways:
        for mode in way.modes:
            contender = {"backend": way.name, "mode": mode, "baseline": way.is_baseline}
            if (way.name, mode) in failed:
                break
            # compiling takes its time
            faulthandler.dump_traceback_later(MAX_SECONDS, exit=True)
            journal.enter(key, **contender)
            try:
                runs[way.name, mode], notes = prepare(way, mode)
                records[way.name, mode] = {**common, **contender, **notes, "input_sets": num_parts}
            except Exception as error:
                yield {**common, **contender, "error": describe_error(error)}
                break
    journal.enter(key)
    samples, seconds = (2, 0) if rehearse else (30, SAMPLE_SECONDS)
    for contender, taken in time_in_turn(runs, device, samples, seconds).items():
        yield {**records[contender], **summarise(taken, parts=num_parts)}


def add_shares(records: Iterable[Record], ceilings: Ceilings) -> Iterator[Record]:
    """Add the fraction of the ceilings to each timed record."""
    for record in records:
        is_timed = "median_ms" in record
        yield {**record, "share_of_ceiling": ceilings.share(record)} if is_timed else record


def release_memory() -> None:
    """Release the graphs and the compiled code of former cases."""
    # the next case may compile the same code anew; after some times the compiler would give up
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def list_ways(
    op: Op, dtype: torch.dtype, device: torch.device, with_compiled: bool
) -> Iterator[Way]:
    """The published way, ours on each backend that can run here, then the other baselines."""
    on_gpu = device.type == "cuda"
    modes = ("stream", "graph") if on_gpu else ("stream",)
    baselines = op.baselines(device.type)
    yield Way(op.eager, partial(bind, baselines.pop(op.eager)), modes, is_comparable=False)
    # on a GPU the reference is the published way over again
    for backend in op.backends if on_gpu else (*op.backends, "reference"):
        if backend == "auto" or (
            backends.unavailable(backend, op.backend_op, device, dtype) is None
        ):
            ours = partial(bind, op.ours, backend=backend)
            yield Way(backend, ours, modes, is_baseline=backend == "reference")
            if (backend, op.name) == ("triton", "mlp_"):
                persistent = partial(bind_persistent, ours)
                yield Way("triton-persistent", persistent, modes, is_baseline=False)
    for name, baseline in baselines.items():
        make_notes = partial(note_gelu, dtype, device) if name in ("addmm", "library") else dict
        is_comparable = name != "dense"
        yield Way(name, partial(bind, baseline), modes, True, is_comparable, make_notes)
    if with_compiled:
        name = op.compiled or op.eager
        # the graph is ours, as for the others, so that all rotate over the same sets
        compiled = torch.compile(
            op.baselines(device.type)[name],
            mode="max-autotune-no-cudagraphs",
            dynamic=False,
            fullgraph=True,
        )
        yield Way(name, partial(bind, compiled), ("compiled",))


def note_gelu(dtype: torch.dtype, device: torch.device) -> Record:
    """Name the GELU of the library's product: ours is that of ``tanh``."""
    return {"gelu": published.name_library_gelu(dtype, device)}


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
    ours = as_tuple(way.bind(make_inputs(0))())
    # ours may return more
    for found, wanted in zip(ours, as_tuple(bind(op.published, make_inputs(0))()), strict=False):
        found, wanted = found.float(), wanted.float()
        error = ((found - wanted).norm() / wanted.norm()).item()
        if not error <= MAX_ERROR:
            raise ValueError(f"the result is off by {error:.2g} of its norm, allowed {MAX_ERROR}")


def as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
    """One tensor or several."""
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def prepare_run(calls: Sequence[Call], mode: str) -> Callable[[], None]:
    """Make all calls one run, on a GPU a captured graph unless in mode ``stream``; it has run."""

    def run() -> None:
        for call in calls:
            call()

    run()
    return run if mode == "stream" or not torch.cuda.is_available() else capture(run)


def name_dtype(dtype: torch.dtype) -> str:
    """``bfloat16``."""
    return str(dtype).removeprefix("torch.")
