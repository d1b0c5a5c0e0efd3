"""The stage ``install``: the results of a run become shipped files, with their records.

Launch settings go to the file of their device, the table of attentions replaces the one there is,
and the records, which both of them name, are appended to ``benchmarks/results``.
"""

import argparse
import json
import shutil
from pathlib import Path

from tokencache_kernels.backends.triton._launch import INTERPRETER, SHIPPED, file_name

from .attention import REHEARSED, TABLE

RESULTS = Path(__file__).parent / "results"


def run_stage(options: argparse.Namespace, deadline: float) -> int:
    """Install the results in the folder, but nothing of a dry run."""
    out: Path = options.out
    for found in sorted(out.glob("*.jsonl")):
        if found.stem != "test":
            append_records(found, RESULTS / found.name)
    settings, table = out / "launch-settings.json", out / "attention.json"
    if settings.exists():
        device = json.loads(settings.read_text())["device"]
        if device != INTERPRETER.name:
            take_over(settings, SHIPPED / f"{file_name(device)}.json")
    if table.exists() and REHEARSED not in table.read_text():
        take_over(table, TABLE)
    return 0


def append_records(found: Path, kept: Path) -> None:
    """Append the lines that are not there yet, without those of a dry run."""
    known = set(kept.read_text().splitlines()) if kept.exists() else set()
    lines = [
        line
        for line in found.read_text().splitlines()
        if line not in known and not json.loads(line)["rehearsal"]
    ]
    if lines:
        with kept.open("a") as file:
            file.write("\n".join([*lines, ""]))
    print(f"{len(lines)} records -> {kept}")


def take_over(found: Path, shipped: Path) -> None:
    """Copy one file into the package."""
    shipped.parent.mkdir(exist_ok=True)
    shutil.copyfile(found, shipped)
    print(f"{found.name} -> {shipped}")
