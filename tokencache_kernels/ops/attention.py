"""Attention of fresh queries over all keys, and the projection that refreshes keys and values."""

import torch
from torch import Tensor

from ..backends import reference
from ._checks import expect, expect_indices, expect_no_grad, fail
from ._library import define, run


def _run_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    launch = run("attention", query, backend)
    result: tuple[Tensor, Tensor] = launch(query, key, value, key_lengths, softmax_scale)
    return result


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


def _fake_attention(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    B, S, H, _E = query.shape
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(B, H, S)


_attention = define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? key_lengths, float softmax_scale,"
    " str backend) -> (Tensor, Tensor)",
    _run_attention,
    _fake_attention,
)
_project_qkv_ = define(
    "project_qkv_(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor x, Tensor indices,"
    " Tensor weight, Tensor? bias, Tensor? query_norm, Tensor? key_norm, float eps, Tensor? cosine,"
    " Tensor? sine, str backend) -> Tensor",
    _run_project_qkv_,
    lambda key_cache, value_cache, x, *_: x.new_empty(*x.shape[:2], *key_cache.shape[2:]),
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend from packed fresh queries to all keys; also return the log-sum-exp of the scores.

    ``out[b, s, h] = softmax(query[b, s, h] @ key[b, :, h].T * softmax_scale) @ value[b, :, h]``.

    Args:
        query: (B, S, H, E), any float dtype; stride 1 along E.
        key: (B, N, H, E), dtype and device of ``query``.
        value: (B, N, H, E), likewise.
        key_lengths: (B,) int32, how many keys each sample has (text of different lengths), or None.
        softmax_scale: the factor before the softmax; None: 1 / sqrt(E).
        backend: ``"auto"``, ``"triton"``, ``"native"`` or ``"reference"``.

    Returns:
        out: (B, S, H, E), contiguous; zeros where a sample has no key.
        lse: (B, H, S), the log-sum-exp over the keys, in nats; -inf where a sample has no key.

    Raises:
        ValueError: a shape, stride, device or backend name does not fit.
        TypeError: a dtype does not fit.
        RuntimeError: an input requires grad and ``backend`` is not ``"reference"``.
        BackendUnavailableError: the backend named cannot run here.

    Source:
        The KV-ALL and KV-CACHE variants of partial attention: RAS (arXiv:2502.10389), TokenCache
        (arXiv:2409.18523).
    """
    expect("attention", "query", query, (None, None, None, None), "(B, S, H, E)")
    B, _, H, E = query.shape
    expect("attention", "key", key, (B, None, H, E), "(B, N, H, E)", like=query)
    expect("attention", "value", value, key.shape, "(B, N, H, E)", like=query)
    if key_lengths is not None:
        expect(
            "attention", "key_lengths", key_lengths, (B,), "(B,)", like=query, dtypes=(torch.int32,)
        )
    if softmax_scale is None:
        softmax_scale = E**-0.5
    if backend == "reference":
        return reference.attention(query, key, value, key_lengths, softmax_scale)
    expect_no_grad("attention", query, key, value)
    out, lse = _attention(query, key, value, key_lengths, softmax_scale, backend)
    return out, lse


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
