"""The run book for fifteen minutes with a GPU: two calls of at most six minutes, and a third.

    python -m benchmarks.lease ahead                 before, without a GPU: compile for it
    python -m benchmarks.lease first|second --out DIR
    python -m benchmarks.lease third --out DIR       if time is left: the suite and all the rest

Each call goes through steps of the run book (``benchmarks.gpu``) with budgets of their own, the
most valuable first, and ends within its time whatever a step does. A call that is repeated goes on
where the last one stopped. ``--rehearse`` takes a call through tiny inputs, in the same budgets.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .gpu import ROOT

# laid in by hand, such as that of diffusers; unpacked for every stage
WHEELS = ROOT / "build" / "wheels"
# compiled ahead; the compiler of the machine finds it if it is the same
CACHE = ROOT / "build" / "triton-cache"
# beside the budgets: processes that start and end, and tables
SECONDS = {"first": 350, "second": 355, "third": 590}


@dataclass(frozen=True)
class Step:
    """A stage of the run book: its cases with one of ``only`` in their name, in its budget."""

    stage: str
    budget: int
    only: str = ""
    flags: tuple[str, ...] = ("--no-compiled", "--no-tuning")


LEASES = {
    "first": (
        Step(
            "test", 100,
            "backends/test_gemm,ops/test_linear,ops/test_modulate,ops/test_select,ops/test_attention",
        ),
        Step("tune", 90, "M=416,M=460"),
        Step("layers", 70, "dit-xl-256px-16-10,flux-1024px-10"),
        Step("kernels", 50, "select_tokens_/dit-xl-256px-32,select_tokens_/flux"),
    ),
    "second": (
        Step("models", 240, "flux-1-dev-1024px-1/bfloat16/toca"),
        Step("models", 90, "dit-xl-256px-16/bfloat16/toca"),
    ),
    "third": (
        Step("test", 250),
        Step("layers", 100, "", ()),
        Step("kernels", 180, "", ()),
        Step("sanitize", 60, ""),
    ),
}  # fmt: skip


def main() -> int:
    """Go through one call."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lease", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("call", choices=("ahead", *LEASES))
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--commit", help="what is measured, where the tree has no git history")
    parser.add_argument("--rehearse", action="store_true", help="tiny inputs, the same budgets")
    options = parser.parse_args()
    if options.call == "ahead":
        from .ahead import compile_ahead

        return compile_ahead(CACHE)
    return take(LEASES[options.call], SECONDS[options.call], options)


def take(steps: Sequence[Step], seconds: float, options: argparse.Namespace) -> int:
    """Take the steps in order; a step's unused budget goes to the later ones."""
    start = time.monotonic()
    environment = {**os.environ}
    if CACHE.is_dir():
        environment.setdefault("TRITON_CACHE_DIR", str(CACHE))
        say_whether_known()
    for wheel in WHEELS.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(ROOT / "build" / "site-packages")
    failed = []
    for index, step in enumerate(steps):
        later = sum(other.budget for other in steps[index + 1 :])
        left = seconds - (time.monotonic() - start)
        # a later step keeps at least half of its budget
        budget = min(max(step.budget, left - later), left - later / 2)
        if budget < 10:
            print(f"no time is left for {step.stage} {step.only}", flush=True)
            continue
        began = time.monotonic()
        status = subprocess.run(
            command_of(step, budget, options), cwd=ROOT, env=environment, check=False
        ).returncode
        took = time.monotonic() - began
        print(f"== {step.stage} {step.only}: status {status}, {took:.0f} s", flush=True)
        if status:
            failed.append(step.stage)
    print(f"{time.monotonic() - start:.0f} s in all; failed: {', '.join(failed) or 'nothing'}")
    return int(bool(failed))


def command_of(step: Step, budget: float, options: argparse.Namespace) -> list[str]:
    """Return the call of a step: of pytest, of the sanitizer around it, or of a stage."""
    pytest = (sys.executable, "-m", "pytest", "-q", "-W", "ignore")
    if step.stage == "test":
        # libraries of another machine warn about other things
        files = [f"tests/{name}.py" for name in step.only.split(",") if name] or ["tests"]
        files = ["tests/test_layering.py"] if options.rehearse else files
        report = f"--junitxml={options.out / 'test.xml'}"
        return ["timeout", f"{budget:.0f}", *pytest, report, *files]
    if step.stage == "sanitize":
        files = ("tests/ops/test_rows.py", "tests/ops/test_select.py")
        call = (*pytest, "-x", *files, "-k", "triton or native")
        tool = ("compute-sanitizer", "--error-exitcode", "1")
        checked = call if options.rehearse else (*tool, *call)
        return ["timeout", f"{budget:.0f}", *checked]
    # a stage ends at most so long after its budget
    budget = max(budget - 12, 5)
    return [
        *(sys.executable, "-m", "benchmarks.gpu", "--stage", step.stage, "--out", str(options.out)),
        *("--budget", f"{budget:.0f}", "--grace", "10", *step.flags),
        *(("--only", step.only) if step.only and not options.rehearse else ()),
        *(("--commit", options.commit) if options.commit else ()),
        *(("--rehearse",) if options.rehearse else ()),
    ]


def say_whether_known() -> None:
    """Say whether the compiler here is the one that has compiled ahead: else it compiles anew."""
    key = CACHE / "compiler.json"
    if not key.exists():
        return
    from triton.runtime.cache import triton_key

    is_same = json.loads(key.read_text())["triton_key"] == triton_key()
    print("compiled ahead by " + ("this compiler" if is_same else "another one: of no use"))


if __name__ == "__main__":
    sys.exit(main())
