"""The state of each token in each layer: its score and its staleness."""

import torch
from torch import Tensor


class TokenState:
    """Scores and staleness of one kind of sub-layer in all layers.

    Attributes:
        scores: (L, B, N) float32, the base score of the last full step.
        staleness: (L, B, N) int32, the partial steps since each token was computed.
    """

    def __init__(self, num_layers: int, batch: int, num_tokens: int, device: torch.device) -> None:
        shape = (num_layers, batch, num_tokens)
        # a later run may be outside of the inference mode of this one
        with torch.inference_mode(False):
            self.scores: Tensor = torch.empty(shape, dtype=torch.float32, device=device)
            self.staleness: Tensor = torch.empty(shape, dtype=torch.int32, device=device)
        self.reset()

    def reset(self) -> None:
        """Begin a new run, at the same addresses: all scores alike, every token fresh."""
        self.scores.fill_(1)
        self.staleness.zero_()

    def store_scores(self, layer: int, scores: Tensor) -> None:
        """Copy one layer's scores (B, N) in."""
        self.scores[layer].copy_(scores)

    def mark_fresh(self, layer: int) -> None:
        """A full step has computed every token of the layer."""
        self.staleness[layer].zero_()
