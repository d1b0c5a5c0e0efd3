"""The row pass: add gated cached branches to every token, modulate the selected ones.

A partial layer adds the cached attention and MLP outputs to all tokens and feeds a few of them to
the MLP. Both read the whole residual stream, so both are one pass.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import reference
from ._checks import expect, expect_indices, expect_no_grad, expect_writable, fail
from ._library import define, no_result, run, without_autocast
from .select import invert_indices

Gates = Sequence[Tensor | None]


def _run_add_branches_(
    hidden_states: Tensor, branches: list[Tensor], gates: list[Tensor | None], backend: str
) -> None:
    run("add_branches", hidden_states, backend)(hidden_states, hidden_states, branches, gates)


def _run_add_branches(
    hidden_states: Tensor, branches: list[Tensor], gates: list[Tensor | None], backend: str
) -> Tensor:
    out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    run("add_branches", hidden_states, backend)(out, hidden_states, branches, gates)
    return out


def _run_gather_modulate(
    hidden_states: Tensor, indices: Tensor, shift: Tensor, scale: Tensor, eps: float, backend: str
) -> Tensor:
    launch = run("gather_modulate", hidden_states, backend)
    packed: Tensor = launch(hidden_states, indices, shift, scale, eps)
    return packed


def _run_row_pass_(
    hidden_states: Tensor,
    branches: list[Tensor],
    gates: list[Tensor | None],
    indices: Tensor,
    positions: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    backend: str,
) -> Tensor:
    packed: Tensor = run("row_pass", hidden_states, backend)(
        hidden_states, hidden_states, branches, gates, indices, positions, shift, scale, eps
    )
    return packed


def _run_row_pass(
    hidden_states: Tensor,
    branches: list[Tensor],
    gates: list[Tensor | None],
    indices: Tensor,
    positions: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    packed = run("row_pass", hidden_states, backend)(
        out, hidden_states, branches, gates, indices, positions, shift, scale, eps
    )
    return out, packed


def _fake_packed(hidden_states: Tensor, indices: Tensor) -> Tensor:
    return hidden_states.new_empty(*indices.shape, hidden_states.shape[2])


def _fake_out(hidden_states: Tensor) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


_add_branches_ = define(
    "add_branches_(Tensor(a!) hidden_states, Tensor[] branches, Tensor?[] gates, str backend)"
    " -> ()",
    _run_add_branches_,
    no_result,
)
_add_branches = define(
    "add_branches(Tensor hidden_states, Tensor[] branches, Tensor?[] gates, str backend) -> Tensor",
    _run_add_branches,
    lambda hidden_states, *_: _fake_out(hidden_states),
)
_gather_modulate = define(
    "gather_modulate(Tensor hidden_states, Tensor indices, Tensor shift, Tensor scale, float eps,"
    " str backend) -> Tensor",
    _run_gather_modulate,
    lambda hidden_states, indices, *_: _fake_packed(hidden_states, indices),
)
_row_pass_ = define(
    "row_pass_(Tensor(a!) hidden_states, Tensor[] branches, Tensor?[] gates, Tensor indices,"
    " Tensor positions, Tensor shift, Tensor scale, float eps, str backend) -> Tensor",
    _run_row_pass_,
    lambda hidden_states, branches, gates, indices, *_: _fake_packed(hidden_states, indices),
)
_row_pass = define(
    "row_pass(Tensor hidden_states, Tensor[] branches, Tensor?[] gates, Tensor indices,"
    " Tensor positions, Tensor shift, Tensor scale, float eps, str backend) -> (Tensor, Tensor)",
    _run_row_pass,
    lambda hidden_states, branches, gates, indices, *_: (
        _fake_out(hidden_states),
        _fake_packed(hidden_states, indices),
    ),
)


def add_branches_(
    hidden_states: Tensor, branches: Sequence[Tensor], gates: Gates, *, backend: str = "auto"
) -> Tensor:
    """Add gated branches to the residual stream in place, in one pass over it.

    ``hidden_states += sum_j gates[j] * branches[j]``, added in this order, accumulated in float32
    and rounded once by the fast paths. A run of skipped sub-layers collapses into one call.

    Args:
        hidden_states: (B, N, D), written in place, not expanded; any float dtype; stride 1 along D.
        branches: J tensors (B, N, D), dtype and device of ``hidden_states``. One that shares memory
            with it is copied first.
        gates: J gates (B, D), or None for an ungated branch.
        backend: ``"auto"``, ``"triton"``, ``"native"`` or ``"reference"``.

    Returns:
        ``hidden_states``.

    Raises:
        ValueError: a shape, stride, device or backend name does not fit.
        TypeError: a dtype does not fit.
        RuntimeError: an input requires grad and ``backend`` is not ``"reference"``.
        BackendUnavailableError: the backend named cannot run here.

    Source:
        The re-gated reuse of ToCa (arXiv:2410.05317) and of the skipped sub-layers of
        Learning-to-Cache (arXiv:2406.01733).
    """
    _check_branches("add_branches_", hidden_states, branches, gates)
    expect_writable("add_branches_", "hidden_states", hidden_states)
    if backend == "reference":
        without_autocast(reference.add_branches)(
            hidden_states, hidden_states, list(branches), list(gates)
        )
        return hidden_states
    expect_no_grad("add_branches_", hidden_states, *branches, *gates)
    _add_branches_(hidden_states, list(branches), list(gates), backend)
    return hidden_states


def add_branches(
    hidden_states: Tensor, branches: Sequence[Tensor], gates: Gates, *, backend: str = "auto"
) -> Tensor:
    """Like ``add_branches_``, into a new contiguous tensor; ``hidden_states`` keeps its value."""
    _check_branches("add_branches", hidden_states, branches, gates)
    if backend == "reference":
        return without_autocast(reference.sum_branches)(
            hidden_states, list(branches), list(gates)
        ).contiguous()
    expect_no_grad("add_branches", hidden_states, *branches, *gates)
    out: Tensor = _add_branches(hidden_states, list(branches), list(gates), backend)
    return out


def gather_modulate(
    hidden_states: Tensor,
    indices: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Gather the selected tokens, layer-normalise them and apply the adaLN shift and scale.

    ``out[b, s] = layer_norm(hidden_states[b, indices[b, s]]) * (1 + scale[b]) + shift[b]``; an
    empty slot gives zeros.

    Args:
        hidden_states: (B, N, D), any float dtype; stride 1 along D.
        indices: (B, S) int32; see ``gather_rows``.
        shift: (B, D), dtype and device of ``hidden_states``.
        scale: (B, D), likewise.
        eps: added to the variance, in the square of the unit of ``hidden_states``.
        backend: see ``add_branches_``.

    Returns:
        (B, S, D), contiguous, with the dtype and device of ``hidden_states``.

    Raises:
        ValueError, TypeError, RuntimeError, BackendUnavailableError: see ``add_branches_``.

    Source:
        adaLN-Zero of DiT (arXiv:2212.09748) on the rows that ToCa recomputes.
    """
    _check_modulate("gather_modulate", hidden_states, indices, shift, scale)
    if backend == "reference":
        return without_autocast(reference.gather_modulate)(
            hidden_states, indices, shift, scale, eps
        )
    expect_no_grad("gather_modulate", hidden_states, shift, scale)
    packed: Tensor = _gather_modulate(hidden_states, indices, shift, scale, eps, backend)
    return packed


