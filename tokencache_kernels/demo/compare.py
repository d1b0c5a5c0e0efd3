"""``tokencache compare``: every policy at several operating points, on the same seeds.

Writes a table, a plot of quality against measured speed, the JSON behind them, and the findings on
the papers' claims. The digits are kept in chunks, so that a broken run goes on from there.
"""

import argparse
import datetime
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..commands import info
from .classifier import classify, load_classifier
from .data import load_digits
from .drawing import Drawing, draw, load_drawn
from .methods import Method, parse_method, parse_those_trained
from .metrics import frechet_distance, psnr
from .model import WEIGHTS, load_model
from .sampling import GUIDANCE, STEPS
from .verdicts import NUM_SIGMAS, Point, describe_mean, describe_share, judge

POLICIES = (
    "fewer-35", "fewer-25", "fewer-17", "fewer-12", "fora-2", "fora-3", "fora-5",
    "taylor1-3", "taylor1-5", "taylor2-5", "random-3", "random-5", "toca-3", "toca-5",
    "toca1-3", "toca1-5", "duca-3", "duca-5", "tokencache-50", "tokencache", "tokencache-90",
    "l2c", "l2c-90", "l2c1", "tokencache1", "uniform-40", "uniform-60", "uniform-80", "even1-17",
    "carried2-25", "carried2-16", "calibrated-24", "calibrated-16", "calibrated-12", "calibrated-8",
)  # fmt: skip
# equal images are infinitely near; no cache is
MAX_PSNR = 100.0
_RESAMPLES = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options: methods and samples to draw, and the files to write."""
    parser.add_argument(
        "--policies", nargs="+", metavar="NAME", help="such as toca-3, next to dense; default: all"
    )
    parser.add_argument("--samples", type=int, default=80, help="digits of each policy")
    parser.add_argument(
        "--seeds", type=int, default=0, metavar="FIRST", help="the first; one for each digit"
    )
    parser.add_argument("--batch", type=int, default=20, help="digits a forward, twice the rows")
    parser.add_argument("--steps", type=int, default=STEPS, help="DDIM steps of the dense model")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--threads", type=int, help="torch's threads; default: as torch chooses")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, metavar="FILE")
    parser.add_argument(
        "--out", type=Path, default=Path("tokencache_compare"), metavar="FOLDER",
        help="for compare.md, .json, .png, and the digits, of which none is drawn twice",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Draw the missing digits, measure, write."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    drawing = Drawing(
        samples=options.samples,
        first_seed=options.seeds,
        batch=options.batch,
        steps=options.steps,
        guidance=options.guidance,
        device=torch.device(options.device),
        weights=options.weights,
        state=options.out / "digits",
    )
    if drawing.samples < 2:
        raise ValueError(f"--samples must be at least 2, got {drawing.samples}")
    if options.policies is None:
        others = parse_those_trained(POLICIES, drawing.steps)
    else:
        names = [name for name in dict.fromkeys(options.policies) if name != "dense"]
        others = [parse_method(name, drawing.steps) for name in names]
    methods = [parse_method("dense", drawing.steps), *others]
    draw(load_model(drawing.weights).to(drawing.device), methods, drawing)
    records, points = measure(methods, drawing)
    verdicts = judge(points)
    write(options.out, records, verdicts)
    print("\n".join([*make_table(records), "", *verdicts]))
    print(f"Written to {options.out}: compare.md, compare.json, compare.png and the digits")
    return 0


def measure(
    methods: Sequence[Method], drawing: Drawing
) -> tuple[list[dict[str, Any]], list[Point]]:
    """The record and the point of every method, whose digits are all there; dense comes first."""
    classifier = load_classifier()
    _, real = classify(classifier, load_digits()[0])
    # as near to the real digits as as many real digits are to the rest of them
    num_real = min(drawing.samples, len(real) // 2)
    facts = {
        "samples": drawing.samples,
        "first_seed": drawing.first_seed,
        "batch": drawing.batch,
        "dense_steps": drawing.steps,
        "guidance": drawing.guidance,
        "frechet_distance_of_real": round(frechet_distance(real[:num_real], real[num_real:]), 4),
        "weights_sha256": hashlib.sha256(drawing.weights.read_bytes()).hexdigest(),
        "load_average": round(os.getloadavg()[0], 2),
        **info.machine_facts(drawing.device),
        **info.source_facts(),
        "command": (
            f"tokencache compare --policies {' '.join(method.name for method in methods)}"
            f" --samples {drawing.samples} --seeds {drawing.first_seed} --batch {drawing.batch}"
            f" --steps {drawing.steps} --guidance {drawing.guidance:g}"
            f" --threads {torch.get_num_threads()} --device {drawing.device}"
        ),
        "utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    dense_images, dense_seconds = load_drawn(methods[0], drawing)
    records, points = [], []
    for method in methods:
        images, seconds = load_drawn(method, drawing)
        predicted, features = classify(classifier, images)
        is_right = predicted == drawing.labels
        nearness = psnr(images, dense_images).clamp_max(MAX_PSNR)
        speedup = (dense_seconds.sum() / seconds.sum()).item()
        record = {
            "policy": method.name,
            "settings": repr(method.policy),
            "steps": method.steps,
            "flops_ratio": round(method.flops_ratio, 3),
            "seconds": round(seconds.sum().item(), 2),
            **_with_interval("accuracy", *describe_share(is_right)),
            **_with_interval("frechet_distance", *describe_distance(features, real)),
            # without a policy no op of ours runs
            "backend": method.policy and info.chosen_backend("mlp_", drawing.device),
            **facts,
        }
        if method is not methods[0]:
            # both in the same chunk, so that a slow machine cancels
            ratios = dense_seconds / seconds
            _, interval = describe_mean(ratios) if len(ratios) > 1 else (0.0, None)
            record |= _with_interval("speedup", speedup, interval)
            record |= _with_interval("psnr_to_dense", *describe_mean(nearness))
            points.append(Point(method.family, method.flops_ratio, speedup, nearness))
        records.append(record)
    return records, points


def describe_distance(features: Tensor, real: Tensor) -> tuple[float, float]:
    """The Fréchet distance to the real digits, and the half-width of its 95 % interval.

    The interval is a bootstrap's: the spread over sets drawn anew from the samples. A distance of
    few samples is too large, all the same for all policies.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(features), (_RESAMPLES, len(features)), generator=generator)
    spread = torch.tensor([frechet_distance(features[chosen], real) for chosen in drawn]).std()
    return frechet_distance(features, real), NUM_SIGMAS * spread.item()


