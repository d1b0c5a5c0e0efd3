"""Sample digits with DDIM and classifier-free guidance; every sample has a noise of its own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .data import IMAGE_SIZE
from .model import NULL_CLASS, build_scheduler

STEPS = 50
GUIDANCE = 1.5


def make_noise(seeds: Sequence[int]) -> Tensor:
    """One image of noise a seed, (B, 1, 32, 32), whatever the other seeds are."""
    generator = torch.Generator()
    return torch.stack(
        [
            torch.randn(1, IMAGE_SIZE, IMAGE_SIZE, generator=generator.manual_seed(seed))
            for seed in seeds
        ]
    )


@torch.no_grad()
def sample(
    model: Any,
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """Draw one digit for each label, from the noise of its seed.

    The conditional and the unconditional half of the guidance share one forward of 2B rows a step,
    so that every method of caching sees the same rows.

    Args:
        model: the transformer, on any device, in float32, hooked or not.
        labels: B digits.
        seeds: B seeds of the initial noise; DDIM at eta 0 draws no other.
        steps: the number of DDIM steps, trailing-spaced.
        guidance: 1 is the conditional prediction alone, more is further from the unconditional one.
        on_step: called after each step; a progress bar's ``update``.

    Returns:
        (B, 1, 32, 32) float32 on the CPU; a digit lies about in [-1, 1], and is not clipped to it.
    """
    if len(labels) != len(seeds):
        raise ValueError(
            f"sample: seeds must be one for each of {len(labels)} labels, got {len(seeds)}"
        )
    device = next(model.parameters()).device
    scheduler = build_scheduler()
    scheduler.set_timesteps(steps)
    images = make_noise(seeds).to(device)
    classes = torch.tensor([*labels, *[NULL_CLASS] * len(labels)], device=device)
    for timestep in scheduler.timesteps:
        predicted = model(
            torch.cat([images, images]),
            timestep=timestep.to(device).expand(len(classes)),
            class_labels=classes,
        ).sample
        conditional, unconditional = predicted.chunk(2)
        noise = unconditional + guidance * (conditional - unconditional)
        images = scheduler.step(noise, timestep, images).prev_sample
        if on_step is not None:
            on_step()
    return images.cpu()
