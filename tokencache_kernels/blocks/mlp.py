"""A model's MLP as the ops want it: its linear layers and an activation, or the module itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .. import ops


class Product(Protocol):
    """A linear layer, or rows of one."""

    @property
    def weight(self) -> Tensor:
        """(O, K)."""

    @property
    def bias(self) -> Tensor | None:
        """(O,), or None."""


@dataclass(frozen=True)
class Layers:
    """The layers of an MLP: ``fc2(activation(fc1(x)))``, or gated.

    Attributes:
        fc1: the first layer.
        fc2: the last layer.
        activation: the activation between them, as ``ops.linear`` names it.
        gate: of a gated MLP with two first layers the one that takes the activation:
            ``fc2(activation(gate(x)) * fc1(x))``.
        glu: of a gated MLP with one first layer the half of its rows that does, see ``ops.linear``.
    """

    fc1: Product
    fc2: Product
    activation: str = "none"
    gate: Product | None = None
    glu: str | None = None

    def expand(self, rows: Tensor, indices: Tensor | None = None, backend: str = "auto") -> Tensor:
        """Apply the first layer and the activation to rows, (B, S, K), or to those at indices."""
        gate = self.gate
        return ops.linear(
            rows, self.fc1.weight, self.fc1.bias, activation=self.activation, indices=indices,
            gate_weight=None if gate is None else gate.weight,
            gate_bias=None if gate is None else gate.bias, glu=self.glu, backend=backend,
        )  # fmt: skip

    def store_(
        self,
        cache: Tensor,
        indices: Tensor,
        hidden: Tensor,
        features: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        """Apply the last layer to (B, S, K), behind ``features``, and scatter into the cache."""
        fc2 = self.fc2
        ops.linear_scatter_(
            cache, indices, hidden, fc2.weight, fc2.bias, features=features, backend=backend
        )


@dataclass(frozen=True)
class Mlp:
    """A function of single tokens, recomputed for packed rows and stored in the cache.

    Attributes:
        module: the model's own MLP, called on packed rows when its layers are not plain (LoRA,
            quantised).
        layers: its layers, where the fused path may be taken, else None.
    """

    module: Callable[[Tensor], Tensor]
    layers: Layers | None = None

    def recompute_(
        self, cache: Tensor, indices: Tensor, packed: Tensor, backend: str = "auto"
    ) -> None:
        """cache[b, indices[b, s]] = mlp(packed[b, s]); two launches on the fused path."""
        if self.layers is None:
            ops.scatter_rows_(cache, indices, self.module(packed), backend=backend)
            return
        hidden = self.layers.expand(packed, backend=backend)
        self.layers.store_(cache, indices, hidden, backend=backend)
