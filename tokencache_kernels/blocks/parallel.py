"""Blocks whose attention and MLP stand side by side, with one projection of both."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .. import ops
from ..ops import RowNorm
from ..policies import Site
from .mlp import Layers
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
        layers: its layers, where the fused path may be taken, else None.
        backend: the backend of all ops.
        post_norm: see ``SubLayer``.
    """

    site: Site
    gate: Tensor | None
    modulation: Modulation
    attend: Callable[[], Tensor]
    module: Callable[[Tensor, Tensor], Tensor]
    layers: Layers | None = None
    backend: str = "auto"
    post_norm: RowNorm | None = None

    def compute(self, stream: ResidualStream) -> Tensor:
        """All tokens; see ``SubLayer``."""
        return self.module(stream.modulate(self.modulation), self.attend())

    def recompute_(
        self, cache: Tensor, stream: ResidualStream, indices: Tensor, positions: Tensor
    ) -> None:
        """The tokens at ``indices``, in three launches; see ``SubLayer``."""
        packed = stream.take_rows(indices, positions, self.modulation)
        backend = self.backend
        if self.layers is None:
            attended = ops.gather_rows(self.attend(), indices, backend=backend)
            rows = self.module(packed, attended)
            ops.scatter_rows_(cache, indices, rows, backend=backend)
            return
        hidden = self.layers.expand(packed, backend=backend)
        # one product over both, as in a full step: two would round their sum in between
        self.layers.store_(cache, indices, hidden, self.attend(), backend)
