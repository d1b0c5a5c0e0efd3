"""Scores of tokens: attention received, attention entropy, norms, change."""

import torch
from torch import Tensor

from ..backends import reference
from ._checks import expect, expect_no_grad, fail
from ._library import define, run, without_autocast

METRICS = ("cosine", "relative_l1")


def _run_attention_received(
    query: Tensor, key: Tensor, lse: Tensor | None, softmax_scale: float, backend: str
) -> Tensor:
    out: Tensor = run("attention_received", query, backend)(query, key, lse, softmax_scale)
    return out


def _run_attention_entropy(
    query: Tensor, key: Tensor, key_lengths: Tensor | None, softmax_scale: float, backend: str
) -> Tensor:
    out: Tensor = run("attention_entropy", query, backend)(query, key, key_lengths, softmax_scale)
    return out


def _run_head_norms(x: Tensor, backend: str) -> Tensor:
    out: Tensor = run("head_norms", x, backend)(x)
    return out


def _run_token_change(new: Tensor, old: Tensor, metric: str, backend: str) -> Tensor:
    out: Tensor = run("token_change", new, backend)(new, old, metric)
    return out


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of a statistic of ``x``."""
    return torch.promote_types(x.dtype, torch.float32)


def _new_empty(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=_wide(x))


_attention_received = define(
    "attention_received(Tensor query, Tensor key, Tensor? lse, float softmax_scale, str backend)"
    " -> Tensor",
    _run_attention_received,
    lambda query, key, *_: _new_empty(query, query.shape[0], query.shape[2], key.shape[1]),
)
_attention_entropy = define(
    "attention_entropy(Tensor query, Tensor key, Tensor? key_lengths, float softmax_scale,"
    " str backend) -> Tensor",
    _run_attention_entropy,
    lambda query, *_: _new_empty(query, *query.shape[:2]),
)
_head_norms = define(
    "head_norms(Tensor x, str backend) -> Tensor",
    _run_head_norms,
    lambda x, *_: _new_empty(x, *x.shape[:2]),
)
_token_change = define(
    "token_change(Tensor new, Tensor old, str metric, str backend) -> Tensor",
    _run_token_change,
    lambda new, *_: _new_empty(new, *new.shape[:2]),
)


def attention_received(
    query: Tensor,
    key: Tensor,
    *,
    lse: Tensor | None = None,
    softmax_scale: float | None = None,
    query_stride: int = 1,
    backend: str = "auto",
) -> Tensor:
    """The attention that each key receives, averaged over the queries.

    ``out[b, h, n] = mean_s softmax(query[b, s, h] @ key[b, :, h].T * softmax_scale)[n]``. The map
    is never held whole: scratch grows with the number of tokens, not with its square.

    Args:
        query: (B, S, H, E), any float dtype; stride 1 along E.
        key: (B, N, H, E), dtype and device of ``query``.
        lse: (B, H, S) float32 (float64 for float64 inputs), the log-sum-exp that the attention
            forward returned over these keys and with this scale, or None to compute it.
        softmax_scale: the factor before the softmax; None: 1 / sqrt(E).
        query_stride: the mean is over query 0 and every ``query_stride``-th after it, at that
            fraction of the work. The relative error is about ``c * sqrt((query_stride - 1) / S)``,
            ``c`` the standard deviation of a key's weights over the queries, in units of their mean
            (docs/adr/0018 has measurements). Where tokens lie on a grid, take a stride that shares
            no factor with its width, or whole columns of queries are left out.
        backend: ``"auto"``, ``"triton"``, ``"native"`` or ``"reference"``.

    Returns:
        (B, H, N), float32 (float64 for float64 inputs); sums to 1 over N, and is zero where S = 0.
        Take the mean over H for the head-averaged score.

    Raises:
        ValueError: a shape, stride, device or backend name does not fit.
        TypeError: a dtype does not fit.
        RuntimeError: an input requires grad and ``backend`` is not ``"reference"``.
        BackendUnavailableError: the backend named cannot run here.

    Source:
        s1 of ToCa (arXiv:2410.05317, section 3), up to a constant factor.
    """
    softmax_scale = _check_queries("attention_received", query, key, softmax_scale)
    if query_stride < 1:
        fail("attention_received", "query_stride", "be at least 1", query_stride)
    B, S, H, _ = query.shape
    if lse is not None:
        expect(
            "attention_received", "lse", lse, (B, H, S), "(B, H, S)",
            like=query, dtypes=(_wide(query),),
        )  # fmt: skip
        lse = lse[..., ::query_stride]
    query = query[:, ::query_stride]
    if backend == "reference":
        return without_autocast(reference.attention_received)(query, key, lse, softmax_scale)
    expect_no_grad("attention_received", query, key, lse)
    out: Tensor = _attention_received(query, key, lse, softmax_scale, backend)
    return out


def attention_entropy(
    query: Tensor,
    key: Tensor,
    *,
    key_lengths: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The entropy of each query's row of the head-averaged attention map, in nats.

    ``out[b, s] = -sum_n p log p`` with ``p = mean_h softmax(query[b, s, h] @ key[b, :, h].T *
    softmax_scale)``.

    Args:
        query: (B, S, H, E), any float dtype; stride 1 along E.
        key: (B, N, H, E), dtype and device of ``query``; the text tokens of a cross-attention.
        key_lengths: (B,) int32, how many keys each sample has, or None: all. Clipped to [0, N].
        softmax_scale: see ``attention_received``.
        backend: see ``attention_received``.

    Returns:
        (B, S), float32 (float64 for float64 inputs), in [0, log N]; 0 where a sample has no key.

    Raises:
        ValueError, TypeError, RuntimeError, BackendUnavailableError: see ``attention_received``.

    Source:
        s2 of ToCa (arXiv:2410.05317, section 3).
    """
    softmax_scale = _check_queries("attention_entropy", query, key, softmax_scale)
    if key_lengths is not None:
        expect(
            "attention_entropy", "key_lengths", key_lengths, (query.shape[0],), "(B,)",
            like=query, dtypes=(torch.int32,),
        )  # fmt: skip
    if backend == "reference":
        return without_autocast(reference.attention_entropy)(query, key, key_lengths, softmax_scale)
    expect_no_grad("attention_entropy", query, key)
    out: Tensor = _attention_entropy(query, key, key_lengths, softmax_scale, backend)
    return out


