"""The residual stream of one step, with the gated branches that have not been added to it yet."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops


class Modulation(NamedTuple):
    """The norm of a row, then ``y * (1 + scale) + shift``.

    Attributes:
        shift: (B, D), one of each sample, or (B, N, D), one of each token, or (B, K, D) in a stream
            that numbers its vectors; None: 0.
        scale: as ``shift``.
        norm: of the row; none, layer or root mean square.
    """

    shift: Tensor | None
    scale: Tensor | None
    norm: ops.RowNorm = ops.RowNorm()


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
        self._norms: list[ops.RowNorm | None] = []
        self._vector_index: Tensor | None = None
        self._backend = backend

    @property
    def hidden_states(self) -> Tensor:
        """(B, N, D), without the pending branches."""
        return self._hidden_states

    def number_vectors(self, vector_index: Tensor | None) -> None:
        """Let gates, shifts and scales of rank 3 be K vectors of each sample from here on.

        Args:
            vector_index: (B, N) int32, the vector that each token takes; None: they are one of each
                token.
        """
        if vector_index is not self._vector_index:
            # the pending branches keep their numbering
            self.flush()
            self._vector_index = vector_index

    def add(self, branch: Tensor, gate: Tensor | None, norm: ops.RowNorm | None = None) -> None:
        """Add ``gate * norm(branch)`` later.

        Args:
            branch: (B, N, D), must not change before that.
            gate: see ``Modulation``; None: 1.
            norm: of the branch, a root mean square; None: there is none.
        """
        self._branches.append(branch)
        self._gates.append(gate)
        self._norms.append(norm)

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
        shift, scale, norm = modulation
        arguments = (self._hidden_states, self._branches, self._gates, indices, shift, scale)
        if self._is_ours:
            packed = ops.row_pass_(
                *arguments, norm=norm, positions=positions, **self._pending_options
            )
        else:
            self._hidden_states, packed = ops.row_pass(
                *arguments, norm=norm, positions=positions, **self._pending_options
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
            arguments = (self._hidden_states, self._branches, self._gates)
            if self._is_ours:
                ops.add_branches_(*arguments, **self._pending_options)
            else:
                self._hidden_states = ops.add_branches(*arguments, **self._pending_options)
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

    @property
    def _pending_options(self) -> dict[str, Any]:
        return {
            "branch_norms": self._norms if any(self._norms) else (),
            "vector_index": self._vector_index,
            "backend": self._backend,
        }

    def _clear(self) -> None:
        self._is_ours = True
        self._branches, self._gates, self._norms = [], [], []
