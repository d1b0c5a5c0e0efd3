"""What says which tokens matter: attention received, attention entropy, norms, change."""

import torch
from torch import Tensor

from ..backends import reference
from ._checks import expect, expect_no_grad, fail
from ._library import define, run

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


_attention_received = define(
    "attention_received(Tensor query, Tensor key, Tensor? lse, float softmax_scale, str backend)"
    " -> Tensor",
    _run_attention_received,
    lambda query, key, *_: query.new_empty(query.shape[0], query.shape[2], key.shape[1]),
)
_attention_entropy = define(
    "attention_entropy(Tensor query, Tensor key, Tensor? key_lengths, float softmax_scale,"
    " str backend) -> Tensor",
    _run_attention_entropy,
    lambda query, *_: query.new_empty(query.shape[:2]),
)
_head_norms = define(
    "head_norms(Tensor x, str backend) -> Tensor",
    _run_head_norms,
    lambda x, backend: x.new_empty(x.shape[:2]),
)
_token_change = define(
    "token_change(Tensor new, Tensor old, str metric, str backend) -> Tensor",
    _run_token_change,
    lambda new, old, metric, backend: new.new_empty(new.shape[:2]),
)


def attention_received(
    query: Tensor,
    key: Tensor,
    *,
    lse: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The attention that each key receives, averaged over the queries.

    ``out[b, h, n] = mean_s softmax(query[b, s, h] @ key[b, :, h].T * softmax_scale)[n]``.

    Args:
        query: (B, S, H, E), any float dtype; stride 1 along E.
        key: (B, N, H, E), dtype and device of ``query``.
        lse: (B, H, S), the log-sum-exp that the attention forward returned, or None to compute it.
        softmax_scale: the factor before the softmax; None: 1 / sqrt(E).
        backend: ``"auto"``, ``"triton"``, ``"native"`` or ``"reference"``.

    Returns:
        (B, H, N); sums to 1 over N. Take the mean over H for the head-averaged score.

    Raises:
        ValueError: a shape, stride, device or backend name does not fit.
        TypeError: a dtype does not fit.
        RuntimeError: an input requires grad and ``backend`` is not ``"reference"``.
        BackendUnavailableError: the backend named cannot run here.

    Source:
        s1 of ToCa (arXiv:2410.05317, section 3), up to a constant factor.
    """
    softmax_scale = _check_queries("attention_received", query, key, softmax_scale)
    B, S, H, _ = query.shape
    if lse is not None:
        expect("attention_received", "lse", lse, (B, H, S), "(B, H, S)", like=query)
    if backend == "reference":
        return reference.attention_received(query, key, lse, softmax_scale)
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
        key_lengths: (B,) int32, how many keys each sample has, at least 1, or None.
        softmax_scale: see ``attention_received``.
        backend: see ``attention_received``.

    Returns:
        (B, S), in [0, log N].

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
        return reference.attention_entropy(query, key, key_lengths, softmax_scale)
    expect_no_grad("attention_entropy", query, key)
    out: Tensor = _attention_entropy(query, key, key_lengths, softmax_scale, backend)
    return out


def head_norms(x: Tensor, *, backend: str = "auto") -> Tensor:
    """The mean over heads of the L2 norm of each token's head vectors, of values or keys.

    Args:
        x: (B, N, H, E), any float dtype; stride 1 along E.
        backend: see ``attention_received``.

    Returns:
        (B, N).

    Raises:
        ValueError, TypeError, RuntimeError, BackendUnavailableError: see ``attention_received``.

    Source:
        The value-norm score of DuCa (arXiv:2412.18911) and ToCa's attention-free variants.
    """
    expect("head_norms", "x", x, (None, None, None, None), "(B, N, H, E)")
    if backend == "reference":
        return reference.head_norms(x)
    expect_no_grad("head_norms", x)
    out: Tensor = _head_norms(x, backend)
    return out


def token_change(
    new: Tensor, old: Tensor, *, metric: str = "cosine", backend: str = "auto"
) -> Tensor:
    """How far each token has moved since the last step.

    ``cosine``: ``1 - cos(new, old)``; ``relative_l1``: ``|new - old|_1 / |old|_1``.

    Args:
        new: (B, N, D), any float dtype; stride 1 along D.
        old: (B, N, D), dtype and device of ``new``.
        metric: ``"cosine"`` or ``"relative_l1"``.
        backend: see ``attention_received``.

    Returns:
        (B, N).

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
        return reference.token_change(new, old, metric)
    expect_no_grad("token_change", new, old)
    out: Tensor = _token_change(new, old, metric, backend)
    return out


def _check_queries(op: str, query: Tensor, key: Tensor, softmax_scale: float | None) -> float:
    """Check query and key; return the scale."""
    expect(op, "query", query, (None, None, None, None), "(B, S, H, E)")
    B, _, H, E = query.shape
    expect(op, "key", key, (B, None, H, E), "(B, N, H, E)", like=query)
    return E**-0.5 if softmax_scale is None else softmax_scale
