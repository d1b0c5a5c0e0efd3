"""Blocks whose attention and MLP stand side by side, with one projection of both."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from .. import ops
from ..policies import Site
from .stream import Modulation, ResidualStream


@dataclass(frozen=True)
class ParallelLayer:
    """``gate * fc2(cat(attended, activation(fc1(modulate(x)))))``: attention and MLP side by side.

    The cached feature is the output of the second layer, which also projects the attention. For a
    fresh token the MLP is recomputed, and its cached attention is projected again. The hidden
    activations are not cached: nothing would read them.

    Attributes:
        attend: gives the attention's output (B, N, D) before the projection; it is not called if
            the layer is reused.
        module: the model's own layers: packed rows of the norm and of the attention to the output.
        fc1: the first layer, where the fused path may be taken, else None.
        fc2: the second layer, likewise.
        activation: the activation between them, as ``ops.linear`` names it.
    """

    site: Site
    gate: Tensor | None
    modulation: Modulation
    attend: Callable[[], Tensor]
    module: Callable[[Tensor, Tensor], Tensor]
    fc1: nn.Linear | None = None
    fc2: nn.Linear | None = None
    activation: str = "none"
    backend: str = "auto"

    def compute(self, stream: ResidualStream) -> Tensor:
        """All tokens; see ``SubLayer``."""
        return self.module(stream.modulate(self.modulation), self.attend())

    def recompute_(
        self, cache: Tensor, stream: ResidualStream, indices: Tensor, positions: Tensor
    ) -> None:
        """The tokens at ``indices``, in three launches; see ``SubLayer``."""
        packed = stream.take_rows(indices, positions, self.modulation)
        backend = self.backend
        if self.fc1 is None or self.fc2 is None:
            attended = ops.gather_rows(self.attend(), indices, backend=backend)
            rows = self.module(packed, attended)
            ops.scatter_rows_(cache, indices, rows, backend=backend)
            return
        fc1, fc2 = self.fc1, self.fc2
        hidden = ops.linear(
            packed, fc1.weight, fc1.bias, activation=self.activation, backend=backend
        )
        # one product over both, as in a full step: two would round their sum in between
        ops.linear_scatter_(
            cache, indices, hidden, fc2.weight, fc2.bias, features=self.attend(), backend=backend
        )
