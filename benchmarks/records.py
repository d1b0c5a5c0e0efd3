"""Records of measurements: JSON objects, one a line, that are only ever appended."""

import json
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from tokencache_kernels import info


def describe_run(device: torch.device, commit: str | None) -> dict[str, Any]:
    """What every record of a run carries; ``commit`` is for a tree that has no history with it."""
    source = info.source_facts()
    if source["git"] is None:
        source["git"] = commit
    return {
        **info.machine_facts(device),
        "cuda": torch.version.cuda,
        "driver": driver_version(),
        **source,
        "command": " ".join((Path(sys.argv[0]).name, *sys.argv[1:])),
    }


def driver_version() -> str | None:
    """The version of NVIDIA's driver, or None where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.check_output(command, text=True).split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return None


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Write one record, with the time, so that nothing is lost when the machine goes away."""
    utc = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with path.open("a") as file:
        file.write(json.dumps({**record, "utc": utc}) + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a file; none where it does not exist yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_same_code(record: dict[str, Any], facts: dict[str, Any]) -> bool:
    """Whether a record is of the very code that runs now, on the same device."""
    if facts["git"] is None or facts["dirty"] or record["dirty"]:
        return False
    return all(record[name] == facts[name] for name in ("git", "device"))
