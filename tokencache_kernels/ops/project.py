"""The projection of rows to queries, keys and values, which refreshes cached keys and values."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import reference
from ..backends.reference import QkNorm
from ._checks import expect, expect_indices, expect_no_grad, expect_writable, fail, is_plain
from ._library import define, run, without_autocast

NORMS = ("rms", "layer")


def _run_project_qkv_(
    key_cache: Tensor,
    value_cache: Tensor,
    x: Tensor,
    indices: Tensor | None,
    weight: list[Tensor],
    bias: list[Tensor],
    norm: list[Tensor],
    norm_kind: str,
    eps: float,
    rotary: list[Tensor],
    all_keys: bool,
    backend: str,
) -> Tensor:
    H, E = key_cache.shape[2:]
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if H > 1 and cache.stride(2) != E:
            fail("project_qkv_", name, "be contiguous in its heads", f"strides {cache.stride()}")
    # of these all are read by the strides of one
    weight, rotary = _with_same_strides(weight), _with_same_strides(rotary)
    query_bias, key_bias = norm[2:] or (None, None)
    query: Tensor = run("project_qkv_", key_cache, backend)(
        key_cache,
        value_cache,
        x,
        indices,
        weight,
        bias or None,
        QkNorm(norm[0], norm[1], query_bias, key_bias, norm_kind, eps) if norm else None,
        (rotary[0], rotary[1]) if rotary else None,
        all_keys,
    )
    return query


def _with_same_strides(tensors: list[Tensor]) -> list[Tensor]:
    if len({tensor.stride() for tensor in tensors}) <= 1:
        return tensors
    return [tensor.contiguous() for tensor in tensors]


# an absent group is an empty list
_project_qkv_ = define(
    "project_qkv_(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor x, Tensor? indices,"
    " Tensor[] weight, Tensor[] bias, Tensor[] norm, str norm_kind, float eps, Tensor[] rotary,"
    " bool all_keys, str backend) -> Tensor",
    _run_project_qkv_,
    lambda key_cache, value_cache, x, indices, *_: x.new_empty(
        *(x if indices is None else indices).shape[:2], *key_cache.shape[2:]
    ),
)


def project_qkv_(
    key_cache: Tensor,
    value_cache: Tensor,
    x: Tensor,
    indices: Tensor | None,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor] | None = None,
    *,
    norm: QkNorm | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    all_keys: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Project rows to query, key and value, and store key and value rows in their caches.

    ``query, key, value = split(x @ weight.T + bias)``. Query and key are normalised per head and
    rotated by the position of their own token, if the model does so. Then ``key_cache[b, indices[b,
    s]] = key[b, s]``, and the value in the same way. Other rows of the caches keep their values,
    and an empty slot writes nothing into them.

    Args:
        key_cache: (B, N, H, E), written in place, not expanded; any float dtype; contiguous in H
            and E. An input that shares memory with a cache is copied first.
        value_cache: (B, N, H, E), as ``key_cache``, not overlapping ``key_cache``.
        x: (B, S, K), the packed rows of the tokens at ``indices``; (B, N, K), every token's row,
            with ``all_keys`` or without ``indices``; dtype and device of ``key_cache``.
        indices: (B, S) int32, unique per sample, see ``gather_rows``; None: every token.
        weight: (3 * H * E, K), dtype of ``x``, in the order query, key, value; or these apart,
            (H * E, K) each, whose rows lie equally far from each other.
        bias: (3 * H * E,), or three of (H * E,); None: no bias.
        norm: the norm of each head, weights and biases (E,) of the same dtype, or None.
        rotary: cosine and sine, with the same strides, or None; (T, E), or (B, T, E) where samples
            differ, for positions 0 to T - 1, T >= N; dtype of ``key_cache`` or float32. Channels
            2i and 2i + 1 are a pair, whose angle stands in both columns.
        all_keys: refresh the keys and values of all tokens; the query is still that of ``indices``,
            and of an empty slot that of a row of zeros.
        backend: see ``attention``.

    Returns:
        The packed query (B, S, H, E), contiguous; finite in an empty slot.

    Raises:
        ValueError, TypeError, RuntimeError, BackendUnavailableError: see ``attention``.

    Source:
        The scattered K/V projection of RAS (arXiv:2502.10389), with per-sample indices and QK-norm.
    """
    op = "project_qkv_"
    expect(op, "key_cache", key_cache, (None, None, None, None), "(B, N, H, E)")
    B, N, H, E = key_cache.shape
    expect(op, "value_cache", value_cache, key_cache.shape, "(B, N, H, E)", like=key_cache)
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if H > 1 and cache.stride(2) != E:
            fail(op, name, "be contiguous in its heads", f"strides {cache.stride()}")
        expect_writable(op, name, cache)
    if indices is not None:
        expect_indices(op, indices, key_cache)
    if indices is None or all_keys:
        expect(op, "x", x, (B, N, None), "(B, N, K)", like=key_cache)
    else:
        expect(op, "x", x, (*indices.shape, None), "(B, S, K)", like=key_cache)
    if x.shape[2] == 0:
        fail(op, "x", "have at least one channel", 0)
    weights = _split(op, "weight", weight, (H * E, x.shape[2]), "(HE, K)", key_cache)
    if len({part.stride(0) for part in weights}) > 1:
        strides = [part.stride(0) for part in weights]
        fail(op, "weight", "have the same row stride in all three", strides)
    biases = [] if bias is None else _split(op, "bias", bias, (H * E,), "(HE,)", key_cache)
    norms = [] if norm is None else _check_norm(op, norm, E, key_cache)
    if rotary is not None:
        _check_rotary(op, *rotary, key_cache)
    tensors = (key_cache, value_cache, x, *weights, *biases, *norms, *(rotary or ()))
    if backend == "reference" or not is_plain(*weights):
        return without_autocast(reference.project_qkv_)(
            key_cache, value_cache, x, indices, weights, biases or None, norm, rotary, all_keys
        )
    expect_no_grad(op, *tensors)
    kind, eps = ("rms", 0.0) if norm is None else (norm.kind, norm.eps)
    query: Tensor = _project_qkv_(
        key_cache, value_cache, x, indices, weights, biases, norms, kind, eps, list(rotary or ()),
        all_keys, backend,
    )  # fmt: skip
    return query


