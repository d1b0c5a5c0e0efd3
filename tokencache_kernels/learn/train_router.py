"""Train Learning-to-Cache's router on a diffusers transformer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import fail
from ..learn.training import TrainingSettings, train_module
from ..policies import CacheRouter, LearningToCacheConfig
from .superposition import (
    Draw,
    Superposition,
    check_conditioning,
    check_scheduler,
    find_sublayers,
    frozen,
    run_step_before,
)

LABEL_DROPOUT = 0.1


def train_router(
    transformer: Any,
    scheduler: Any,
    draw: Draw,
    settings: TrainingSettings,
    checkpoint: Path,
    *,
    sparsity: float,
    threshold: float,
    facts: Mapping[str, str],
    label_dropout: float = LABEL_DROPOUT,
) -> tuple[LearningToCacheConfig, list[dict[str, float]]]:
    """Train a router for the steps that a scheduler is set to; the transformer stays as it is.

    Each training step draws one of the sampler's steps that are not full. Clean latents are noised
    up to the full step before it; there the whole model takes a DDIM step, and its sub-layers'
    outputs are kept. In the step itself ``loss = mean((whole - blended)^2) + sparsity *
    sum(weight)`` compares the whole model's output with that in which every sub-layer gives
    ``weight * fresh + (1 - weight) * kept``, ``weight = sigmoid(logit)``.

    Args:
        transformer: a described model, conditioned by ``class_labels`` alone, that predicts noise,
            and a variance too or not.
        scheduler: a diffusers scheduler with ``alphas_cumprod`` and whole timesteps, which are set.
        draw: gives a batch of clean latents and class labels from a generator.
        settings: see ``train_module``; published routers took 50,000 steps of 64 samples at a rate
            of 1e-3, without weight decay.
        checkpoint: see ``train_module``.
        sparsity: the price of a computed sub-layer; a higher price skips more. Published: 1e-6 to
            5e-6 for the 56 sub-layers of DiT-XL.
        threshold: the router's, for inference and for the share shown in training.
        facts: see ``train_module``; the sizes, ``sparsity`` and ``label_dropout`` are added.
        label_dropout: the share of the labels that become the null class of guidance, for both.

    Returns:
        The router, and the history of ``train_module`` with ``error``, the loss's first term, and
        ``skipped``, the share of sub-layers that the thresholded router skips.

    Raises:
        ValueError: the scheduler has fewer than two steps, or a model with it does not predict
            noise; see ``train_module`` for the others.
        UnsupportedInputError: the transformer is of another class.
        DivergedError: see ``train_module``.
    """
    num_steps = check_scheduler("train_router", scheduler)
    if not sparsity >= 0:
        fail("train_router", "sparsity", "be at least 0", sparsity)
    check_conditioning("train_router", transformer)
    sites = list(find_sublayers(transformer))
    device = next(transformer.parameters()).device
    router = CacheRouter(len(sites) // 2, num_steps, settings.seed).to(device)
    null_class = transformer.config.num_embeds_ada_norm

    def make_config() -> LearningToCacheConfig:
        return LearningToCacheConfig(router.stack(), threshold, model=facts.get("model", ""))

    def compute_loss(_: int, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        counter = 2 * int(torch.randint(num_steps // 2, (), generator=generator))
        latents, labels = draw(generator)
        is_dropped = torch.rand(labels.shape, generator=generator) < label_dropout
        labels = torch.where(is_dropped.to(labels.device), null_class, labels)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        steps = torch.full(labels.shape, num_steps - 1 - counter)
        with torch.no_grad():
            with superposition.recording():
                latents = run_step_before(transformer, scheduler, latents, labels, noise, steps)
            timestep = scheduler.timesteps[steps].to(latents.device)
            whole = transformer(latents, timestep=timestep, class_labels=labels).sample
        weights = router(counter)
        with superposition.blending(dict(zip(sites, weights, strict=True))):
            blended = transformer(latents, timestep=timestep, class_labels=labels).sample
        error = (blended.float() - whole.float()).square().mean()
        figures = {"error": error.item(), "skipped": make_config().skipped_share}
        return error + sparsity * weights.sum(), figures

    superposition = Superposition(transformer)
    try:
        with frozen(transformer):
            history = train_module(
                router, compute_loss, settings, checkpoint,
                facts={
                    **facts,
                    "router": f"{len(sites)} sub-layers, {num_steps} steps",
                    "sparsity": str(sparsity),
                    "label_dropout": str(label_dropout),
                },
                after_step=lambda _: router.clamp_(),
            )  # fmt: skip
    finally:
        superposition.remove()
    return make_config(), history
