"""The stage ``tune``: launch settings that win on this GPU, as the file that ships them.

Each problem that a kernel names for tuning leaves a record. The file is written anew after each,
from all records of this code and device, so that it always holds the current winners.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .records import describe_run
from .stages import Journal, Record, is_wanted, work_through

# the stage ``install`` puts the records of the file's settings there
RECORDS = "benchmarks/results/tune.jsonl"


@dataclass(frozen=True)
class Case:
    """One problem of one kernel."""

    tuned: Any

    @property
    def key(self) -> Record:
        """The common fields of its records."""
        return {"case": f"tune {self.tuned.kernel}", "shape": self.tuned.label, "dtype": "bfloat16"}


def can_tune(options: argparse.Namespace) -> bool:
    """On a GPU; elsewhere in a rehearsal, by Triton's interpreter."""
    return bool(options.rehearse) or options.device.type == "cuda"


def run_stage(options: argparse.Namespace, deadline: float) -> int:
    """Try launch settings, problem after problem; those that win so far are always in the file."""
    # Triton reads TRITON_INTERPRET when it is imported
    from tokencache_kernels.backends.triton._launch import INTERPRETER, device_of
    from tokencache_kernels.commands import tune

    facts = describe_run(options.device, options.commit, options.session)
    journal = Journal(options.out, "tune", {**facts, "rehearsal": options.rehearse})
    # whose problems are tiny
    device = INTERPRETER if options.rehearse else device_of(options.device)
    measure = tune.measure_on_cpu if options.rehearse else tune.measure_on_gpu

    def try_settings(case: Case) -> Iterator[Record]:
        tune.compile_ahead(case.tuned)
        outcome = tune.try_settings(case.tuned, measure)
        print(tune.describe_outcome(case.tuned, outcome), flush=True)
        yield {
            **case.key,
            "baseline": False,
            "key": outcome.key,
            "heuristic": asdict(outcome.heuristic),
            "best": asdict(outcome.best),
            "gain": tune.gains([outcome]).get(outcome.key),
            "before_ms": outcome.before.rounds,
            "after_ms": outcome.after.rounds,
            "failed": outcome.num_failed,
        }
        # the record is written by now
        won = {r["key"]: r["gain"] for r in journal.records if r.get("gain")}
        content = tune.make_record(won, device, " ".join(sys.argv))
        content |= {"git": facts["git"], "records": RECORDS}
        path = options.out / "launch-settings.json"
        path.write_text(json.dumps(content, indent=2) + "\n")

    cases = (Case(tuned) for tuned in tune.find_cases(device))
    chosen = (case for case in cases if is_wanted(case.key, options.only))
    work_through(journal, chosen, try_settings, deadline)
    return int(any("error" in record for record in journal.records))
