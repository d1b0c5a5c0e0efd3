"""``tokencache train METHOD``: train what a policy learns, on the demo's model and digits.

A method is a module with ``add_arguments(parser)`` and ``run(options) -> int``.
"""

import argparse
import importlib
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import info
from ..integrations.diffusers.superpose import Draw
from ..policies.training import TrainingSettings
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
    """Run the method; a run that was broken off goes on from its state."""
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
    """What all methods take, with the method's defaults."""
    parser.add_argument("--steps", type=int, default=steps, help="training steps")
    parser.add_argument("--batch", type=int, default=batch, help="digits a training step")
    parser.add_argument("--learning-rate", type=float, default=learning_rate, metavar="RATE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=50, metavar="STEPS")
    parser.add_argument(
        "--sampler-steps", type=int, default=STEPS, help="DDIM steps to train for", metavar="STEPS"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, metavar="FILE")
    parser.add_argument("--out", type=Path, default=Path(out), metavar="FILE")
    parser.add_argument(
        "--state", type=Path, metavar="FILE", help="what resumes; default: --out with .state"
    )


def state_path(options: argparse.Namespace) -> Path:
    """Where the training keeps its checkpoint."""
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
    """What a record says of a training, whatever was trained."""
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
