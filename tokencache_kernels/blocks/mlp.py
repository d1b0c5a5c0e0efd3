"""A model's MLP as the ops want it: two linear layers and an activation, or the module itself."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from .. import ops


@dataclass(frozen=True)
class Mlp:
    """A layer that recomputes packed rows and stores them in the cache.

    Attributes:
        module: the model's own MLP, called on packed rows when it is not two plain linear layers
            (LoRA, quantised, gated).
        fc1: the first layer, where the fused path may be taken, else None.
        fc2: the second layer, likewise.
        activation: the activation between them, as ``ops.linear`` names it.
    """

    module: Callable[[Tensor], Tensor]
    fc1: nn.Linear | None = None
    fc2: nn.Linear | None = None
    activation: str = "none"

    def recompute_(
        self, cache: Tensor, indices: Tensor, packed: Tensor, backend: str = "auto"
    ) -> None:
        """cache[b, indices[b, s]] = mlp(packed[b, s]); two launches on the fused path."""
        if self.fc1 is None or self.fc2 is None:
            ops.scatter_rows_(cache, indices, self.module(packed), backend=backend)
            return
        hidden = ops.linear(
            packed, self.fc1.weight, self.fc1.bias, activation=self.activation, backend=backend
        )
        ops.linear_scatter_(cache, indices, hidden, self.fc2.weight, self.fc2.bias, backend=backend)
