"""The stage ``attention``: every attention that can run here, and the order that follows.

It writes the table of ``tokencache_kernels/backends/attention.json`` with rows of this device's
own before the others, in the order of the times that were measured.
"""

import argparse
import itertools
import json
import math
from operator import itemgetter
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

from tokencache_kernels.backends import library

from . import cases
from .cases import Shape
from .kernels import Case, has_failed, time_ops
from .stages import Record

Row = dict[str, Any]
# where the stage ``install`` puts the records, which the table's rows name
REHEARSED = "a rehearsal: "
RECORDS = "benchmarks/results/attention.jsonl"
TABLE = Path(library.__file__).with_name("attention.json")


def run_stage(options: argparse.Namespace, deadline: float) -> int:
    """Time the attentions; end with the table of times, and with the order that follows."""
    records = time_ops("attention", list_cases(options), options, deadline)
    rows = order_attentions(records, name_architecture(options.device))
    table = merge(rows, json.loads(TABLE.read_text()))
    (options.out / "attention.json").write_text(json.dumps(table, indent=2) + "\n")
    for row in rows:
        heads = f"heads up to {row['max_head_dim']}"
        print(f"{row['device']} {', '.join(row['dtypes'])}, {heads}: {', '.join(row['order'])}")
    return has_failed(records)


def list_cases(options: argparse.Namespace) -> list[Case]:
    """The most informative first: in bfloat16 every shape, then other dtypes at a few."""
    leading, others = cases.ATTENTION_SHAPES[:5], cases.ATTENTION_SHAPES[5:]
    if options.device.type == "cpu":
        leading, others = cases.CPU_ATTENTION_SHAPES, ()
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    plan = [(shape, dtype) for dtype in dtypes for shape in leading]
    plan += [(shape, torch.bfloat16) for shape in others]
    if options.rehearse:
        plan = [(cases.TINY, torch.float32)]
    return [
        Case(op, shape, dtype, is_leading=shape in leading[:3])
        for shape, dtype in plan
        for op in cases.attention.OPS
        if op.fits(shape)
    ]


def name_architecture(device: torch.device) -> str:
    """As the table's rows name it: ``sm_90``, or ``cpu``."""
    if device.type == "cpu":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def order_attentions(records: list[Record], device: str) -> list[Row]:
    """A row for each dtype and head dim: the fastest first, over all problems that it took.

    A problem counts by the ratio to its fastest. An attention without a graph counts as called.
    """
    candidates = {*library.CANDIDATES, "triton", "native"}
    timed = [
        record
        for record in records
        if record["case"] == "attention"
        and "median_ms" in record
        and record["backend"] in candidates
    ]
    rows = []
    for (dtype, head_dim), group in itertools.groupby(sorted(timed, key=kind_of), key=kind_of):
        group = list(group)
        ratios: dict[str, list[float]] = {}
        for _, problem in itertools.groupby(group, key=itemgetter("shape")):
            # of a contender's two modes the later stays, which is the graph
            ways = sorted(problem, key=itemgetter("mode"), reverse=True)
            times = {way["backend"]: way["median_ms"] for way in ways}
            for name, time in times.items():
                ratios.setdefault(name, []).append(time / min(times.values()))
        last = group[-1]
        source = f"{RECORDS}, {last['device']}, commit {last['git']}"
        rows.append(
            {
                "device": device,
                "dtypes": [dtype],
                "max_head_dim": head_dim,
                "order": sorted(ratios, key=lambda name: geometric_mean(ratios[name])),
                "source": REHEARSED * last["rehearsal"] + source,
            }
        )
    return rows


def kind_of(record: Record) -> tuple[str, int]:
    """Give the problems of a row of the table; records of one shape then follow each other."""
    return record["dtype"], Shape(**record["sizes"]).head_dim


def merge(rows: list[Row], table: list[Row]) -> list[Row]:
    """The table with these rows first, without those that they leave nothing to."""
    measured: dict[tuple[str, str], int] = {}
    for row in rows:
        key = row["device"], row["dtypes"][0]
        measured[key] = max(measured.get(key, 0), row["max_head_dim"])

    def is_replaced(row: Row) -> bool:
        limit = row["max_head_dim"] or math.inf
        return all(measured.get((row["device"], dtype), 0) >= limit for dtype in row["dtypes"])

    return [*rows, *(row for row in table if not is_replaced(row))]
