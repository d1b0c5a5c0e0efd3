"""The run book for a machine with a GPU, in stages that each fit a short slot.

    python -m benchmarks.gpu --stage build|test|kernels|tune --out DIR --budget SECONDS

``build`` makes the native library, ``test`` runs the suite, ``kernels`` times the ops and ``tune``
looks for better launch settings. A stage starts nothing new once its budget is spent; ``kernels``
goes on where it stopped when it is called again. ``--rehearse`` runs a stage on tiny inputs, also
where there is no GPU, to see that it works: the times that it writes mean nothing.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def build(options: argparse.Namespace, deadline: float) -> int:
    """Build and install the native library, and say what it then can do."""
    cmake = shutil.which("cmake")
    if cmake is None:
        print("build: there is no cmake")
        return 1
    # a rehearsal leaves the library in use alone
    prefix = options.out.resolve() if options.rehearse else ROOT
    folder = prefix / "build"
    for step in (
        ["-S", ROOT, "-B", folder, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"],
        ["--build", folder],
        ["--install", folder, "--prefix", prefix],
    ):
        status = run_until(deadline, [cmake, *step])
        if status != 0:
            return status
    print(f"nvcc: {shutil.which('nvcc') or 'not found'}", flush=True)
    return run_until(deadline, [sys.executable, "-m", "tokencache_kernels", "info"])


def test(options: argparse.Namespace, deadline: float) -> int:
    """Run the suite; end with the counts and the names of what failed."""
    report = options.out / "junit.xml"
    report.unlink(missing_ok=True)
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") and not options.rehearse else []
    what = ["tests/test_layering.py"] if options.rehearse else []
    status = run_until(
        deadline, [sys.executable, "-m", "pytest", f"--junitxml={report}", *workers, *what]
    )
    if not report.exists():
        print("test: the suite ended without a report")
        return status or 1
    suite = ElementTree.parse(report).find("testsuite")
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    print(json.dumps({**counts, "seconds": float(suite.get("time"))}))
    for case in suite.iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            print(f"{case.get('classname')}::{case.get('name')}")
    return status


def kernels(options: argparse.Namespace, deadline: float) -> int:
    """Time every op against the published way."""
    # Triton reads TRITON_INTERPRET when it is imported
    from .kernels import run_stage

    return run_stage(options.out, deadline, options.rehearse, options.only, options.commit)


def tune(options: argparse.Namespace, deadline: float) -> int:
    """Try launch settings, case after case; those that win so far are always in the file."""
    from tokencache_kernels.backends.triton import tune
    from tokencache_kernels.backends.triton._launch import device_of

    on_gpu = torch.cuda.is_available()
    device = device_of(torch.device("cuda" if on_gpu else "cpu"))
    measure = tune.measure_on_gpu if on_gpu else tune.measure_on_cpu
    outcomes = []
    for case in tune.find_cases(device):
        if options.only not in case.kernel:
            continue
        if time.monotonic() > deadline:
            print(f"the budget is spent before {case.kernel} ({case.label})")
            break
        outcomes.append(tune.try_settings(case, measure))
        print(tune.describe_outcome(case, outcomes[-1]), flush=True)
        record = tune.make_record(outcomes, device, " ".join(sys.argv))
        (options.out / "launch-settings.json").write_text(json.dumps(record, indent=2) + "\n")
    return 0


def run_until(deadline: float, command: list[str | Path]) -> int:
    """Run a command in the project's root, interrupt it at the deadline, and return its status."""
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        return process.wait(max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        print(f"the budget is spent: stopping {command[0]}", flush=True)
        # as from the keyboard: pytest then still reports
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        return 1


STAGES = {"build": build, "test": test, "kernels": kernels, "tune": tune}


def main() -> int:
    """Run one stage."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the folder for what is found")
    parser.add_argument("--budget", type=float, default=540, help="seconds; 540 if not given")
    parser.add_argument("--only", default="", help="cases (op/shape) or kernels with this in them")
    parser.add_argument("--commit", help="what is measured, where the tree has no git history")
    parser.add_argument("--rehearse", action="store_true", help="tiny inputs, few repeats")
    options = parser.parse_args()
    deadline = time.monotonic() + options.budget
    if not torch.cuda.is_available():
        if options.stage in ("kernels", "tune") and not options.rehearse:
            parser.error("this stage needs a CUDA device (or --rehearse, to try it out)")
        os.environ["TRITON_INTERPRET"] = "1"
    options.out.mkdir(parents=True, exist_ok=True)
    return STAGES[options.stage](options, deadline)


if __name__ == "__main__":
    sys.exit(main())
