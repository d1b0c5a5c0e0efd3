"""Try the launch settings of every tunable kernel on the GPU at hand, and keep those that win.

Each setting is timed in several rounds, with all settings in turn in each, so that a drift of the
clocks meets them alike. A setting is kept only when it beats the heuristic's by more than either of
the two scattered between the rounds.
"""

import argparse
import dataclasses
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime._async_compile import AsyncCompileMode
from triton.runtime.errors import OutOfResources, PTXASError
from triton.runtime.jit import JITFunction
from triton.testing import do_bench

from .. import settings
from ..backends.reference import RowNorm
from ..backends.triton._device import INTERPRETED
from ..backends.triton._launch import (
    INTERPRETER,
    Device,
    TuneCase,
    adopt,
    describe_setting,
    device_of,
    modules_with,
    on_trial,
)
from ..backends.triton._tiles import piece_settings, whole_row_candidates
from ..backends.triton.modulate import add_branches, gather_modulate, row_pass
from ..backends.triton.rows import gather_rows, scatter_rows_
from ..backends.triton.select import invert_indices
from ..version import __version__

ROUNDS = 3
# a setting slower than the fastest by this factor in the first round is not tried in the others
MAX_RATIO = 1.2


@dataclass(frozen=True)
class Timing:
    """The median time of each round, in milliseconds."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The time to compare by."""
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Give the distance between the rounds."""
        return max(self.rounds) - min(self.rounds)


@dataclass(frozen=True)
class Outcome:
    """The outcome of one case's trials.

    Attributes:
        key: the problem, as a file of launch settings names it.
        heuristic: the setting that the launcher takes by itself.
        best: the fastest setting.
        before: how long the heuristic's setting takes.
        after: how long the best one takes.
        num_failed: how many settings did not run on this device.
    """

    key: str
    heuristic: Any
    best: Any
    before: Timing
    after: Timing
    num_failed: int

    @property
    def is_gain(self) -> bool:
        """Tell whether the best setting wins by more than the timings scatter."""
        return self.before.median - self.after.median > max(self.before.spread, self.after.spread)


def find_cases(device: Device) -> Iterator[TuneCase]:
    """Yield the cases to tune on this device, one after another to save memory."""
    for module in modules_with("tune_cases"):
        yield from importlib.import_module(module).tune_cases(device)
    yield from row_cases(device)


def row_cases(device: Device) -> Iterator[TuneCase]:
    """The kernels that move rows, for a batch of DiT-XL and one image of FLUX."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    problems = [(16, 256, 26, 1152), (1, 4608, 460, 3072)]
    for B, N, S, D in [(2, 9, 4, 24)] if device == INTERPRETER else problems:
        x, out, branch = torch.randn(3, B, N, D, dtype=torch.bfloat16, device=where)
        gate, shift, scale = torch.randn(3, B, D, dtype=x.dtype, device=where)
        indices = torch.arange(S, dtype=torch.int32, device=where).repeat(B, 1)
        positions = invert_indices(indices, N)
        packed = gather_rows(x, indices)
        update = (out, x, (branch, branch), (gate, gate))
        shares = whole_row_candidates(D)
        modulation = (indices, shift, scale, RowNorm())
        for kernel, candidates, launch in (
            ("gather_rows", piece_settings(), partial(gather_rows, x, indices)),
            ("scatter_rows_", piece_settings(), partial(scatter_rows_, out, indices, packed)),
            ("add_branches", piece_settings(), partial(add_branches, *update)),
            ("gather_modulate", shares, partial(gather_modulate, x, *modulation)),
            (
                "row_pass",
                shares,
                partial(row_pass, *update, indices, positions, shift, scale, RowNorm()),
            ),
        ):
            yield TuneCase(kernel, f"B={B} N={N} S={S} D={D} bf16", candidates, launch)


def try_settings(case: TuneCase, measure: Callable[[Callable[[], object]], float]) -> Outcome:
    """Time the heuristic's setting and all candidates, the promising ones in every round."""
    with on_trial(case.kernel) as trial:
        case.run()
    # a case is one problem of its kernel; anything else is an error in the case
    ((key, heuristic),) = trial.seen.items()
    candidates = list(dict.fromkeys([heuristic, *case.candidates]))
    times: dict[Any, list[float]] = {setting: [] for setting in candidates}
    num_failed = 0
    for _ in range(ROUNDS):
        for setting in list(times):
            try:
                with on_trial(case.kernel, setting):
                    times[setting].append(measure(case.run))
            except (OutOfResources, PTXASError, RuntimeError):
                # too large for this device, or for a launch whose programs start together; the
                # heuristic's own setting has just run
                if setting == heuristic:
                    raise
                del times[setting]
                num_failed += 1
        limit = MAX_RATIO * min(min(rounds) for rounds in times.values())
        times = {s: t for s, t in times.items() if s == heuristic or min(t) <= limit}
    timings = {setting: Timing(tuple(rounds)) for setting, rounds in times.items()}
    best = min(timings, key=lambda setting: timings[setting].median)
    return Outcome(key, heuristic, best, timings[heuristic], timings[best], num_failed)


