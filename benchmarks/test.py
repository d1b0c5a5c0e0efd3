"""The stage ``test``: the suite on this device, each file in a process of its own.

A test that loses the device then spoils its own file alone, several files run at a time, and those
that are done are not repeated.
"""

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from .records import describe_run
from .stages import Journal, Record, is_wanted

ROOT = Path(__file__).parents[1]
# the most informative first
FIRST = ("tests/ops", "tests/backends", "tests/blocks")
MAX_WORKERS = 8
# a file that takes this long hangs
MAX_FILE_SECONDS = 400


def run_stage(options: argparse.Namespace, deadline: float) -> int:
    """Run what has no record yet; end with the counts and the names of what failed."""
    facts = describe_run(options.device, options.commit, options.session)
    journal = Journal(options.out, "test", {**facts, "rehearsal": options.rehearse})
    files = ["tests/test_layering.py"] if options.rehearse else list_files()
    todo = [
        f
        for f in files
        if is_wanted(make_key(f), options.only) and not journal.is_done(make_key(f))
    ]
    workers = min(MAX_WORKERS, max(os.cpu_count() // 2, 1))
    print(f"{len(todo)} files to run, {workers} at a time", flush=True)
    reports = options.out / "junit"
    reports.mkdir(exist_ok=True)
    left = 0
    with ThreadPoolExecutor(workers) as pool:
        threads = max(os.cpu_count() // workers, 1)
        running = [pool.submit(run_file, path, reports, threads, deadline) for path in todo]
        # each is recorded as it ends: the machine may go away
        for record in (ended.result() for ended in as_completed(running)):
            if record is None:
                left += 1
                continue
            journal.write(record)
            print(describe(record), flush=True)
    if left:
        print(f"the budget is spent: {left} files are left for another call")
    return print_summary(journal.records)


def list_files() -> list[str]:
    """Every file of tests, relative to the project's root."""
    found = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/**/test_*.py"))]
    return sorted(found, key=lambda path: not path.startswith(FIRST))


def make_key(path: str) -> Record:
    """What the record of a file is found by."""
    return {"case": "test", "shape": path, "dtype": "all"}


def run_file(path: str, reports: Path, threads: int, deadline: float) -> Record | None:
    """The record of one file, or None where the time did not suffice."""
    report = reports / f"{path.replace('/', '-')}.xml"
    report.unlink(missing_ok=True)
    started = time.monotonic()
    if started > deadline:
        return None
    try:
        done = subprocess.run(
            # what the libraries of this machine warn of is no failure of a test
            [sys.executable, "-m", "pytest", path, "-W", "ignore", f"--junitxml={report}"],
            cwd=ROOT, capture_output=True, text=True, errors="replace", check=False,
            timeout=min(deadline - started, MAX_FILE_SECONDS),
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        status, output = f"status {done.returncode}", done.stdout + done.stderr
    except subprocess.TimeoutExpired as expired:
        if time.monotonic() >= deadline:
            return None
        status, output = f"no end after {MAX_FILE_SECONDS} s", (expired.stdout or b"").decode()
    seconds = {"seconds": time.monotonic() - started}
    if not report.exists():
        tail = output.splitlines()[-40:]
        return {**make_key(path), **seconds, "error": f"{status}, and no report", "output": tail}
    suite = ElementTree.parse(report).find("testsuite")
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    failed = [
        case.get("name")
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    # what pytest says of the failures, but not of hundreds that have one cause
    tail = output.splitlines()[-200:] if failed else []
    return {**make_key(path), **seconds, **counts, "failed": failed, "output": tail}


def describe(record: Record) -> str:
    """One line for a file in which all is well; else all that it said."""
    if "error" in record:
        return "\n".join([*record["output"], f"{record['shape']}: {record['error']}"])
    counts = ", ".join(f"{record[name]} {name}" for name in ("tests", "failures", "errors"))
    line = f"{record['shape']}: {counts}, {record['skipped']} skipped, {record['seconds']:.0f} s"
    return "\n".join([*record["output"], line])


def print_summary(records: list[Record]) -> int:
    """The counts of all files, and the names of what failed; 1 if anything did."""
    broken = [record for record in records if "error" in record]
    sums = {
        name: sum(record.get(name, 0) for record in records)
        for name in ("tests", "failures", "errors", "skipped")
    }
    print(", ".join(f"{count} {name}" for name, count in sums.items()), f"in {len(records)} files")
    for record in records:
        for name in record.get("failed", ()):
            print(f"{record['shape']}::{name}")
    for record in broken:
        print(f"{record['shape']}: {record['error']}")
    return int(bool(broken) or sums["failures"] + sums["errors"] > 0)
