"""The row pass: add gated cached branches to every token, modulate the selected ones.

A partial layer adds the cached attention and MLP outputs to all tokens and feeds a few of them to
the MLP. Both read the whole residual stream, so both are one pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..backends.reference import RowNorm
from ._checks import expect, expect_indices, expect_no_grad, expect_writable, fail
from ._library import define, no_result, run, without_autocast
from .select import invert_indices

NORMS = ("layer", "rms", "none")

Gates = Sequence[Tensor | None]
BranchNorms = Sequence[RowNorm | None]


def unpack_norms(
    weights: list[Tensor | None], offsets: list[float], eps: list[float]
) -> list[RowNorm | None]:
    """Build the norms of branches from a schema's arguments; an ``eps`` below 0 stands for none."""
    if max(eps, default=-1.0) < 0:
        return []
    return [
        None if one_eps < 0 else RowNorm("rms", weight, None, offset, one_eps)
        for weight, offset, one_eps in zip(weights, offsets, eps, strict=True)
    ]


def _pack_norms(
    norms: BranchNorms, count: int
) -> tuple[list[Tensor | None], list[float], list[float]]:
    """The inverse, with an entry for each branch: a program compiled ahead of time drops a list
    that is empty.
    """
    if not norms:
        return [None] * count, [0.0] * count, [-1.0] * count
    return (
        [None if norm is None else norm.weight for norm in norms],
        [0.0 if norm is None else norm.weight_offset for norm in norms],
        [-1.0 if norm is None else norm.eps for norm in norms],
    )


def _run_add_branches_(
    hidden_states: Tensor,
    branches: list[Tensor],
    gates: list[Tensor | None],
    norm_weights: list[Tensor | None],
    norm_offsets: list[float],
    norm_eps: list[float],
    vector_index: Tensor | None,
    backend: str,
) -> None:
    norms = unpack_norms(norm_weights, norm_offsets, norm_eps)
    launch = run("add_branches", hidden_states, backend)
    launch(hidden_states, hidden_states, branches, gates, norms, vector_index)


def _run_add_branches(
    hidden_states: Tensor,
    branches: list[Tensor],
    gates: list[Tensor | None],
    norm_weights: list[Tensor | None],
    norm_offsets: list[float],
    norm_eps: list[float],
    vector_index: Tensor | None,
    backend: str,
) -> Tensor:
    out = _fake_out(hidden_states)
    norms = unpack_norms(norm_weights, norm_offsets, norm_eps)
    launch = run("add_branches", hidden_states, backend)
    launch(out, hidden_states, branches, gates, norms, vector_index)
    return out


def _run_gather_modulate(
    hidden_states: Tensor,
    indices: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    norm_kind: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_offset: float,
    eps: float,
    vector_index: Tensor | None,
    backend: str,
) -> Tensor:
    norm = RowNorm(norm_kind, norm_weight, norm_bias, norm_offset, eps)
    launch = run("gather_modulate", hidden_states, backend)
    packed: Tensor = launch(hidden_states, indices, shift, scale, norm, vector_index)
    return packed


def _run_row_pass_(hidden_states: Tensor, *arguments: Any) -> Tensor:
    return _run_row_pass_into(hidden_states, hidden_states, *arguments)


