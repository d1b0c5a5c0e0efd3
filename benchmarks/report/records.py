"""Which records count, and how one is found among them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..records import read_records

Record = dict[str, Any]
# what was timed in turn, and what tells its contenders apart
_CASE = ("device", "case", "shape", "dtype", "part")
_CONTENDER = ("policy", "backend", "mode", "modulation", "what")
# what is timed beside the contenders, to say what bounds them
_PARTS = ("products", "eager-products")


def read_folder(folder: Path) -> list[Record]:
    """The records that count of all files."""
    return keep_current(
        record for path in sorted(folder.glob("*.jsonl")) for record in read_records(path)
    )


def keep_current(records: Iterable[Record]) -> list[Record]:
    """Of each case on each device those of the commit that was measured last.

    So that what is compared was measured beside each other. A contender counts with its last
    record, be it a time or an error; rehearsals never count.
    """
    ordered = sorted(
        (record for record in records if not record.get("rehearsal")),
        key=lambda record: record["utc"],
    )
    commits = {_case_of(record): record["git"] for record in ordered}
    last: dict[tuple[Any, ...], Record] = {}
    for record in ordered:
        case = _case_of(record)
        if record["git"] == commits[case]:
            last[case + tuple(record.get(name) for name in _CONTENDER)] = record
    return list(last.values())


def _case_of(record: Record) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in _CASE)


def group_cases(records: Iterable[Record]) -> dict[tuple[Any, ...], list[Record]]:
    """The contenders of each case, by (device, case, shape, dtype, part)."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(_case_of(record), []).append(record)
    return groups


def list_devices(records: Iterable[Record]) -> list[str]:
    """The devices, GPUs first."""
    return sorted({r["device"] for r in records}, key=lambda device: (not is_gpu(device), device))


def is_gpu(device: str) -> bool:
    """Whether a device, as records name it, is a GPU; these tell their architecture."""
    return ", sm_" in device


def is_timed(record: Record) -> bool:
    """Whether the record holds a time, and no error."""
    return "median_ms" in record


def fastest(records: Iterable[Record]) -> Record | None:
    """The one of the least time."""
    return min(filter(is_timed, records), key=lambda record: record["median_ms"], default=None)


def list_ours(records: Iterable[Record]) -> list[Record]:
    """Those of this package."""
    return [r for r in records if not r.get("baseline") and r.get("backend") not in _PARTS]


def list_baselines(records: Iterable[Record], pattern: str = "*") -> list[Record]:
    """The others, whose ``backend/mode`` is like ``pattern``; of ``dense`` only if it says so."""
    return [
        record
        for record in records
        if record.get("baseline")
        and fnmatch(f"{record['backend']}/{record.get('mode')}", pattern)
        and record["backend"] not in _PARTS
        and (record["backend"] != "dense" or pattern.startswith("dense"))
    ]


@dataclass(frozen=True)
class Problem:
    """What a case must be to be found.

    Attributes:
        cases: one of these.
        sizes: these among its sizes, of which ``rows`` are the fresh tokens of all samples.
        dtype: of its tensors.
        min_bytes: what it moves, at least.
    """

    cases: tuple[str, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    dtype: str = "bfloat16"
    min_bytes: int = 0

    def find(self, records: Iterable[Record]) -> list[list[Record]]:
        """The contenders of each such case."""
        return list(group_cases(filter(self._fits, records)).values())

    def _fits(self, record: Record) -> bool:
        sizes = record.get("sizes", {})
        if "B" in sizes and "S" in sizes:
            sizes = {**sizes, "rows": sizes["B"] * sizes["S"]}
        return (
            record["case"] in self.cases
            and record.get("dtype") == self.dtype
            and self.sizes.items() <= sizes.items()
            and record.get("bytes", 0) >= self.min_bytes
        )


@dataclass(frozen=True)
class Figure:
    """A figure out of records, and whether one of them was of a tree with uncommitted changes."""

    value: float
    is_dirty: bool

    @classmethod
    def of(cls, value: float, sources: Sequence[Record]) -> "Figure":
        """The value that was made of these records."""
        return cls(value, any(record["dirty"] for record in sources))


def divide(slow: Record | None, fast: Record | None) -> Figure | None:
    """How many times faster one is than the other, where both were timed."""
    if slow is None or fast is None:
        return None
    return Figure.of(slow["median_ms"] / fast["median_ms"], [slow, fast])
