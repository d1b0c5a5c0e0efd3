"""``tokencache train METHOD``: train a policy on the demo's model and digits.

A method is a module with ``add_arguments(parser)`` and ``run(options) -> int``.
"""

import argparse
import importlib
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..commands import info
from ..learn.superposition import Draw
from ..learn.training import TrainingSettings
from .data import load_digits
from .model import WEIGHTS
from .sampling import STEPS

METHODS = {
    "l2c": ("train_l2c", "Learning-to-Cache's router: which sub-layers a step skips"),
    "tokencache": ("train_tokencache", "TokenCache's predictor: which tokens a step computes"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A parser for each method."""
    subparsers = parser.add_subparsers(metavar="METHOD", required=True)
    for name, (module_name, summary) in METHODS.items():
        module = importlib.import_module(f".{module_name}", __package__)
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        module.add_arguments(subparser)
        subparser.set_defaults(run_method=module.run)


def run(options: argparse.Namespace) -> int:
    """Run the method; a run that was broken off goes on from its state.

    Raises:
        ValueError: an option makes no sense; see the method for the others.
    """
    if options.out.suffix != ".safetensors" or options.out.is_dir():
        raise ValueError(f"--out must be a file that ends in .safetensors, got {options.out}")
    if state_path(options) == options.out:
        raise ValueError(f"--state must be another file than --out, got {options.out}")
    for name in ("batch", "sampler_steps"):
        if getattr(options, name) < 1:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be at least 1, got {getattr(options, name)}")
    status: int = options.run_method(options)
    return status


def add_training_arguments(
    parser: argparse.ArgumentParser,
    *,
    steps: int,
    batch: int,
    learning_rate: float | None,
    out: str,
) -> None:
    """Add the options of all methods, with the method's defaults."""
    numbers: tuple[tuple[str, type, float | None, str], ...] = (
        ("--steps", int, steps, "training steps"),
        ("--batch", int, batch, "digits a training step"),
        ("--learning-rate", float, learning_rate, "AdamW's"),
        ("--seed", int, 0, "of what training draws"),
        ("--save-every", int, 50, "steps between two checkpoints, and lines of the record"),
        ("--sampler-steps", int, STEPS, "DDIM steps to train for"),
    )
    for option, kind, default, what in numbers:
        shown = "the predictor's own" if default is None else "%(default)s"
        parser.add_argument(
            option, type=kind, default=default, metavar="N" if kind is int else "RATE",
            help=f"{what}; default: {shown}",
        )  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--weights", type=Path, default=WEIGHTS, metavar="FILE", help="default: the demo's"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(out), metavar="FILE",
        help="what was trained, with its record in .json beside it; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--state", type=Path, metavar="FILE",
        help="the checkpoint that a run broken off goes on from; default: --out with .state",
    )  # fmt: skip


def state_path(options: argparse.Namespace) -> Path:
    """Give the path of the training's checkpoint."""
    given: Path | None = options.state
    out: Path = options.out
    return given or out.with_suffix(".state")


def make_settings(options: argparse.Namespace) -> TrainingSettings:
    """The settings of the training loop; no weight decay."""
    return TrainingSettings(
        num_steps=options.steps,
        learning_rate=options.learning_rate,
        save_every=options.save_every,
        seed=options.seed,
    )


def draw_digits(batch: int, device: str) -> Draw:
    """Batches of shipped digits and their labels, drawn with replacement."""
    images, labels = (tensor.to(device) for tensor in load_digits())

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(images), (batch,), generator=generator).to(device)
        return images[chosen], labels[chosen]

    return draw


def describe_run(options: argparse.Namespace, history: list[dict[str, float]]) -> dict[str, Any]:
    """Collect the facts of a training for its record."""
    names = ("steps", "batch", "learning_rate", "seed", "sampler_steps", "device")
    return {
        **{name: getattr(options, name) for name in names},
        "threads": torch.get_num_threads(),
        "seconds": round(history[-1]["seconds"], 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **info.source_facts(),
        "history": history,
    }
