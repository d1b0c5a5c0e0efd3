"""Records of measurements: JSON objects, one a line, that are only ever appended."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from tokencache_kernels.commands import info


def describe_run(
    device: torch.device, commit: str | None, session: str | None = None
) -> dict[str, Any]:
    """Collect the fields of every record of a run; ``commit`` is for a tree without history."""
    source = info.source_facts()
    if source["git"] is None:
        source["git"] = commit
    return {
        **info.machine_facts(device),
        "cuda": torch.version.cuda,
        "driver": driver_version(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("TOKENCACHE_", "TRITON_INTERPRET"))
        },
        **source,
        "command": " ".join((Path(sys.argv[0]).name, *sys.argv[1:])),
        "session": session,
    }


def driver_version() -> str | None:
    """The version of NVIDIA's driver, or None where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.check_output(command, text=True).split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return None


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write one record, with the time, so that nothing is lost when the machine goes away."""
    utc = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with path.open("a") as file:
        file.write(json.dumps({**record, "utc": utc}) + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a file; none where it does not exist yet."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        # a line that was cut short when its process was killed
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def is_same_run(record: dict[str, Any], facts: dict[str, Any]) -> bool:
    """Tell whether a record is of this session, or of the same code on the same device."""
    if facts["session"] is not None and record.get("session") == facts["session"]:
        return True
    if facts["git"] is None or facts["dirty"] or record["dirty"]:
        return False
    return all(record[name] == facts[name] for name in ("git", "device", "rehearsal"))