def compile_ahead(case: TuneCase) -> None:
    """Compile the candidates on all cores at once; one that does not compile says so when run."""
    if INTERPRETED.value:
        return
    with (
        ThreadPoolExecutor() as pool,
        AsyncCompileMode(pool, ignore_errors=True),
        _without_launches(),
    ):
        for setting in case.candidates:
            with on_trial(case.kernel, setting):
                case.run()


@contextmanager
def _without_launches() -> Iterator[None]:
    """Launchers then compile their kernels, and launch nothing."""
    launch = JITFunction.run
    JITFunction.run = lambda self, *args, **kwargs: launch(
        self, *args, **{**kwargs, "warmup": True}
    )
    try:
        yield
    finally:
        JITFunction.run = launch


def measure_on_gpu(run: Callable[[], object]) -> float:
    """The median time in milliseconds of a captured call, from GPU events, with a cold L2.

    A call from Python would count the gaps in which the GPU waits for the host.
    """
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    milliseconds: float = do_bench(graph.replay, warmup=10, rep=50, return_mode="median")
    return milliseconds


def measure_on_cpu(run: Callable[[], object]) -> float:
    """The time of one call in milliseconds: the interpreter's, which says nothing of a GPU."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def gains(outcomes: Iterable[Outcome]) -> dict[str, dict[str, Any]]:
    """Give the winning settings by problem, each as a whole, whatever another size's heuristic
    says.
    """
    return {
        outcome.key: dataclasses.asdict(outcome.best) for outcome in outcomes if outcome.is_gain
    }


def make_record(
    settings: Mapping[str, Mapping[str, Any]], device: Device, command: str
) -> dict[str, Any]:
    """Write the file of launch settings: the winners, and the machine of the measurement."""
    return {
        "device": device.name,
        "versions": {
            "tokencache_kernels": __version__,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
        },
        "command": command,
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": settings,
    }


def describe_outcome(case: TuneCase, outcome: Outcome) -> str:
    """Describe an outcome in one line: the problem, its time before and after, and the winning
    fields.
    """
    before, after = outcome.before.median, outcome.after.median
    scatter = max(outcome.before.spread, outcome.after.spread)
    verdict = describe_setting(outcome.best) if outcome.is_gain else "no gain beyond the scatter"
    failed = f"; {outcome.num_failed} settings do not run" if outcome.num_failed else ""
    times = f"{before:.4f} -> {after:.4f} ms, scatter {scatter:.4f}"
    return f"{case.kernel} ({case.label}): {times}: {verdict}{failed}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tune``."""
    parser.description = "Try the launch settings on this GPU, and write down those that win."
    parser.add_argument("--kernel", help="only kernels whose name contains this")
    parser.add_argument("--problem", help="only problems whose label contains this, as M=416")
    parser.add_argument("--out", type=Path, help="the file of launch settings to write")


def run(options: argparse.Namespace) -> int:
    """Print each problem before and after; write the settings that won."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not settings.is_interpreting():
        print("tune: needs a CUDA device (or TRITON_INTERPRET=1, to try the command out), got cpu")
        return 2
    device = device_of(torch.device("cuda" if on_gpu else "cpu"))
    measure = measure_on_gpu if on_gpu else measure_on_cpu
    outcomes = []
    for case in find_cases(device):
        if (options.kernel or "") in case.kernel and (options.problem or "") in case.label:
            compile_ahead(case)
            outcome = try_settings(case, measure)
            outcomes.append(outcome)
            if outcome.is_gain:
                # kernels that call this one are compared with it at its best
                adopt(outcome.key, outcome.best)
            print(describe_outcome(case, outcome), flush=True)
    if not outcomes:
        print(f"tune: --kernel must be part of a tunable kernel's name, got {options.kernel!r}")
        return 2
    num_gains = sum(outcome.is_gain for outcome in outcomes)
    print(f"tune: {num_gains} of {len(outcomes)} problems gain on {device.name}")
    if options.out is not None:
        record = make_record(gains(outcomes), device, " ".join(sys.argv))
        options.out.write_text(json.dumps(record, indent=2) + "\n")
    return 0
