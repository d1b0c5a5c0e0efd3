"""Tables of the documentation, from records: ``python -m benchmarks.report`` writes them.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``. Of each case on each
device, the records of the commit that was measured last count. Dry runs never count.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from tokencache_kernels.demo.compare import make_table

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "digits.md"]
RESULTS = ROOT / "benchmarks" / "results"
COMPARISON = ROOT / "tokencache_kernels" / "demo" / "records" / "compare.json"

LAYERS = ["layer", "layer-of-given-tokens"]
CASE = ["device", "case", "shape", "dtype", "part"]
CONTENDER = ["policy", "backend", "mode", "modulation", "what"]
# bounds of a layer that are timed beside the contenders
BOUNDS = ["products", "eager-products"]
# the names of the paper's composition in records
PAPER = ["eager", "argsort", "sdpa"]
NOTHING = "Nothing of this kind has been measured."


def read_results(folder: Path = RESULTS) -> pd.DataFrame:
    """Read all records of a folder and keep those that count, one row each."""
    frames = [pd.read_json(path, lines=True) for path in sorted(folder.glob("*.jsonl"))]
    return keep_current(pd.concat(frames, ignore_index=True))


def keep_current(records: pd.DataFrame) -> pd.DataFrame:
    """Keep each contender's last record of the commit that was measured last."""
    records = records.reindex(columns=[*dict.fromkeys([*records, *CASE, *CONTENDER, "error"])])
    records = records[records.rehearsal.ne(True)].sort_values("utc", kind="stable")
    last = records.groupby(CASE, dropna=False).git.transform("last")
    return records[records.git.eq(last)].drop_duplicates([*CASE, *CONTENDER], keep="last")


def write_ops(records: pd.DataFrame) -> str:
    """Compare our fastest backend with the paper's composition and the strongest other."""
    return _by_device(records[~records.case.isin([*LAYERS, "model", "ceilings"])], _compare_op)


def _compare_op(case: pd.DataFrame) -> dict[str, str]:
    ours, baselines = case[case.baseline.eq(False)], case[case.baseline.eq(True)]
    paper = baselines[baselines.backend.isin(PAPER) & baselines["mode"].eq("stream")]
    other = _fastest(baselines[baselines.backend.ne("dense")])
    ours = _fastest(ours)
    return {
        "ours": _show_time(ours),
        "over the paper's composition": _ratio(_fastest(paper), ours),
        "strongest other": _show_time(other),
        "over it": _ratio(other, ours),
        "fraction of the roofline": "-" if ours is None else f"{ours.share_of_ceiling:.0%}",
    }


def write_layers(records: pd.DataFrame) -> str:
    """Compare partial layers with eager PyTorch, its compiler and the dense layer."""
    return _by_device(records[records.case.isin(LAYERS)], _compare_layer)


def _compare_layer(case: pd.DataFrame) -> dict[str, str]:
    case = case[~case.backend.isin(BOUNDS)]
    ours = _fastest(case[case.baseline.eq(False)])

    def over(backend: str, mode: str | None = None) -> str:
        found = case[case.backend.eq(backend) & case.baseline.eq(True)]
        return _ratio(_fastest(found if mode is None else found[found["mode"].eq(mode)]), ours)

    return {
        "ours": _show_time(ours),
        "over eager": over("eager", "stream"),
        "over eager in a graph": over("eager", "graph"),
        "over torch.compile": over("eager", "compiled"),
        "over all tokens": over("dense"),
    }


def draw_layers(records: pd.DataFrame, path: Path) -> None:
    """Draw how much faster a partial layer is than the dense one, by its fraction of tokens."""
    from matplotlib.figure import Figure

    records = records[records.case.isin(LAYERS) & _is_timed(records)]
    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).subplots()
    curves: dict[str, list[tuple[float, float]]] = {}
    for (device, _, _, dtype), case in records.groupby(["device", "case", "shape", "dtype"]):
        ours, dense = (
            _fastest(case[which]) for which in (case.baseline.eq(False), case.backend.eq("dense"))
        )
        sizes = ours["sizes"]
        name = f"{device}: {sizes['B']} x {sizes['N']} tokens, D = {sizes['D']}, {dtype}"
        point = (100 * sizes["S"] / sizes["N"], dense.median_ms / ours.median_ms)
        curves.setdefault(name, []).append(point)
    for name, curve in curves.items():
        axes.plot(*zip(*sorted(curve), strict=True), marker="o", label=name)
    axes.axhline(1, linestyle=":", color="grey", label="break-even")
    axes.set(xlabel="fresh tokens (%)", ylabel="times faster than all tokens", yscale="log")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def write_models(records: pd.DataFrame) -> str:
    """Compare whole runs with the dense model in its fastest mode."""
    runs = records[records.case.eq("model") & records["what"].eq("run") & _is_timed(records)]
    lines = []
    for (device, shape, part), case in runs.groupby(["device", "shape", "part"], sort=False):
        dense = _fastest(case[case.policy.eq("dense") & case.baseline.eq(True)])
        for names, found in case[case.policy.ne("dense")].groupby(CONTENDER[:4], sort=False):
            run = _fastest(found)
            lines.append(
                {
                    "device": device,
                    "model": f"{shape} ({part})",
                    "policy": ", ".join(names),
                    "run": _show_time(run),
                    "over dense": _ratio(dense, run),
                    "FLOP reduction": f"{run.flops_ratio:.2f}x",
                }
            )
    return _write_table(lines) if lines else NOTHING


