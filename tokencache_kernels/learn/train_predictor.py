"""Training of TokenCache's predictor on a diffusers transformer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import fail
from ..integrations.diffusers.prediction import read_conditioning
from ..learn.training import TrainingSettings, train_module
from ..policies import ContentPredictor, Predictor, TablePredictor, rank_scores
from .superposition import (
    Draw,
    Superposition,
    check_conditioning,
    check_scheduler,
    find_sublayers,
    frozen,
    run_step_before,
)


def read_inputs(
    transformer: Any, latents: Tensor, timestep: Tensor, class_labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a predictor's inputs: the tokens (B, N, D), and the conditioning (B, D) of block 0."""
    hidden_states = transformer.pos_embed(latents)
    block = transformer.transformer_blocks[0]
    return hidden_states, read_conditioning(block, hidden_states, timestep, class_labels)


def make_table_predictor(transformer: Any, num_steps: int) -> TablePredictor:
    """A new table for a ``DiTTransformer2DModel`` and its own size of latents."""
    return TablePredictor(*_sizes(transformer), num_steps)


def make_content_predictor(
    transformer: Any, num_steps: int, width: int | None = None
) -> ContentPredictor:
    """A new content-dependent predictor for a ``DiTTransformer2DModel``.

    Args:
        transformer: its first block gives the heads' width, and the weights to begin with.
        num_steps: the sampler's steps.
        width: a multiple of the heads' width. Without it the block is as wide as the model, and
            takes the first block's weights; a narrower one begins at random.
    """
    block = transformer.transformer_blocks[0]
    hidden = block.attn1.to_q.in_features
    heads = block.attn1.heads
    width = hidden if width is None else width
    if width < 1 or width % (hidden // heads):
        wanted = f"be a positive multiple of {hidden // heads}"
        fail("make_content_predictor", "width", wanted, width)
    predictor = ContentPredictor(
        *_sizes(transformer), num_steps, hidden, width, width * heads // hidden
    )
    for own, given in (
        (predictor.modulation, block.norm1.linear),
        (predictor.query, block.attn1.to_q),
        (predictor.key, block.attn1.to_k),
        (predictor.value, block.attn1.to_v),
        (predictor.project, block.attn1.to_out[0]),
        (predictor.fc1, getattr(block.ff.net[0], "proj", None)),
        (predictor.fc2, block.ff.net[-1]),
    ):
        _copy_layer(own, given)
    return predictor


def train_predictor(
    transformer: Any,
    predictor: Predictor,
    scheduler: Any,
    draw: Draw,
    settings: TrainingSettings,
    checkpoint: Path,
    *,
    sparsity: float,
    facts: Mapping[str, str],
) -> list[dict[str, float]]:
    """Train a predictor by superposition, for the steps that a scheduler is set to.

    The transformer stays as it is.

    For samples at random steps, the step before is computed by the whole model and its sub-layers'
    outputs are kept. In the step itself each token takes ``score * fresh + (1 - score) * kept`` in
    both sub-layers of a block, and ``loss = mean((exact - superposed)^2) + sparsity * mean(score)``
    of the network's outputs.

    Args:
        transformer: a described model, conditioned by ``class_labels`` alone, that predicts noise,
            and a variance too or not.
        predictor: trained in place; on the transformer's device.
        scheduler: a diffusers scheduler with ``alphas_cumprod`` and whole timesteps, which are set.
        draw: gives a batch of clean latents and labels.
        settings: see ``train_module``.
        checkpoint: see ``train_module``.
        sparsity: how much a fresh token costs.
        facts: see ``train_module``; the predictor's sizes and the sparsity are added.

    Returns:
        The history of ``train_module``, with the mean ``score``.

    Raises:
        ValueError: the predictor does not fit the transformer or the scheduler; the scheduler has
            fewer than two steps, or a model with it does not predict noise; see ``train_module``
            for the others.
        UnsupportedInputError: the transformer is of another class.
        DivergedError: see ``train_module``.
    """
    _check_fit("train_predictor", transformer, predictor, scheduler)
    if not sparsity >= 0:
        fail("train_predictor", "sparsity", "be at least 0", sparsity)
    sites = list(find_sublayers(transformer))

    def compute_loss(_: int, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        latents, labels = draw(generator)
        steps = torch.randint(1, predictor.num_steps, (len(latents),), generator=generator)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        with torch.no_grad():
            with superposition.recording():
                latents = run_step_before(transformer, scheduler, latents, labels, noise, steps)
            timestep = scheduler.timesteps[steps].to(latents.device)
            exact = transformer(latents, timestep=timestep, class_labels=labels).sample
            inputs = read_inputs(transformer, latents, timestep, labels)
        scores = predictor(*inputs, steps.to(latents.device))
        with superposition.blending({site: scores[site.layer] for site in sites}):
            superposed = transformer(latents, timestep=timestep, class_labels=labels).sample
        error, score = (superposed.float() - exact.float()).square().mean(), scores.mean()
        figures = {"error": error.item(), "score": score.item()}
        return error + sparsity * score, figures

    superposition = Superposition(transformer)
    try:
        with frozen(transformer):
            return train_module(
                predictor, compute_loss, settings, checkpoint,
                facts={**facts, "predictor": repr(predictor), "sparsity": str(sparsity)},
            )  # fmt: skip
    finally:
        superposition.remove()


@torch.no_grad()
def calibrate_predictor(
    transformer: Any, predictor: Predictor, scheduler: Any, draw: Draw, num_batches: int, seed: int
) -> None:
    """Find the mean importance of each step, block and rank, from noised samples.

    The first step, of which nothing could be cached, counts as the second.

    Args:
        transformer: see ``train_predictor``; so are the next three.
        predictor: its ``importance`` is written.
        scheduler: see ``train_predictor``.
        draw: gives a batch of clean latents and labels.
        num_batches: for each step.
        seed: of the noise and the batches.
    """
    _check_fit("calibrate_predictor", transformer, predictor, scheduler)
    generator = torch.Generator().manual_seed(seed)
    importance = torch.zeros_like(predictor.importance)
    with frozen(transformer):
        for _ in range(num_batches):
            latents, labels = draw(generator)
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            for step, timestep in enumerate(scheduler.timesteps):
                timesteps = timestep.to(latents.device).expand(len(latents))
                noisy = scheduler.add_noise(latents, noise, timesteps)
                scores = predictor(*read_inputs(transformer, noisy, timesteps, labels), step)
                importance[step] += rank_scores(scores)
    importance[0] = importance[1]
    predictor.importance.copy_(importance / num_batches)


def _sizes(transformer: Any) -> tuple[int, int]:
    """The number of blocks, and of tokens."""
    embed = transformer.pos_embed
    return len(transformer.transformer_blocks), embed.height * embed.width


def _check_fit(op: str, transformer: Any, predictor: Predictor, scheduler: Any) -> None:
    check_conditioning(op, transformer)
    wanted = (*_sizes(transformer), check_scheduler(op, scheduler))
    sizes = (predictor.num_layers, predictor.num_tokens, predictor.num_steps)
    if sizes != wanted:
        describe = "{} blocks, {} tokens and {} steps".format
        fail(op, "predictor", f"be for {describe(*wanted)}", f"one for {describe(*sizes)}")


def _copy_layer(own: nn.Linear, given: Any) -> None:
    """Take the weights of a layer of the same shape."""
    if not isinstance(given, nn.Linear) or given.weight.shape != own.weight.shape:
        return
    with torch.no_grad():
        own.weight.copy_(given.weight)
        own.bias.zero_() if given.bias is None else own.bias.copy_(given.bias)
