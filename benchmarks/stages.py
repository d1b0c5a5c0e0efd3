"""Shared by the measuring stages: cases in order, each of which leaves records whatever happens.

A stage works in a process of its own, because an error of CUDA spoils every later call of its
process. Before a piece of work it writes the case into ``at.json``. The supervisor finds this file
after the process's end, records the cause of death, and lets another process go on with the rest.
"""

import faulthandler
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from .records import append_record, is_same_run, read_records

# programs that wait for each other may wait for ever: a case that takes this long has failed
MAX_SECONDS = 240
# the exit status for another process to go on, because this one cannot, or should not
GO_ON = 3
# of a record that is there in case that its case never ends
FIRST_RUN = "first_run"

Record = dict[str, Any]


class Case(Protocol):
    """A piece of work: ``key`` has the common fields of its records: case, shape and dtype."""

    @property
    def key(self) -> Record: ...


def is_wanted(key: Record, only: str) -> bool:
    """Tell whether one of the words between commas is in a case's name."""
    name = "/".join(key.values())
    return any(word in name for word in only.split(","))


class Journal:
    """The records of one stage: those of this run and its kind are ``records``."""

    def __init__(self, out: Path, stage: str, facts: Mapping[str, Any]) -> None:
        self.path = out / f"{stage}.jsonl"
        self.at = out / "at.json"
        self.facts = dict(facts)
        self.records = [r for r in read_records(self.path) if is_same_run(r, self.facts)]

    def write(self, record: Record) -> None:
        """Append a record, with the facts of the run."""
        record = {**record, **self.facts}
        append_record(self.path, record)
        self.records.append(record)

    def enter(self, key: Record, **contender: str) -> None:
        """Announce the work: a case, or one ``backend`` and ``mode`` of it."""
        begun = {"path": str(self.path), "record": {**key, **contender, **self.facts}}
        # replaced as a whole: the process may be killed at any time
        new = self.at.with_suffix(".new")
        new.write_text(json.dumps(begun))
        new.replace(self.at)

    def leave(self) -> None:
        """Say that it is finished."""
        self.at.unlink(missing_ok=True)

    def of_case(self, key: Record) -> list[Record]:
        """The records of one case."""
        return [r for r in self.records if all(r.get(name) == key[name] for name in key)]

    def is_done(self, key: Record) -> bool:
        """Tell whether the case has been measured, or has failed as a whole."""
        return any(
            r.get("what") != FIRST_RUN and ("error" not in r or "backend" not in r)
            for r in self.of_case(key)
        )

    def failed(self, key: Record) -> set[tuple[str, str | None]]:
        """The contenders of the case that must not be tried again: (backend, mode or None)."""
        return {
            (r["backend"], r.get("mode"))
            for r in self.of_case(key)
            if "error" in r and "backend" in r
        }


def work_through(
    journal: Journal,
    cases: Iterable[Case],
    measure: Callable[[Any], Iterable[Record]],
    deadline: float,
) -> None:
    """Measure the cases that have no records yet, in order, until the deadline."""
    num_before = num_now = 0
    for case in cases:
        if journal.is_done(case.key):
            num_before += 1
            continue
        if time.monotonic() > deadline:
            print("the budget is spent: cases are left for another call")
            break
        faulthandler.dump_traceback_later(MAX_SECONDS, exit=True)
        journal.enter(case.key)
        for record in _or_error(measure, case):
            journal.write(record)
            print(describe(record), flush=True)
            expect_device(journal)
        journal.leave()
        faulthandler.cancel_dump_traceback_later()
        num_now += journal.is_done(case.key)
    print(f"{num_now} cases measured, {num_before} done before", flush=True)


def in_time(
    measure: Callable[[Any], Iterable[Record]], journal: Journal, deadline: float
) -> Callable[[Any], Iterator[Record]]:
    """Leave cases that time is too short for, by their ``seconds``, to another call of the stage.

    The first of a call is measured all the same, or it never would be.
    """

    def measure_in_time(case: Any) -> Iterator[Record]:
        left, session = deadline - time.monotonic(), journal.facts["session"]
        is_begun = any(
            record["session"] == session and "backend" in record for record in journal.records
        )
        if is_begun and left < case.seconds:
            print(f"{left:.0f} s are too few for {' '.join(case.key.values())}", flush=True)
        else:
            yield from measure(case)

    return measure_in_time


def _or_error(measure: Callable[[Any], Iterable[Record]], case: Case) -> Iterator[Record]:
    """Yield the records of ``measure`` for the case, and its error, if it ends in one."""
    try:
        yield from measure(case)
    except Exception as error:
        yield {**case.key, "error": describe_error(error)}


def expect_device(journal: Journal) -> None:
    """End the process if the device is lost to it."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"the device is lost: {describe_error(error)}", flush=True)
            journal.leave()
            raise SystemExit(GO_ON) from None


def describe_error(error: BaseException) -> str:
    """The kind of error and its first lines, and those of the one before: a failed capture has one.

    Compilers and CUDA add pages.
    """
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {' '.join(lines[:4])}"[:600]
    return (
        text if error.__context__ is None else f"{text}; after {describe_error(error.__context__)}"
    )


def describe(record: Record) -> str:
    """One line of progress."""
    what = " ".join(
        str(record[name])
        for name in ("case", "shape", "dtype", "policy", "backend", "mode", "modulation", "what")
        if name in record
    )
    if "error" in record:
        return f"{what}: {record['error']}"
    if "median_ms" not in record:
        return what
    share = record.get("share_of_ceiling")
    return (
        f"{what}: {record['median_ms']:.4f} ms ({record['p20_ms']:.4f} to {record['p80_ms']:.4f})"
        + (f", {share:.0%} of the ceiling" if share is not None else "")
    )