def _run_row_pass(hidden_states: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    out = _fake_out(hidden_states)
    return out, _run_row_pass_into(out, hidden_states, *arguments)


def _run_row_pass_into(
    out: Tensor,
    hidden_states: Tensor,
    branches: list[Tensor],
    gates: list[Tensor | None],
    norm_weights: list[Tensor | None],
    norm_offsets: list[float],
    norm_eps: list[float],
    indices: Tensor,
    positions: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    norm_kind: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_offset: float,
    eps: float,
    vector_index: Tensor | None,
    backend: str,
) -> Tensor:
    norms = unpack_norms(norm_weights, norm_offsets, norm_eps)
    norm = RowNorm(norm_kind, norm_weight, norm_bias, norm_offset, eps)
    packed: Tensor = run("row_pass", hidden_states, backend)(
        out, hidden_states, branches, gates, indices, positions, shift, scale, norm, norms,
        vector_index,
    )  # fmt: skip
    return packed


def _fake_packed(hidden_states: Tensor, indices: Tensor) -> Tensor:
    return hidden_states.new_empty(*indices.shape, hidden_states.shape[2])


def _fake_out(hidden_states: Tensor) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


_BRANCHES = (
    "Tensor[] branches, Tensor?[] gates, Tensor?[] norm_weights, float[] norm_offsets,"
    " float[] norm_eps"
)
_VECTORS = (
    "Tensor? shift, Tensor? scale, str norm_kind, Tensor? norm_weight, Tensor? norm_bias,"
    " float norm_offset, float eps, Tensor? vector_index, str backend"
)
_add_branches_ = define(
    f"add_branches_(Tensor(a!) hidden_states, {_BRANCHES}, Tensor? vector_index, str backend)"
    " -> ()",
    _run_add_branches_,
    no_result,
)
_add_branches = define(
    f"add_branches(Tensor hidden_states, {_BRANCHES}, Tensor? vector_index, str backend) -> Tensor",
    _run_add_branches,
    lambda hidden_states, *_: _fake_out(hidden_states),
)
_gather_modulate = define(
    f"gather_modulate(Tensor hidden_states, Tensor indices, {_VECTORS}) -> Tensor",
    _run_gather_modulate,
    lambda hidden_states, indices, *_: _fake_packed(hidden_states, indices),
)
_row_pass_ = define(
    f"row_pass_(Tensor(a!) hidden_states, {_BRANCHES}, Tensor indices, Tensor positions,"
    f" {_VECTORS}) -> Tensor",
    _run_row_pass_,
    lambda hidden_states, *others: _fake_packed(hidden_states, others[5]),
)
_row_pass = define(
    f"row_pass(Tensor hidden_states, {_BRANCHES}, Tensor indices, Tensor positions,"
    f" {_VECTORS}) -> (Tensor, Tensor)",
    _run_row_pass,
    lambda hidden_states, *others: (
        _fake_out(hidden_states),
        _fake_packed(hidden_states, others[5]),
    ),
)


def add_branches_(
    hidden_states: Tensor,
    branches: Sequence[Tensor],
    gates: Gates,
    *,
    branch_norms: BranchNorms = (),
    vector_index: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Add gated branches to the residual stream in place, in one pass over it.

    ``hidden_states += sum_j gates[j] * branches[j]``, added in this order, accumulated in float32
    and rounded once by the fast paths. A run of skipped sub-layers collapses into one call. With
    ``branch_norms`` a branch is normalised before its gate.

    Args:
        hidden_states: (B, N, D), written in place, not expanded; any float dtype; stride 1 along D.
        branches: J tensors (B, N, D), dtype and device of ``hidden_states``. One that shares memory
            with it is copied first.
        gates: J gates, or None for an ungated branch: (B, D), one of each sample; (B, N, D), one of
            each token; or with ``vector_index`` (B, K, D).
        branch_norms: J norms of kind ``"rms"``, or None for a branch as it is; empty: none has one.
        vector_index: (B, N) int32, clipped to [0, K): which of the K vectors of its sample each
            token takes, of all vectors of rank 3; None: those have one of each token.
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
        Learning-to-Cache (arXiv:2406.01733). Lumina-Next (arXiv:2406.18583) normalises a branch
        before its gate.
    """
    op = "add_branches_"
    _check_branches(op, hidden_states, branches, gates, branch_norms, vector_index)
    expect_writable(op, "hidden_states", hidden_states)
    branches, gates = list(branches), list(gates)
    if backend == "reference":
        without_autocast(reference.add_branches)(
            hidden_states, hidden_states, branches, gates, branch_norms, vector_index
        )
        return hidden_states
    expect_no_grad(op, hidden_states, *branches, *gates, *_weights_of(branch_norms))
    _add_branches_(
        hidden_states,
        branches,
        gates,
        *_pack_norms(branch_norms, len(branches)),
        vector_index,
        backend,
    )
    return hidden_states


def add_branches(
    hidden_states: Tensor,
    branches: Sequence[Tensor],
    gates: Gates,
    *,
    branch_norms: BranchNorms = (),
    vector_index: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Like ``add_branches_``, into a new contiguous tensor; ``hidden_states`` keeps its value."""
    op = "add_branches"
    _check_branches(op, hidden_states, branches, gates, branch_norms, vector_index)
    branches, gates = list(branches), list(gates)
    if backend == "reference":
        return without_autocast(reference.sum_branches)(
            hidden_states, branches, gates, branch_norms, vector_index
        ).contiguous()
    expect_no_grad(op, hidden_states, *branches, *gates, *_weights_of(branch_norms))
    out: Tensor = _add_branches(
        hidden_states,
        branches,
        gates,
        *_pack_norms(branch_norms, len(branches)),
        vector_index,
        backend,
    )
    return out


def gather_modulate(
    hidden_states: Tensor,
    indices: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    norm: RowNorm | None = None,
    vector_index: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Gather the selected tokens, normalise them and apply the adaLN shift and scale.

    ``out[b, s] = norm(hidden_states[b, indices[b, s]]) * (1 + scale[b]) + shift[b]``; an empty slot
    gives zeros.

    Args:
        hidden_states: (B, N, D), any float dtype; stride 1 along D.
        indices: (B, S) int32; see ``gather_rows``.
        shift: dtype and device of ``hidden_states``. (B, D) is one of each sample, (B, N, D) one of
            each token, and (B, K, D) goes with ``vector_index``. None: 0.
        scale: as ``shift``.
        norm: a norm of weights (D,) of the same dtype; None: LayerNorm without weights.
        vector_index: see ``add_branches_``.
        eps: of the norm where none is given: added to the variance, in the square of the unit of
            ``hidden_states``.
        backend: see ``add_branches_``.

    Returns:
        (B, S, D), contiguous, with the dtype and device of ``hidden_states``.

    Raises:
        ValueError, TypeError, RuntimeError, BackendUnavailableError: see ``add_branches_``.

    Source:
        adaLN-Zero of DiT (arXiv:2212.09748) on the rows that ToCa recomputes; RMSNorm
        (arXiv:1910.07467).
    """
    op = "gather_modulate"
    check_modulate(op, hidden_states, indices, shift, scale, norm, vector_index)
    norm = norm or RowNorm(eps=eps)
    if backend == "reference":
        return without_autocast(reference.gather_modulate)(
            hidden_states, indices, shift, scale, norm, vector_index
        )
    expect_no_grad(op, hidden_states, shift, scale, *_weights_of([norm]))
    packed: Tensor = _gather_modulate(
        hidden_states, indices, shift, scale, *flatten_norm(norm), vector_index, backend
    )
    return packed


def row_pass_(
    hidden_states: Tensor,
    branches: Sequence[Tensor],
    gates: Gates,
    indices: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    branch_norms: BranchNorms = (),
    norm: RowNorm | None = None,
    vector_index: Tensor | None = None,
    positions: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Add gated branches to all tokens in place, and pack the selected ones modulated, in one pass.

    ``add_branches_`` followed by ``gather_modulate`` of its result.

    Args:
        hidden_states: (B, N, D), written in place; see ``add_branches_``.
        branches: J tensors (B, N, D); see ``add_branches_``.
        gates: J gates; see ``add_branches_``.
        indices: (B, S) int32, unique per sample; see ``gather_rows``.
        shift: see ``gather_modulate``.
        scale: as ``shift``.
        branch_norms: see ``add_branches_``.
        norm: see ``gather_modulate``.
        vector_index: see ``add_branches_``; of gates, shift and scale alike.
        positions: (B, N) int32, the slot of each token or -1, as ``select_tokens_`` returns it;
            must belong to ``indices``. Made from ``indices`` when not given.
        eps: see ``gather_modulate``.
        backend: see ``add_branches_``.

    Returns:
        The packed rows (B, S, D), contiguous; zeros in empty slots.

    Raises:
        ValueError, TypeError, RuntimeError, BackendUnavailableError: see ``add_branches_``.

    Source:
        One block of a partial step of ToCa (arXiv:2410.05317): the cached attention and the
        previous block's cached MLP output are gated by the current step.
    """
    op = "row_pass_"
    _check_branches(op, hidden_states, branches, gates, branch_norms, vector_index)
    check_modulate(op, hidden_states, indices, shift, scale, norm, vector_index, gates)
    expect_writable(op, "hidden_states", hidden_states)
    positions = _make_positions(op, hidden_states, indices, positions, backend)
    branches, gates, norm = list(branches), list(gates), norm or RowNorm(eps=eps)
    if backend == "reference":
        return without_autocast(reference.row_pass)(
            hidden_states, hidden_states, branches, gates, indices, positions, shift, scale, norm,
            branch_norms, vector_index,
        )  # fmt: skip
    weights = _weights_of([norm, *branch_norms])
    expect_no_grad(op, hidden_states, *branches, *gates, shift, scale, *weights)
    packed: Tensor = _row_pass_(
        hidden_states, branches, gates, *_pack_norms(branch_norms, len(branches)),
        indices, positions, shift, scale, *flatten_norm(norm), vector_index, backend,
    )  # fmt: skip
    return packed


def row_pass(
    hidden_states: Tensor,
    branches: Sequence[Tensor],
    gates: Gates,
    indices: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    branch_norms: BranchNorms = (),
    norm: RowNorm | None = None,
    vector_index: Tensor | None = None,
    positions: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Like ``row_pass_``, but return (the sum as a new contiguous tensor, the packed rows)."""
    op = "row_pass"
    _check_branches(op, hidden_states, branches, gates, branch_norms, vector_index)
    check_modulate(op, hidden_states, indices, shift, scale, norm, vector_index, gates)
    positions = _make_positions(op, hidden_states, indices, positions, backend)
    branches, gates, norm = list(branches), list(gates), norm or RowNorm(eps=eps)
    if backend == "reference":
        out = without_autocast(reference.sum_branches)(
            hidden_states, branches, gates, branch_norms, vector_index
        ).contiguous()
        packed = without_autocast(reference.gather_modulate)(
            out, indices, shift, scale, norm, vector_index
        )
        return out, packed
    weights = _weights_of([norm, *branch_norms])
    expect_no_grad(op, hidden_states, *branches, *gates, shift, scale, *weights)
    out, packed = _row_pass(
        hidden_states, branches, gates, *_pack_norms(branch_norms, len(branches)),
        indices, positions, shift, scale, *flatten_norm(norm), vector_index, backend,
    )  # fmt: skip
    return out, packed


def _check_branches(
    op: str,
    hidden_states: Tensor,
    branches: Sequence[Tensor],
    gates: Gates,
    branch_norms: BranchNorms,
    vector_index: Tensor | None,
) -> None:
    expect(op, "hidden_states", hidden_states, (None, None, None), "(B, N, D)")
    if len(branches) != len(gates):
        fail(op, "gates", f"hold one entry per branch, {len(branches)}", len(gates))
    if branch_norms and len(branch_norms) != len(branches):
        fail(op, "branch_norms", f"hold one entry per branch, {len(branches)}", len(branch_norms))
    if vector_index is not None:
        _expect_vector_index(op, vector_index, hidden_states)
    for j, (branch, gate) in enumerate(zip(branches, gates, strict=True)):
        expect(op, f"branches[{j}]", branch, hidden_states.shape, "(B, N, D)", like=hidden_states)
        if gate is not None:
            _expect_vectors(op, f"gates[{j}]", gate, hidden_states, vector_index)
    if vector_index is not None:
        _expect_one_count(op, gates)
    for j, norm in enumerate(branch_norms):
        if norm is None:
            continue
        if norm.kind != "rms" or norm.bias is not None:
            fail(op, f"branch_norms[{j}]", "be of kind 'rms' without a bias", repr(norm.kind))
        _expect_norm(op, f"branch_norms[{j}]", norm, hidden_states)


def check_modulate(
    op: str,
    hidden_states: Tensor,
    indices: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    norm: RowNorm | None,
    vector_index: Tensor | None,
    gates: Gates = (),
) -> None:
    """Check the arguments of ``gather_modulate``, or those of a row pass besides its branches."""
    expect(op, "hidden_states", hidden_states, (None, None, None), "(B, N, D)")
    expect_indices(op, indices, hidden_states)
    if vector_index is not None:
        _expect_vector_index(op, vector_index, hidden_states)
    if shift is not None:
        _expect_vectors(op, "shift", shift, hidden_states, vector_index)
    if scale is not None:
        _expect_vectors(op, "scale", scale, hidden_states, vector_index)
    if vector_index is not None:
        _expect_one_count(op, (*gates, shift, scale))
    if norm is not None:
        _expect_norm(op, "norm", norm, hidden_states)


def _expect_vectors(
    op: str, name: str, vectors: Tensor, like: Tensor, vector_index: Tensor | None
) -> None:
    """Check shift, scale or gate: a vector of each sample, of each token, or K by their number."""
    B, N, D = like.shape
    if not isinstance(vectors, Tensor) or vectors.dim() != 3:
        expect(op, name, vectors, (B, D), "(B, D)", like=like)
    elif vector_index is None:
        expect(op, name, vectors, (B, N, D), "(B, N, D)", like=like)
    else:
        expect(op, name, vectors, (B, None, D), "(B, K, D)", like=like)
        if vectors.shape[1] == 0:
            fail(op, name, "hold at least one vector of each sample", tuple(vectors.shape))


def _expect_one_count(op: str, vectors: Sequence[Tensor | None]) -> None:
    """Check that all numbered vectors are equally many."""
    counts = {one.shape[1] for one in vectors if one is not None and one.dim() == 3}
    if len(counts) > 1:
        fail(op, "vector_index", "number as many vectors everywhere", sorted(counts))


def _expect_vector_index(op: str, vector_index: Tensor, hidden_states: Tensor) -> None:
    expect(
        op, "vector_index", vector_index, hidden_states.shape[:2], "(B, N)",
        like=hidden_states, dtypes=(torch.int32,),
    )  # fmt: skip


def _expect_norm(op: str, name: str, norm: RowNorm, like: Tensor) -> None:
    if not isinstance(norm, RowNorm) or norm.kind not in NORMS:
        got = repr(norm.kind) if isinstance(norm, RowNorm) else type(norm).__name__
        fail(op, name, f"be a RowNorm of a kind among {', '.join(NORMS)}", got)
    if norm.eps < 0:
        fail(op, name, "have an eps of at least 0", norm.eps)
    for part, vector in (("weight", norm.weight), ("bias", norm.bias)):
        if vector is not None:
            expect(op, f"{name}'s {part}", vector, like.shape[2:], "(D,)", like=like)


def flatten_norm(norm: RowNorm) -> tuple[str, Tensor | None, Tensor | None, float, float]:
    """The fields of a norm in the order of the schemas."""
    return norm.kind, norm.weight, norm.bias, norm.weight_offset, norm.eps


def _weights_of(norms: BranchNorms) -> list[Tensor | None]:
    return [part for norm in norms if norm is not None for part in (norm.weight, norm.bias)]


def _make_positions(
    op: str, hidden_states: Tensor, indices: Tensor, positions: Tensor | None, backend: str
) -> Tensor:
    """The positions, checked, or made where they were left out."""
    B, N, _ = hidden_states.shape
    if positions is None:
        return invert_indices(indices, N, backend=backend)
    expect(op, "positions", positions, (B, N), "(B, N)", like=hidden_states, dtypes=(torch.int32,))
    return positions
