"""Choose which tokens to recompute: combine scores, take the exact top, keep count of staleness."""

import torch
from torch import Tensor

from ..backends import reference
from ._checks import FLOATS, expect, expect_no_transform, fail
from ._library import define, run, without_autocast

Grid = tuple[int, int]


def _run_select_tokens_(
    scores: Tensor,
    staleness: Tensor,
    num_fresh: Tensor | None,
    max_fresh: int,
    staleness_weight: float,
    normalize: bool,
    grid: list[int] | None,
    tile: int,
    bonus: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if not staleness.is_contiguous():
        fail("select_tokens_", "staleness", "be contiguous", f"strides {staleness.stride()}")
    result: tuple[Tensor, Tensor] = run("select_tokens_", scores, backend)(
        scores, staleness, num_fresh, max_fresh, staleness_weight, normalize,
        None if grid is None else (grid[0], grid[1]), tile, bonus,
    )  # fmt: skip
    return result


def _fake_select_tokens_(
    scores: Tensor, staleness: Tensor, num_fresh: Tensor | None, max_fresh: int, *_: object
) -> tuple[Tensor, Tensor]:
    P = 1 if num_fresh is None else num_fresh.shape[0]
    L, B, N = scores.shape
    return staleness.new_empty(P, L, B, max_fresh), staleness.new_empty(P, L, B, N)


_select_tokens_ = define(
    "select_tokens_(Tensor scores, Tensor(a!) staleness, Tensor? num_fresh, SymInt max_fresh,"
    " float staleness_weight, bool normalize, SymInt[]? grid, int tile, float bonus, str backend)"
    " -> (Tensor, Tensor)",
    _run_select_tokens_,
    _fake_select_tokens_,
)
_invert_indices = define(
    "invert_indices(Tensor indices, SymInt num_tokens, str backend) -> Tensor",
    lambda indices, num_tokens, backend: _run_invert_indices(indices, num_tokens, backend),
    lambda indices, num_tokens, backend: indices.new_empty(indices.shape[0], num_tokens),
)


def _run_invert_indices(indices: Tensor, num_tokens: int, backend: str) -> Tensor:
    positions: Tensor = run("invert_indices", indices, backend)(indices, num_tokens)
    return positions


def select_tokens_(
    scores: Tensor,
    staleness: Tensor,
    max_fresh: int,
    *,
    num_fresh: Tensor | None = None,
    staleness_weight: float = 0.0,
    normalize: bool = True,
    grid: Grid | None = None,
    tile: int = 2,
    bonus: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Select the tokens with the highest combined score and update the staleness, in one launch.

    ``score = scores / max(|scores|_2, 1e-12) + staleness_weight * staleness``, in float32; on a
    grid, the best token of every tile x tile square is multiplied by ``1 + bonus``. The top
    ``num_fresh`` are fresh: ties go to the lowest index. Then ``staleness += 1``, and 0 where
    fresh, also when nothing is selected.

    Args:
        scores: (B, N) or (L, B, N) for L layers at once; float16, bfloat16 or float32. NaN ranks
            below every other score and is left out of the norm.
        staleness: int32 of the same shape, contiguous, updated in place.
        max_fresh: S, the width of the result; at most N.
        num_fresh: (L,) int32 on the device, how many tokens each layer recomputes, clamped to
            [0, S]; None: S in every layer. Only with scores of rank 3.
        staleness_weight: the amount that one step of staleness adds to the score.
        normalize: whether to divide the scores by their L2 norm over the tokens.
        grid: (H, W) with H * W = N, tokens in row-major order; None: no spatial bonus.
        tile: the side of a square of the grid; squares at the edges may be smaller.
        bonus: the share by which the best token of each square gains.
        backend: ``"auto"``, ``"triton"``, ``"native"`` or ``"reference"``.

    Returns:
        indices: (B, S) or (L, B, S) int32, ascending, filled up with -1.
        positions: int32 of the shape of ``scores``: the slot of each token, -1 if not fresh.

    Raises:
        ValueError: a shape, stride, device or backend name does not fit; S > N; H * W != N.
        TypeError: a dtype does not fit.
        BackendUnavailableError: the backend named cannot run here.

    Source:
        ToCa (arXiv:2410.05317, section 3): s1 or s2 as ``scores``, s3 with weight 0.25 / N,
        s4 as the published code has it, a factor for the winner of each square.
    """
    _check_select("select_tokens_", scores, staleness, num_fresh, max_fresh, grid, tile)
    rank = scores.dim()
    lead = scores.shape[:-2]
    if num_fresh is not None:
        if rank != 3:
            fail("select_tokens_", "num_fresh", "be None for scores of rank 2", "a tensor")
        expect(
            "select_tokens_", "num_fresh", num_fresh, (scores.shape[0],), "(L,)",
            like=scores, dtypes=(torch.int32,),
        )  # fmt: skip
        num_fresh = num_fresh[None]
    indices, positions = _select(
        scores, staleness, num_fresh, max_fresh, staleness_weight, normalize, grid, tile, bonus,
        backend,
    )  # fmt: skip
    return (
        indices.reshape(*lead, *indices.shape[2:]),
        positions.reshape(*lead, *positions.shape[2:]),
    )


def select_cycle_(
    scores: Tensor,
    staleness: Tensor,
    num_fresh: Tensor,
    max_fresh: int,
    *,
    staleness_weight: float = 0.0,
    normalize: bool = True,
    grid: Grid | None = None,
    tile: int = 2,
    bonus: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Make all selections of a cycle of P partial steps in one launch, from one frozen score.

    Equal to P calls of ``select_tokens_`` in turn with ``num_fresh[0] .. num_fresh[P - 1]``.

    Args:
        scores: (L, B, N); see ``select_tokens_``.
        staleness: (L, B, N) int32, contiguous, updated in place by all P steps.
        num_fresh: (P, L) int32 on the device, each clamped to [0, S].
        max_fresh: S, the width of the result; at most N.
        staleness_weight: see ``select_tokens_``; so are the arguments below.
        normalize: see ``select_tokens_``.
        grid: see ``select_tokens_``.
        tile: see ``select_tokens_``.
        bonus: see ``select_tokens_``.
        backend: see ``select_tokens_``.

    Returns:
        indices: (P, L, B, S) int32, ascending, filled up with -1.
        positions: (P, L, B, N) int32.

    Raises:
        ValueError, TypeError, BackendUnavailableError: see ``select_tokens_``.

    Source:
        ToCa on DiT and FLUX, where the attention score changes on full steps only.
    """
    _check_select("select_cycle_", scores, staleness, num_fresh, max_fresh, grid, tile)
    if scores.dim() != 3:
        fail("select_cycle_", "scores", "have shape (L, B, N)", tuple(scores.shape))
    expect(
        "select_cycle_", "num_fresh", num_fresh, (None, scores.shape[0]), "(P, L)",
        like=scores, dtypes=(torch.int32,),
    )  # fmt: skip
    return _select(
        scores, staleness, num_fresh, max_fresh, staleness_weight, normalize, grid, tile, bonus,
        backend,
    )  # fmt: skip


def select_tokens(
    scores: Tensor, staleness: Tensor, max_fresh: int, **options: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Like ``select_tokens_``, but return (indices, positions, new staleness); write nothing."""
    updated = staleness.clone()
    indices, positions = select_tokens_(scores, updated, max_fresh, **options)  # type: ignore[arg-type]
    return indices, positions, updated


def select_cycle(
    scores: Tensor, staleness: Tensor, num_fresh: Tensor, max_fresh: int, **options: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Like ``select_cycle_``, but return (indices, positions, new staleness); write nothing."""
    updated = staleness.clone()
    indices, positions = select_cycle_(scores, updated, num_fresh, max_fresh, **options)  # type: ignore[arg-type]
    return indices, positions, updated


def invert_indices(indices: Tensor, num_tokens: int, *, backend: str = "auto") -> Tensor:
    """The slot of every token: ``positions[b, indices[b, s]] = s``, and -1 where not selected.

    Args:
        indices: (B, S) int32, unique per sample; values outside [0, N) are empty slots.
        num_tokens: N, at least S.
        backend: see ``select_tokens_``.

    Returns:
        (B, N) int32, contiguous.

    Raises:
        ValueError, TypeError, BackendUnavailableError: see ``select_tokens_``.
    """
    expect("invert_indices", "indices", indices, (None, None), "(B, S)", dtypes=(torch.int32,))
    if indices.shape[1] > num_tokens:
        fail("invert_indices", "num_tokens", f"be at least S = {indices.shape[1]}", num_tokens)
    if backend == "reference":
        return without_autocast(reference.invert_indices)(indices, num_tokens)
    positions: Tensor = _invert_indices(indices, num_tokens, backend)
    return positions


def _select(
    scores: Tensor,
    staleness: Tensor,
    num_fresh: Tensor | None,
    max_fresh: int,
    staleness_weight: float,
    normalize: bool,
    grid: Grid | None,
    tile: int,
    bonus: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Hand over in the backends' shape (L, B, N)."""
    if not torch.compiler.is_compiling():
        expect_no_transform("select_tokens_", scores, staleness)
    if scores.dim() == 2:
        # views, so that the caller's staleness is written
        scores, staleness = scores[None], staleness[None]
    indices, positions = _select_tokens_(
        scores.detach(), staleness, num_fresh, max_fresh, staleness_weight, normalize,
        None if grid is None else list(grid), tile, bonus, backend,
    )  # fmt: skip
    return indices, positions


def _check_select(
    op: str,
    scores: Tensor,
    staleness: Tensor,
    num_fresh: Tensor | None,
    max_fresh: int,
    grid: Grid | None,
    tile: int,
) -> None:
    if not isinstance(scores, Tensor) or scores.dim() not in (2, 3):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        fail(op, "scores", "have shape (B, N) or (L, B, N)", got)
    letters = "(B, N)" if scores.dim() == 2 else "(L, B, N)"
    expect(op, "scores", scores, scores.shape, letters, dtypes=FLOATS[:3])
    expect(op, "staleness", staleness, scores.shape, letters, like=scores, dtypes=(torch.int32,))
    if not staleness.is_contiguous():
        fail(op, "staleness", "be contiguous", f"strides {staleness.stride()}")
    N = scores.shape[-1]
    if not 0 <= max_fresh <= N:
        fail(op, "max_fresh", f"be in [0, N = {N}]", max_fresh)
    if grid is not None and grid[0] * grid[1] != N:
        fail(op, "grid", f"multiply to N = {N}", tuple(grid))
    if tile < 1:
        fail(op, "tile", "be at least 1", tile)
