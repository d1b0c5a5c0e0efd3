"""Scores of TokenCache's predictor from the arguments of a transformer's first block."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...models import ModelSpec
from ...policies import Predictor, Step


def predict_scores(
    predictor: Predictor, model: ModelSpec, block: Any, given: Mapping[str, Any], step: Step
) -> Tensor:
    """Ask a policy's predictor for the scores of all blocks, (L, B, N).

    Args:
        predictor: may lie on another device.
        model: the description of the model.
        block: its first block.
        given: the arguments of that block's call, by name.
        step: the current step.
    """
    stack = model.stacks[0]
    hidden_states = given[stack.streams[0]]
    source = stack.vectors[0] if stack.vectors else None
    if source is None:
        conditioning = hidden_states.mean(dim=1)
    elif source.kind == "own_adaln":
        conditioning = read_conditioning(
            block, hidden_states, given["timestep"], given["class_labels"]
        )
    else:
        embedding = given[source.argument]
        conditioning = embedding.reshape(len(embedding), -1, hidden_states.shape[-1]).mean(dim=1)
    # it may have been loaded before the model was moved
    scores: Tensor = predictor.to(hidden_states.device)(hidden_states, conditioning, step.index)
    return scores


def read_conditioning(
    block: Any, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor
) -> Tensor:
    """The embedding of timestep and class that modulates a block, (B, D)."""
    conditioning: Tensor = block.norm1.emb(timestep, class_labels, hidden_dtype=hidden_states.dtype)
    return conditioning
