"""Figures and tables in Markdown."""

from collections.abc import Iterable, Sequence

from .records import Figure, Record

NOT_MEASURED = "not measured"
NOTHING = "Nothing of this kind has been measured."
DIRTY = "†"


def write_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column to the left, the others as Markdown likes."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show_number(value: float) -> str:
    """Three digits, without an exponent."""
    digits = next((n for n, limit in enumerate((100, 10, 1)) if abs(value) >= limit), 3)
    return f"{value:,.{digits}f}"


def show_duration(milliseconds: float) -> str:
    """In microseconds, milliseconds or seconds."""
    for unit, size in (("us", 1e-3), ("ms", 1.0)):
        if milliseconds < 1e3 * size:
            return f"{show_number(milliseconds / size)} {unit}"
    return f"{show_number(milliseconds / 1e3)} s"


def show_figure(figure: Figure | None, unit: str = "x") -> str:
    """With its unit, and the mark of a tree that was not clean."""
    if figure is None:
        return NOT_MEASURED
    mark = DIRTY if figure.is_dirty else ""
    if unit == "%":
        return f"{100 * figure.value:.0f}%{mark}"
    return f"{show_number(figure.value)}{'' if unit == 'x' else ' '}{unit}{mark}"


def show_time(record: Record | None) -> str:
    """How long it took, and who it was."""
    if record is None:
        return "-"
    how = {"graph": ", in a graph", "compiled": ", compiled"}.get(record["mode"], "")
    mark = DIRTY if record["dirty"] else ""
    return f"{show_duration(record['median_ms'])}{mark} ({record['backend']}{how})"