def row_pass_(
    hidden_states: Tensor,
    branches: Sequence[Tensor],
    gates: Gates,
    indices: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    positions: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Add gated branches to all tokens in place, and pack the selected ones modulated, in one pass.

    ``add_branches_`` followed by ``gather_modulate`` of its result.

    Args:
        hidden_states: (B, N, D), written in place; see ``add_branches_``.
        branches: J tensors (B, N, D); see ``add_branches_``.
        gates: J gates (B, D), or None for an ungated branch.
        indices: (B, S) int32, unique per sample; see ``gather_rows``.
        shift: (B, D), dtype and device of ``hidden_states``.
        scale: (B, D), likewise.
        positions: (B, N) int32, the slot of each token or -1, as ``select_tokens_`` returns it;
            must belong to ``indices``. Made from ``indices`` when not given.
        eps: added to the variance.
        backend: see ``add_branches_``.

    Returns:
        The packed rows (B, S, D), contiguous; zeros in empty slots.

    Raises:
        ValueError, TypeError, RuntimeError, BackendUnavailableError: see ``add_branches_``.

    Source:
        One block of a partial step of ToCa (arXiv:2410.05317): the cached attention and the
        previous block's cached MLP output are gated by the current step.
    """
    positions = _check_row_pass(
        "row_pass_", hidden_states, branches, gates, indices, positions, shift, scale, backend
    )
    expect_writable("row_pass_", "hidden_states", hidden_states)
    gate_list, branch_list = list(gates), list(branches)
    if backend == "reference":
        return without_autocast(reference.row_pass)(
            hidden_states, hidden_states, branch_list, gate_list, indices, positions, shift, scale,
            eps,
        )  # fmt: skip
    expect_no_grad("row_pass_", hidden_states, *branches, *gates, shift, scale)
    packed: Tensor = _row_pass_(
        hidden_states, branch_list, gate_list, indices, positions, shift, scale, eps, backend
    )
    return packed


def row_pass(
    hidden_states: Tensor,
    branches: Sequence[Tensor],
    gates: Gates,
    indices: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    positions: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Like ``row_pass_``, but return (the sum as a new contiguous tensor, the packed rows)."""
    positions = _check_row_pass(
        "row_pass", hidden_states, branches, gates, indices, positions, shift, scale, backend
    )
    gate_list, branch_list = list(gates), list(branches)
    if backend == "reference":
        out = without_autocast(reference.sum_branches)(
            hidden_states, branch_list, gate_list
        ).contiguous()
        return out, without_autocast(reference.gather_modulate)(out, indices, shift, scale, eps)
    expect_no_grad("row_pass", hidden_states, *branches, *gates, shift, scale)
    out, packed = _row_pass(
        hidden_states, branch_list, gate_list, indices, positions, shift, scale, eps, backend
    )
    return out, packed


def _check_branches(
    op: str, hidden_states: Tensor, branches: Sequence[Tensor], gates: Gates
) -> None:
    expect(op, "hidden_states", hidden_states, (None, None, None), "(B, N, D)")
    if len(branches) != len(gates):
        fail(op, "gates", f"hold one entry per branch, {len(branches)}", len(gates))
    B, _, D = hidden_states.shape
    for j, (branch, gate) in enumerate(zip(branches, gates, strict=True)):
        expect(op, f"branches[{j}]", branch, hidden_states.shape, "(B, N, D)", like=hidden_states)
        if gate is not None:
            expect(op, f"gates[{j}]", gate, (B, D), "(B, D)", like=hidden_states)


def _check_modulate(
    op: str, hidden_states: Tensor, indices: Tensor, shift: Tensor, scale: Tensor
) -> None:
    expect(op, "hidden_states", hidden_states, (None, None, None), "(B, N, D)")
    expect_indices(op, indices, hidden_states)
    B, _, D = hidden_states.shape
    expect(op, "shift", shift, (B, D), "(B, D)", like=hidden_states)
    expect(op, "scale", scale, (B, D), "(B, D)", like=hidden_states)


def _check_row_pass(
    op: str,
    hidden_states: Tensor,
    branches: Sequence[Tensor],
    gates: Gates,
    indices: Tensor,
    positions: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    backend: str,
) -> Tensor:
    """Check every argument of the row pass; return the positions, made where they were left out."""
    _check_branches(op, hidden_states, branches, gates)
    _check_modulate(op, hidden_states, indices, shift, scale)
    B, N, _ = hidden_states.shape
    if positions is None:
        return invert_indices(indices, N, backend=backend)
    expect(op, "positions", positions, (B, N), "(B, N)", like=hidden_states, dtypes=(torch.int32,))
    return positions
