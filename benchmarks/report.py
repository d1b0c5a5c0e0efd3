"""Write the README's tables from the records: ``python -m benchmarks.report``.

A table stands between two comments, ``<!-- table: NAME -->`` and ``<!-- end of table -->``; what is
between them is replaced, so that no figure there is typed by hand.
"""

import json
import re
from pathlib import Path

from tokencache_kernels.demo.compare import make_table

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
COMPARISON = ROOT / "tokencache_kernels" / "demo" / "records" / "compare.json"


def write_quality_table():
    """Policies of the demo's model: how good the digits are, what they cost, what that shows."""
    comparison = json.loads(COMPARISON.read_text())
    verdicts = [f"- {verdict}" for verdict in comparison["verdicts"]]
    # the verdicts are what most readers want of so many rows
    table = ["<details><summary>Every policy, in figures</summary>", ""]
    table += [*make_table(comparison["records"]), "", "</details>"]
    return "\n".join([*verdicts, *([""] if verdicts else []), *table])


TABLES = {"quality": write_quality_table}


def fill(text):
    """The text with every table written anew."""
    for name, write in TABLES.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end of table -->)"
        text, count = re.subn(
            pattern, lambda m, w=write: f"{m[1]}{w()}\n{m[2]}", text, flags=re.DOTALL
        )
        assert count == 1, f"README.md must hold one table called {name}, holds {count}"
    return text


if __name__ == "__main__":
    README.write_text(fill(README.read_text()))