def head_norms(x: Tensor, *, backend: str = "auto") -> Tensor:
    """The mean over heads of the L2 norm of each token's head vectors, of values or keys.

    Args:
        x: (B, N, H, E), any float dtype; stride 1 along E.
        backend: see ``attention_received``.

    Returns:
        (B, N), float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, RuntimeError, BackendUnavailableError: see ``attention_received``.

    Source:
        The value-norm score of DuCa (arXiv:2412.18911) and ToCa's attention-free variants.
    """
    _expect_heads("head_norms", "x", x, "(B, N, H, E)")
    if backend == "reference":
        return without_autocast(reference.head_norms)(x)
    expect_no_grad("head_norms", x)
    out: Tensor = _head_norms(x, backend)
    return out


def token_change(
    new: Tensor, old: Tensor, *, metric: str = "cosine", backend: str = "auto"
) -> Tensor:
    """Measure the movement of each token since the last step.

    ``cosine``: ``1 - cos(new, old)``, and 1 where either is zero; ``relative_l1``:
    ``|new - old|_1 / max(|old|_1, 1e-12)``.

    Args:
        new: (B, N, D), any float dtype; stride 1 along D.
        old: (B, N, D), dtype and device of ``new``.
        metric: ``"cosine"`` or ``"relative_l1"``.
        backend: see ``attention_received``.

    Returns:
        (B, N), float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, RuntimeError, BackendUnavailableError: see ``attention_received``.

    Source:
        The similarity score of ToCa's code (arXiv:2410.05317).
    """
    expect("token_change", "new", new, (None, None, None), "(B, N, D)")
    expect("token_change", "old", old, new.shape, "(B, N, D)", like=new)
    if metric not in METRICS:
        fail("token_change", "metric", f"be one of {', '.join(METRICS)}", repr(metric))
    if backend == "reference":
        return without_autocast(reference.token_change)(new, old, metric)
    expect_no_grad("token_change", new, old)
    out: Tensor = _token_change(new, old, metric, backend)
    return out


def _check_queries(op: str, query: Tensor, key: Tensor, softmax_scale: float | None) -> float:
    """Check query and key; return the scale."""
    _expect_heads(op, "query", query, "(B, S, H, E)")
    B, _, H, E = query.shape
    expect(op, "key", key, (B, None, H, E), "(B, N, H, E)", like=query)
    return E**-0.5 if softmax_scale is None else softmax_scale


def _expect_heads(op: str, name: str, x: Tensor, letters: str) -> None:
    """Check (B, N, H, E) features of heads that are there."""
    expect(op, name, x, (None, None, None, None), letters)
    if 0 in x.shape[2:]:
        fail(op, name, "have at least one head of at least one channel", tuple(x.shape))
