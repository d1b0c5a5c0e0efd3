"""The table that ends a stage: of each case ours, and what it is compared with."""

from itertools import groupby
from operator import itemgetter

from .cases import OPS
from .stages import Record, describe

# the most telling come first; the records have them all
MAX_CASES = 60
MAX_ERRORS = 20


def print_table(records: list[Record]) -> None:
    """A line a case: the fastest of ours, the published way as called, the fastest other.

    In microseconds. ``dense`` is no other: it is what caching must beat, and stands by itself.
    """
    print(
        f"\n{'microseconds':58}{'ours':>10} {'':26}{'bound':>5}{'published':>11}"
        f"{'fastest other':>15} {'':22}{'dense':>9}"
    )
    timed = [record for record in records if "median_ms" in record]
    groups = groupby(timed, key=itemgetter("case", "shape", "dtype"))
    lines = [describe_case(" ".join(case), OPS[case[0]].eager, list(ways)) for case, ways in groups]
    errors = [
        describe(record) for record in records if "error" in record and not record.get("baseline")
    ]
    for found, limit in ((lines, MAX_CASES), (errors, MAX_ERRORS)):
        for line in found[:limit]:
            print(line)
        if len(found) > limit:
            print(f"and {len(found) - limit} more, in the records")


def describe_case(name: str, published: str, ways: list[Record]) -> str:
    """One line: how long each took, and who was the fastest."""
    ways = sorted(ways, key=itemgetter("median_ms"))
    dense = next((way for way in ways if way["backend"] == "dense"), None)
    ours = next((way for way in ways if not way["baseline"]), None)
    other = next((way for way in ways if way["baseline"] and way["backend"] != "dense"), None)
    called = next((w for w in ways if (w["backend"], w["mode"]) == (published, "stream")), None)
    share = f"{ours['share_of_ceiling']:.0%}" if ours else ""
    return (
        f"{name:58}{_show(ours, 10)} {_say_who(ours):26}{share:>5}"
        f"{_show(called, 11)}{_show(other, 15)} {_say_who(other):22}{_show(dense, 9)}"
    )


def _show(record: Record | None, width: int) -> str:
    return f"{'-':>{width}}" if record is None else f"{1e3 * record['median_ms']:{width}.1f}"


def _say_who(record: Record | None) -> str:
    return "" if record is None else f"{record['backend']} {record['mode']}"
