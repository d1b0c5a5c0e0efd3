"""The residual stream of one step, with the gated branches that have not been added to it yet."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops


class Modulation(NamedTuple):
    """A layer norm without weights, then ``y * (1 + scale) + shift``; both (B, D)."""

    shift: Tensor
    scale: Tensor
    eps: float


class ResidualStream:
    """Hidden states plus pending branches, added as late as possible and in one pass.

    A layer's MLP output is added together with the next layer's attention output, and a run of
    reused layers collapses into one pass. Nothing else may look at the stream before ``flush``.
    """

    def __init__(self, hidden_states: Tensor, backend: str = "auto") -> None:
        self._hidden_states = hidden_states.contiguous()
        # the caller may still hold the tensor it gave us: the first pass writes a new one
        self._is_ours = self._hidden_states is not hidden_states
        self._branches: list[Tensor] = []
        self._gates: list[Tensor | None] = []
        self._backend = backend

    @property
    def hidden_states(self) -> Tensor:
        """(B, N, D), without the pending branches."""
        return self._hidden_states

    def add(self, branch: Tensor, gate: Tensor | None) -> None:
        """Add ``gate * branch`` later; ``branch`` (B, N, D) must not change before that."""
        self._branches.append(branch)
        self._gates.append(gate)

    def take_rows(self, indices: Tensor, positions: Tensor, modulation: Modulation) -> Tensor:
        """Add the pending branches and pack the selected rows, normalised and modulated: one
        launch.

        Args:
            indices: (B, S) int32; see ``ops.row_pass``.
            positions: (B, N) int32, the inverse of ``indices``.
            modulation: the norm, and the current step's shift and scale.

        Returns:
            (B, S, D).
        """
        shift, scale, eps = modulation
        arguments = (self._branches, self._gates, indices, shift, scale)
        if self._is_ours:
            packed = ops.row_pass_(
                self._hidden_states, *arguments, positions=positions, eps=eps, backend=self._backend
            )
        else:
            self._hidden_states, packed = ops.row_pass(
                self._hidden_states, *arguments, positions=positions, eps=eps, backend=self._backend
            )
        self._clear()
        return packed

    def modulate(self, modulation: Modulation) -> Tensor:
        """Like ``take_rows`` of all tokens: (B, N, D)."""
        B, N, _ = self._hidden_states.shape
        tokens = torch.arange(N, dtype=torch.int32, device=self._hidden_states.device)
        tokens = tokens.expand(B, N)
        return self.take_rows(tokens, tokens, modulation)

    def gather_rows(self, indices: Tensor) -> Tensor:
        """Add the pending branches and pack the selected rows as they are: (B, S, D)."""
        return ops.gather_rows(self.flush(), indices, backend=self._backend)

    def flush(self) -> Tensor:
        """Add the pending branches and return the hidden states."""
        if self._branches:
            if self._is_ours:
                ops.add_branches_(
                    self._hidden_states, self._branches, self._gates, backend=self._backend
                )
            else:
                self._hidden_states = ops.add_branches(
                    self._hidden_states, self._branches, self._gates, backend=self._backend
                )
            self._clear()
        return self._hidden_states

    def follow(self, hidden_states: Tensor) -> None:
        """Go on from ``hidden_states``, which is the last shown value, perhaps with an addition.

        A model may add a term of its own between two blocks, such as ControlNet's residual. The
        pending branches are still to be added.
        """
        if hidden_states is not self._hidden_states:
            self._hidden_states = hidden_states.contiguous()
            self._is_ours = False

    def clip(self, limit: float) -> None:
        """Add the pending branches and clip to [-limit, limit], as some models do in float16."""
        self._hidden_states = self.flush().clip(-limit, limit)
        self._is_ours = True

    def _clear(self) -> None:
        self._is_ours = True
        self._branches, self._gates = [], []