def write_figures(records: pd.DataFrame) -> str:
    """Write the measured figures of the front page, each with its machine."""
    layer = records[records.case.eq(LAYERS[1]) & records["shape"].eq("dit-xl-256px-2-26")]
    layer = layer[layer.dtype.eq("float32")].set_index("backend").median_ms
    score = records[records.case.eq("attention_received") & records["shape"].eq("dit-xl-512px-2")]
    score = score[score.dtype.eq("float32")].set_index("backend").median_ms
    comparison = json.loads(COMPARISON.read_text())["records"]
    policy = next(record for record in comparison if record["policy"] == "tokencache")
    table = make_table(comparison)
    (device,) = records[records.case.eq(LAYERS[1])].device.unique()
    psnr = next(line for line in table if line.startswith("| tokencache |")).split(" | ")
    return "\n".join(
        [
            f"- **{layer['eager'] / layer['native']:.1f}x** over eager PyTorch for a partial layer "
            f"of DiT-XL/2: 26 of 256 tokens, batch 2, float32. The same layer on all tokens, "
            f"without its attention, takes {layer['dense'] / layer['native']:.0f} times as long.",
            f"- **{score['eager'] / score['native']:.1f}x** over an explicit attention map for the "
            f"score *attention received* at 1,024 tokens, in O(N) memory.",
            f"- **{psnr[2].split(' ')[0]}x** for whole runs of the demo's digit model under "
            f"TokenCache, at {psnr[3]} PSNR to the dense run ({policy['samples']} digits).",
            "",
            f"Measured on {device}, torch {_one(records.torch)}. The records are in "
            "[benchmarks/results](benchmarks/results) and "
            "[demo/records](tokencache_kernels/demo/records/compare.json).",
        ]
    )


def write_quality() -> str:
    """Write the comparison of all policies on the demo's model: findings, then every figure."""
    comparison = json.loads(COMPARISON.read_text())
    findings = [f"- {verdict}" for verdict in comparison["verdicts"]]
    return "\n".join([*findings, "", *make_table(comparison["records"])])


def make_tables(records: pd.DataFrame) -> dict[str, str]:
    """Write every table, by name."""
    return {
        "figures": write_figures(records),
        "models": write_models(records),
        "layers": write_layers(records),
        "ops": write_ops(records),
        "quality": write_quality(),
    }


def fill(text: str, tables: Mapping[str, str]) -> str:
    """Replace every table of a page."""

    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}\n{tables[match[2]]}\n{match[3]}"

    pattern = r"(<!-- table: (.+?) -->)\n.*?(<!-- end of table -->)"
    return re.sub(pattern, replace, text, flags=re.DOTALL)


def _by_device(records: pd.DataFrame, compare) -> str:
    records = records[_is_timed(records)]
    written = []
    for device, found in records.groupby("device"):
        lines = [
            {"case": ", ".join(names), **compare(case)}
            for names, case in found.groupby(["case", "shape", "dtype"], sort=False)
        ]
        written.append(f"**{device}**\n\n{_write_table(lines)}")
    return "\n\n".join(written) or NOTHING


def _is_timed(records: pd.DataFrame) -> pd.Series:
    return records.median_ms.notna() & records.error.isna()


def _fastest(records: pd.DataFrame) -> pd.Series | None:
    return None if records.empty else records.loc[records.median_ms.idxmin()]


def _ratio(slow: pd.Series | None, fast: pd.Series | None) -> str:
    if slow is None or fast is None:
        return "-"
    return f"{slow.median_ms / fast.median_ms:.2f}x"


def _show_time(record: pd.Series | None) -> str:
    if record is None:
        return "-"
    how = "" if record["mode"] == "stream" else f", {record['mode']}"
    mark = "†" if record.dirty else ""
    return f"{record.median_ms:.3g} ms{mark} ({record.backend}{how})"


def _write_table(lines: list[dict[str, str]]) -> str:
    rows = [list(lines[0]), ["---"] * len(lines[0]), *(line.values() for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _one(values: pd.Series) -> str:
    return " and ".join(sorted(set(values.dropna())))


def main() -> None:
    """Write all tables and the figure anew."""
    records = read_results()
    tables = make_tables(records)
    draw_layers(records, ROOT / "docs" / "break-even.png")
    for page in PAGES:
        page.write_text(fill(page.read_text(), tables))
        print(page)


if __name__ == "__main__":
    main()