def project_qkv(
    key_cache: Tensor, value_cache: Tensor, x: Tensor, indices: Tensor | None,
    weight: Tensor | Sequence[Tensor], bias: Tensor | Sequence[Tensor] | None = None,
    **options: object,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Like ``project_qkv_``, but return (query, new keys, new values); the caches keep theirs."""
    keys, values = key_cache.clone(), value_cache.clone()
    query = project_qkv_(keys, values, x, indices, weight, bias, **options)  # type: ignore[arg-type]
    return query, keys, values


def _split(
    op: str,
    name: str,
    parts: Tensor | Sequence[Tensor],
    shape: tuple[int, ...],
    letters: str,
    like: Tensor,
) -> list[Tensor]:
    """Return query's, key's and value's part as views of the joint tensor."""
    if isinstance(parts, Tensor):
        fused = (3 * shape[0], *shape[1:])
        if not is_plain(parts):
            fail(op, name, "be a plain tensor, or query's, key's and value's", type(parts).__name__)
        expect(op, name, parts, fused, f"(3{letters[1:]}", like=like)
        return list(parts.split(shape[0]))
    if len(parts) != 3:
        fail(op, name, "be one tensor or query's, key's and value's", f"{len(parts)} tensors")
    for part, of in zip(parts, ("query", "key", "value"), strict=True):
        expect(op, f"{of} {name}", part, shape, letters, like=like)
    return list(parts)


def _check_norm(op: str, norm: QkNorm, head_dim: int, like: Tensor) -> list[Tensor]:
    """The norm's tensors: two weights, and two biases where it has them."""
    if norm.kind not in NORMS:
        fail(op, "norm", f"be of a kind among {', '.join(NORMS)}", repr(norm.kind))
    if (norm.query_bias is None) != (norm.key_bias is None):
        fail(op, "norm", "have a bias for both query and key or for neither", "one bias")
    found = {name: part for name, part in norm._asdict().items() if isinstance(part, Tensor)}
    for name, part in found.items():
        expect(op, f"norm's {name}", part, (head_dim,), "(E,)", like=like)
    return list(found.values())


def _check_rotary(op: str, cosine: Tensor, sine: Tensor, key_cache: Tensor) -> None:
    """Tables (T, E) or (B, T, E) that cover every position."""
    B, N, _, E = key_cache.shape
    if E % 2:
        fail(op, "key_cache", "have an even head dim where it is rotated in pairs", E)
    for name, table in (("rotary cosine", cosine), ("rotary sine", sine)):
        shape, letters = ((B, None, E), "(B, T, E)") if table.dim() == 3 else ((None, E), "(T, E)")
        dtypes = tuple({key_cache.dtype: None, torch.float32: None})
        expect(op, name, table, shape, letters, like=key_cache, dtypes=dtypes)
        if table.shape[-2] < N:
            fail(op, name, f"cover the N = {N} positions", f"{table.shape[-2]} rows")
    if sine.shape != cosine.shape or sine.stride() != cosine.stride() or sine.dtype != cosine.dtype:
        fail(
            op, "rotary sine", "have the shape, strides and dtype of the cosine",
            f"{tuple(sine.shape)}, {sine.stride()}, {sine.dtype}",
        )  # fmt: skip
