"""Train the demo's diffusion transformer on the shipped digits.

``python -m tokencache_kernels.demo.train`` writes the weights and, beside them, the record of how
they were made.
It can be stopped and started again: the state is kept in ``--state``.
"""

import argparse
import copy
import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..learn.training import TrainingSettings, train_module
from .data import load_digits
from .model import NULL_CLASS, SHAPE, WEIGHTS, build_model, build_scheduler, save_weights

EMA_DECAY = 0.999
LABEL_DROPOUT = 0.1
WARMUP_STEPS = 100


def rate_factor(step: int, total: int) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, total - WARMUP_STEPS)
    return 0.505 + 0.495 * math.cos(progress * math.pi)


def diffusion_loss(
    model: Any, scheduler: Any, images: Tensor, labels: Tensor, generator: torch.Generator
) -> Tensor:
    """The mean squared error of the predicted noise at random timesteps; drops some labels."""
    B = len(images)
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (B,), generator=generator)
    timesteps = timesteps.to(images.device)
    dropped = torch.rand(B, generator=generator).to(labels.device) < LABEL_DROPOUT
    labels = torch.where(dropped, NULL_CLASS, labels)
    noisy = scheduler.add_noise(images, noise, timesteps)
    with torch.autocast(images.device.type, torch.bfloat16):
        predicted = model(noisy, timestep=timesteps, class_labels=labels).sample
    return (predicted.float() - noise).square().mean()


def update_average(average: nn.Module, model: nn.Module, step: int) -> None:
    """Move the averaged weights towards the model's; faster at first, to forget the start."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    with torch.no_grad():
        for kept, new in zip(average.parameters(), model.parameters(), strict=True):
            kept.lerp_(new, 1 - decay)


def train(steps: int, batch: int, peak: float, state_path: Path, device: str) -> dict[str, Any]:
    """Train for ``steps`` steps of ``batch`` images; return the record."""
    torch.manual_seed(0)
    images, labels = (tensor.to(device) for tensor in load_digits())
    scheduler = build_scheduler()
    model = build_model().to(device).train()
    average = copy.deepcopy(model).requires_grad_(False)

    def compute_loss(step: int, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        chosen = torch.randint(len(images), (batch,), generator=generator).to(device)
        return diffusion_loss(model, scheduler, images[chosen], labels[chosen], generator), {}

    history = train_module(
        nn.ModuleDict({"model": model, "average": average}),
        compute_loss,
        TrainingSettings(
            num_steps=steps,
            learning_rate=peak,
            weight_decay=0.01,
            max_grad_norm=1.0,
            save_every=250,
        ),
        state_path,
        facts={"what": "the demo's model", "batch": str(batch), "total_steps": str(steps)},
        rate_factor=lambda step: rate_factor(step, steps),
        after_step=lambda step: update_average(average, model, step),
    )
    save_weights(average)
    return {
        "model": SHAPE,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "batch": batch,
        "peak_learning_rate": peak,
        "ema_decay": EMA_DECAY,
        "label_dropout": LABEL_DROPOUT,
        "seconds": round(history[-1]["seconds"], 1),
        "device": device if device != "cpu" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "loss_by_step": [[row["step"], round(row["loss"], 5)] for row in history],
    }


def main() -> None:
    """Parse the command line, train, and write the record beside the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--state", type=Path, default=Path("digits_dit_state.safetensors"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    record = train(
        options.steps, options.batch, options.learning_rate, options.state, options.device
    )
    record["command"] = (
        f"python -m tokencache_kernels.demo.train --steps {options.steps} --batch {options.batch}"
        f" --learning-rate {options.learning_rate}"
    )
    WEIGHTS.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
