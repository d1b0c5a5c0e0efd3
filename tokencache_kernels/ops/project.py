"""The projection of packed rows to query, key and value, which refreshes cached keys and values."""

from torch import Tensor

from ..backends import reference
from ._checks import expect, expect_indices, expect_no_grad, fail
from ._library import define, run


def _run_project_qkv_(
    key_cache: Tensor,
    value_cache: Tensor,
    x: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    cosine: Tensor | None,
    sine: Tensor | None,
    backend: str,
) -> Tensor:
    rotary = None if cosine is None or sine is None else (cosine, sine)
    query: Tensor = run("project_qkv_", key_cache, backend)(
        key_cache, value_cache, x, indices, weight, bias, query_norm, key_norm, eps, rotary
    )
    return query


_project_qkv_ = define(
    "project_qkv_(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor x, Tensor indices,"
    " Tensor weight, Tensor? bias, Tensor? query_norm, Tensor? key_norm, float eps, Tensor? cosine,"
    " Tensor? sine, str backend) -> Tensor",
    _run_project_qkv_,
    lambda key_cache, value_cache, x, *_: x.new_empty(*x.shape[:2], *key_cache.shape[2:]),
)


def project_qkv_(
    key_cache: Tensor,
    value_cache: Tensor,
    x: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 1e-6,
    rotary: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Project packed rows to query, key and value, and store key and value rows in their caches.

    ``query, key, value = split(x @ weight.T + bias)``; query and key are RMS-normalised per head
    and rotated by the position of their own token where the model does so; then
    ``key_cache[b, indices[b, s]] = key[b, s]``, and likewise the value.

    Args:
        key_cache: (B, N, H, E), written in place; any float dtype; contiguous in H and E.
        value_cache: (B, N, H, E), likewise, not overlapping ``key_cache``.
        x: (B, S, K) packed rows, dtype and device of ``key_cache``.
        indices: (B, S) int32, unique per sample; see ``gather_rows``.
        weight: (3 * H * E, K), likewise; rows ordered query, key, value.
        bias: (3 * H * E,), likewise, or None.
        query_norm: (E,), the weight of the query's RMS norm, or None.
        key_norm: (E,), the weight of the key's RMS norm, or None.
        eps: of the RMS norms.
        rotary: cosine and sine, each (N, E), pairs interleaved, or None.
        backend: see ``attention``.

    Returns:
        The packed query (B, S, H, E), contiguous.

    Raises:
        ValueError, TypeError, RuntimeError, BackendUnavailableError: see ``attention``.

    Source:
        The scattered K/V projection of RAS (arXiv:2502.10389), with per-sample indices and QK-norm.
    """
    op = "project_qkv_"
    expect(op, "key_cache", key_cache, (None, None, None, None), "(B, N, H, E)")
    _, N, H, E = key_cache.shape
    expect(op, "value_cache", value_cache, key_cache.shape, "(B, N, H, E)", like=key_cache)
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if H > 1 and cache.stride(2) != E:
            fail(op, name, "be contiguous in its heads", f"strides {cache.stride()}")
    expect_indices(op, indices, key_cache)
    expect(op, "x", x, (*indices.shape, None), "(B, S, K)", like=key_cache)
    expect(op, "weight", weight, (3 * H * E, x.shape[2]), "(3HE, K)", like=key_cache)
    if bias is not None:
        expect(op, "bias", bias, (3 * H * E,), "(3HE,)", like=key_cache)
    for name, norm in (("query_norm", query_norm), ("key_norm", key_norm)):
        if norm is not None:
            expect(op, name, norm, (E,), "(E,)", like=key_cache)
    cosine, sine = (None, None) if rotary is None else rotary
    for name, table in (("rotary cosine", cosine), ("rotary sine", sine)):
        if table is not None:
            expect(op, name, table, (N, E), "(N, E)", like=key_cache)
    if backend == "reference":
        return reference.project_qkv_(
            key_cache, value_cache, x, indices, weight, bias, query_norm, key_norm, eps, rotary
        )
    expect_no_grad(op, key_cache, value_cache, x, weight, bias, query_norm, key_norm, cosine, sine)
    query: Tensor = _project_qkv_(
        key_cache, value_cache, x, indices, weight, bias, query_norm, key_norm, eps, cosine, sine,
        backend,
    )  # fmt: skip
    return query


def project_qkv(
    key_cache: Tensor, value_cache: Tensor, x: Tensor, indices: Tensor, weight: Tensor,
    bias: Tensor | None = None, **options: object,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Like ``project_qkv_``, but return (query, new keys, new values); the caches keep theirs."""
    keys, values = key_cache.clone(), value_cache.clone()
    query = project_qkv_(keys, values, x, indices, weight, bias, **options)  # type: ignore[arg-type]
    return query, keys, values
