"""Write the table of docs/compatibility.md from the tests that carry ``works_with``.

``python tests/compatibility.py`` writes it; ``tests/test_compatibility.py`` fails where it is old.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
FILES = ("test_neighbours.py", "test_quantised.py", "test_lora.py")
BEGIN, END = "<!-- table: features -->\n", "<!-- end -->\n"


def make_table(items: Iterable[Any]) -> str:
    """Return the table: for each feature its test, and the classes that the test runs on."""
    classes: dict[str, set[str]] = defaultdict(set)
    tests: dict[str, set[str]] = defaultdict(set)
    for item in items:
        for marker in item.iter_markers("works_with"):
            feature = marker.args[0]
            tests[feature].add(f"{item.path.name}: `{item.originalname}`")
            name = getattr(item, "callspec", None) and item.callspec.params.get("name")
            classes[feature].add((name or "Flux").partition("Transformer")[0])
    rows = [
        f"| {feature} | {', '.join(sorted(classes[feature]))} | {'<br>'.join(sorted(of))} |"
        for feature, of in sorted(tests.items(), key=lambda row: row[0].strip("`").lower())
    ]
    return "\n".join(["| with a cache | on | test |", "|---|---|---|", *rows]) + "\n"


def replace_table(page: str, table: str) -> str:
    """Return the page with another table."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + "\n" + table + "\n" + END + rest.split(END)[1]


class _Collector:
    """A plugin that keeps what pytest has collected."""

    def pytest_collection_finish(self, session: Any) -> None:
        """Keep the items."""
        self.items = session.items


def main() -> None:
    """Collect the tests and write the page."""
    collector = _Collector()
    files = [str(ROOT / "tests" / "integrations" / file) for file in FILES]
    pytest.main(["--collect-only", "-qq", *files], plugins=[collector])
    PAGE.write_text(replace_table(PAGE.read_text(), make_table(collector.items)))


if __name__ == "__main__":
    sys.exit(main())
