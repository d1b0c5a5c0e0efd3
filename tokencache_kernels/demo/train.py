"""Train the demo's diffusion transformer on the shipped digits.

``python -m tokencache_kernels.demo.train`` writes the weights and, beside them, the record of how
they were made.
It can be stopped and started again: the state is kept in ``--state``.
"""

import argparse
import copy
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import load_digits
from .model import NULL_CLASS, SHAPE, WEIGHTS, build_model, build_scheduler, save_weights

EMA_DECAY = 0.999
LABEL_DROPOUT = 0.1
WARMUP_STEPS = 100


def learning_rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < WARMUP_STEPS:
        return peak * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, total - WARMUP_STEPS)
    return peak * (0.505 + 0.495 * float(torch.cos(torch.tensor(progress * torch.pi))))


def diffusion_loss(model: Any, scheduler: Any, images: Tensor, labels: Tensor) -> Tensor:
    """The mean squared error of the predicted noise at random timesteps; drops some labels."""
    noise = torch.randn_like(images)
    timesteps = torch.randint(
        0, scheduler.config.num_train_timesteps, (len(images),), device=images.device
    )
    dropped = torch.rand(len(labels), device=labels.device) < LABEL_DROPOUT
    labels = torch.where(dropped, NULL_CLASS, labels)
    noisy = scheduler.add_noise(images, noise, timesteps)
    with torch.autocast(images.device.type, torch.bfloat16):
        predicted = model(noisy, timestep=timesteps, class_labels=labels).sample
    return (predicted.float() - noise).square().mean()


def update_average(average: torch.nn.Module, model: torch.nn.Module, step: int) -> None:
    """Move the averaged weights towards the model's; faster at first, to forget the start."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    with torch.no_grad():
        for kept, new in zip(average.parameters(), model.parameters(), strict=True):
            kept.lerp_(new, 1 - decay)


def train(steps: int, batch: int, peak: float, state_path: Path, device: str) -> dict[str, Any]:
    """Train for ``steps`` steps of ``batch`` pictures; return the record."""
    from tqdm import tqdm

    torch.manual_seed(0)
    images, labels = (tensor.to(device) for tensor in load_digits())
    scheduler = build_scheduler()
    model = build_model().to(device).train()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01, fused=True)
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "losses": []}
    if state_path.exists():
        saved = torch.load(state_path, weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        state = saved["state"]

    recent: list[float] = []
    started = time.monotonic() - state["seconds"]
    progress = tqdm(range(state["step"], steps), initial=state["step"], total=steps, unit="step")
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        chosen = torch.randint(0, len(images), (batch,), device=device)
        loss = diffusion_loss(model, scheduler, images[chosen], labels[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, model, step)
        recent.append(loss.item())
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state["step"], state["seconds"] = step + 1, time.monotonic() - started
            state["losses"].append([step + 1, sum(recent) / len(recent)])
            progress.set_postfix(loss=f"{state['losses'][-1][1]:.4f}")
            recent.clear()
            torch.save(
                {
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "rng": torch.get_rng_state(),
                    "state": state,
                },
                state_path,
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
        "seconds": round(state["seconds"], 1),
        "device": device if device != "cpu" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "loss_by_step": [[step, round(loss, 5)] for step, loss in state["losses"]],
    }


def main() -> None:
    """Parse the command line, train, and write the record beside the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--state", type=Path, default=Path("digits_dit_state.pt"))
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