def _with_interval(name: str, value: float, interval: float | None) -> dict[str, float | None]:
    return {
        name: round(value, 4),
        f"{name}_interval": None if interval is None else round(interval, 4),
    }


def write(folder: Path, records: list[dict[str, Any]], verdicts: list[str]) -> None:
    """Write the table, the JSON and the plot, over existing ones."""
    content = json.dumps({"records": records, "verdicts": verdicts}, indent=1)
    (folder / "compare.json").write_text(content + "\n")
    lines = [*make_table(records), "", *(f"- {verdict}" for verdict in verdicts)]
    (folder / "compare.md").write_text("\n".join(lines) + "\n")
    write_plot(folder / "compare.png", records)


def make_table(records: Sequence[dict[str, Any]]) -> list[str]:
    """A table in Markdown, a line for each policy, and how it was made."""
    lines = [
        "| policy | fewer FLOPs | speed-up | PSNR to dense | Fréchet distance | as labelled |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        cells = (
            record["policy"],
            f"{record['flops_ratio']:.2f}x",
            _format(record, "speedup", "{:.2f}", "x"),
            _format(record, "psnr_to_dense", "{:.1f}", " dB"),
            _format(record, "frechet_distance", "{:.2f}"),
            _format(record, "accuracy", "{:.1f}", "%", scale=100),
        )
        lines.append(f"| {' | '.join(cells)} |")
    last = records[-1]
    backend = next(filter(None, (record["backend"] for record in records)), "none")
    lines += [
        "",
        f"{last['samples']} digits each, {last['dense_steps']} DDIM steps, guidance "
        f"{last['guidance']}, {last['device']}, backend `{backend}`, torch "
        f"{last['torch']}, load average {last['load_average']:.1f} at the end. Intervals are of "
        f"95 %, over the seeds. Real digits among themselves: Fréchet distance "
        f"{last['frechet_distance_of_real']:.2f}.",
    ]
    return lines


def _format(
    record: dict[str, Any], name: str, pattern: str, unit: str = "", scale: float = 1
) -> str:
    value, interval = record.get(name), record.get(f"{name}_interval")
    if value is None:
        return "-"
    spread = "" if interval is None else f" ± {pattern.format(scale * interval)}"
    return f"{pattern.format(scale * value)}{spread}{unit}"


def write_plot(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Nearness to dense, and distance from the real digits, against the measured speed-up."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    families: dict[str, list[dict[str, Any]]] = {}
    for record in sorted(records[1:], key=lambda record: record["speedup"]):
        families.setdefault(record["policy"].split("-")[0], []).append(record)
    for panel, name, label in (
        (panels[0], "psnr_to_dense", "PSNR to dense (dB)"),
        (panels[1], "frechet_distance", "Fréchet distance to real digits"),
    ):
        for family, members in families.items():
            panel.errorbar(
                [member["speedup"] for member in members],
                [member[name] for member in members],
                [member[f"{name}_interval"] for member in members],
                marker="o", capsize=2, label=family,
            )  # fmt: skip
        panel.set_xlabel("measured speed-up")
        panel.set_ylabel(label)
    panels[1].axhline(records[0]["frechet_distance"], linestyle=":", color="grey", label="dense")
    panels[1].legend(ncols=2, fontsize="small")
    figure.savefig(path, dpi=120)
