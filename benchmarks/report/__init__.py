"""The tables and plots of README.md and docs/performance.md, from records: no figure is typed.

A table stands between two comments, ``<!-- table: NAME -->`` and ``<!-- end of table -->``; what is
between them is replaced. ``python -m benchmarks.report`` writes all anew.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokencache_kernels.demo.compare import make_table

from . import plots, predictions, tables, verdicts
from .records import Record, read_folder

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
PREDICTIONS = ROOT / "benchmarks" / "predictions.json"
EXPLANATIONS = ROOT / "benchmarks" / "explanations.json"
COMPARISON = ROOT / "tokencache_kernels" / "demo" / "records" / "compare.json"


def make_tables(
    records: Sequence[Record],
    predicted: Mapping[str, Any],
    explanations: Mapping[str, str],
) -> dict[str, str]:
    """All tables by name, out of the records that count."""
    return {
        "quality": write_quality(),
        "targets": verdicts.write_gpu_targets(
            records, predictions.as_records(predicted), predicted["device"]
        ),
        "targets-cpu": verdicts.write_cpu_targets(records),
        "models": tables.write_models(records),
        "layers": tables.write_layers(records),
        "kernels": tables.write_kernels(records),
        "predicted-runs": predictions.write_runs(predicted, records, explanations),
        "predicted-layers": predictions.write_layers(predicted, records, explanations),
        "predicted-kernels": predictions.write_kernels(predicted, records, explanations),
        "design": verdicts.write_design(records, explanations),
        **{f"plot: {name}": write_plot(name, records) for name in plots.PLOTS},
        "speed": write_plot("speed-flops", records, "docs/"),
    }


def read_tables() -> dict[str, str]:
    """All tables, out of what is committed."""
    predicted, explanations = (json.loads(path.read_text()) for path in (PREDICTIONS, EXPLANATIONS))
    return make_tables(read_folder(RESULTS), predicted, explanations)


def write_quality() -> str:
    """Policies of the demo's model: how good the digits are, what they cost, what that shows."""
    comparison = json.loads(COMPARISON.read_text())
    verdicts = [f"- {verdict}" for verdict in comparison["verdicts"]]
    # the verdicts are what most readers want of so many rows
    table = ["<details><summary>Every policy, in figures</summary>", ""]
    table += [*make_table(comparison["records"]), "", "</details>"]
    return "\n".join([*verdicts, *([""] if verdicts else []), *table])


def write_plot(name: str, records: Sequence[Record], folder: str = "") -> str:
    """The picture, or that there is nothing to draw."""
    if name in plots.list_plots(records):
        return f"![{plots.PLOTS[name].title}]({folder}{name}.png)"
    return (
        f"*{plots.PLOTS[name].title}*: not drawn, because nothing of this kind has been measured."
    )


def fill(text: str, written: Mapping[str, str]) -> str:
    """The text with every table in it written anew."""

    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}\n{written[match[2]]}\n{match[3]}"

    pattern = r"(<!-- table: (.+?) -->)\n.*?(<!-- end of table -->)"
    return re.sub(pattern, replace, text, flags=re.DOTALL)
