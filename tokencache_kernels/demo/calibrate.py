"""``tokencache calibrate``: find a step table for the demo's model and a budget.

``learn.calibration.calibrate`` does the same for any transformer and any way of sampling.
"""

import argparse
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..integrations.step_carrier import apply_step_table, remove_step_table
from ..learn.calibration import Settings, calibrate
from ..policies import Newton, StepSchedule, StepTable, save_table
from ..version import __version__
from .data import NUM_CLASSES
from .metrics import PEAK
from .model import WEIGHTS, load_model
from .sampling import GUIDANCE, STEPS, sample

# far from those that the comparisons draw
FIRST_SEED = 100_000
FIRST_UNSEEN_SEED = 200_000


def table_path(num_full: int) -> Path:
    """The table of so many full steps of 50 that ships with the package."""
    return WEIGHTS.with_name(f"digits_steps_{num_full}.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The budget, the effort, and where to write."""
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument(
        "--ratio", type=float, metavar="X", help="at least so many times fewer FLOPs"
    )
    budget.add_argument(
        "--speed-up", type=float, metavar="X", help="so many times less time, as measured here"
    )
    budget.add_argument("--full-steps", type=int, metavar="N", help="so many steps run the model")
    parser.add_argument("--samples", type=int, default=24, help="digits to find the table on")
    parser.add_argument("--unseen", type=int, default=40, help="other digits, to judge it on")
    parser.add_argument("--trials", type=int, default=32, help="candidates to sample under")
    parser.add_argument("--seed", type=int, default=0, help="of the search")
    parser.add_argument("--steps", type=int, default=STEPS, help="DDIM steps")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--threads", type=int, help="torch's threads; default: as torch chooses")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, metavar="FILE")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the table; default: digits_steps_N.json"
    )
    parser.add_argument(
        "--state", type=Path, metavar="FILE",
        help="from which a search that was broken off goes on; default: --out with .state",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Search, write the table, say how good it is."""
    for name in ("samples", "unseen"):
        if getattr(options, name) < 2:
            raise ValueError(f"--{name} must be at least 2, got {getattr(options, name)}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = load_model(options.weights).to(options.device)

    def draw(seeds: Sequence[int]) -> Tensor:
        labels = [seed % NUM_CLASSES for seed in seeds]
        return sample(model, labels, seeds, steps=options.steps, guidance=options.guidance)

    num_full = choose_num_full(options, model, draw)
    out = options.out or Path(f"digits_steps_{num_full}.json")
    print(
        f"{num_full} of {options.steps} steps run the model: "
        f"{options.steps / num_full:.2f} times fewer FLOPs"
    )
    judged = calibrate(
        model,
        draw,
        Settings(options.steps, num_full, trials=options.trials, seed=options.seed),
        range(FIRST_SEED, FIRST_SEED + options.samples),
        range(FIRST_UNSEEN_SEED, FIRST_UNSEEN_SEED + options.unseen),
        peak=PEAK,
        state_path=options.state or out.with_suffix(".state"),
        facts={
            "weights_sha256": hashlib.sha256(options.weights.read_bytes()).hexdigest(),
            "guidance": options.guidance,
            "version": __version__,
            "torch": torch.__version__,
        },
    )
    save_table(judged.table, out)
    figures = judged.table.facts["psnr_unseen"]
    print(
        f"Full steps: {' '.join(map(str, judged.table.full_steps))}\n"
        f"PSNR to dense of {figures['samples']} unseen digits: mean {figures['mean']:.1f} dB, "
        f"5th percentile {figures['percentile_5']:.1f} dB, worst {figures['worst']:.1f} dB\n"
        f"Written to {out}; load_policy reads it"
    )
    return 0


def choose_num_full(options: argparse.Namespace, model: Any, draw: Any) -> int:
    """Turn the budget into a number of full steps, at least 1."""
    total: int = options.steps
    if options.full_steps is not None:
        num_full: int = options.full_steps
        return num_full
    ratio = options.ratio if options.ratio is not None else options.speed_up
    if not 1 <= ratio <= total:
        raise ValueError(f"the budget must be in [1, {total}], got {ratio:g}")
    if options.ratio is not None:
        return int(total / ratio)
    cost = measure_carried_step(model, draw, total)
    print(f"A carried step takes {cost:.1%} of the time of a full one here")
    # n + (total - n) * cost = total / ratio
    wanted = int((total / ratio - total * cost) / (1 - cost))
    if wanted < 1:
        raise ValueError(f"--speed-up must be below {1 / cost:.1f} here, got {ratio:g}")
    return wanted


def measure_carried_step(model: Any, draw: Any, total: int) -> float:
    """Measure the time of a step that carries the output, as a share of that of a full step."""
    seeds = range(8)
    few = StepTable.from_carrier(
        StepSchedule.even(max(total // 5, 1), total).steps, Newton(2), total
    )

    def measure() -> float:
        started = time.perf_counter()
        draw(seeds)
        return time.perf_counter() - started

    draw(seeds)
    dense = measure()
    apply_step_table(model, few)
    try:
        carried = measure()
    finally:
        remove_step_table(model)
    num_full = len(few.full_steps)
    return max(carried / dense * total - num_full, 0.0) / (total - num_full)
