"""Attention of fresh queries over all keys."""

import torch
from torch import Tensor

from ..backends import library, reference
from ._checks import expect, expect_no_grad, fail
from ._library import define, run, without_autocast


def _run_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    launch = run("attention", query, backend, library.preference(query, key, value, key_lengths))
    result: tuple[Tensor, Tensor] = launch(query, key, value, key_lengths, softmax_scale)
    return result


def _run_attention_with_entropy(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    softmax_scale: float,
    head_mean: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    preference = library.preference(query, key, value, key_lengths)
    launch = run("attention_with_entropy", query, backend, preference)
    result: tuple[Tensor, Tensor, Tensor] = launch(
        query, key, value, key_lengths, softmax_scale, head_mean
    )
    return result


def _fake_attention(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    B, S, H, _E = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    return out, query.new_empty(B, H, S, dtype=torch.promote_types(query.dtype, torch.float32))


def _fake_attention_with_entropy(query: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = _fake_attention(query)
    head_mean = others[-2]
    return out, lse, lse.new_empty(query.shape[:2]) if head_mean else torch.empty_like(lse)


_attention = define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? key_lengths, float softmax_scale,"
    " str backend) -> (Tensor, Tensor)",
    _run_attention,
    _fake_attention,
)
_attention_with_entropy = define(
    "attention_with_entropy(Tensor query, Tensor key, Tensor value, Tensor? key_lengths,"
    " float softmax_scale, bool head_mean, str backend) -> (Tensor, Tensor, Tensor)",
    _run_attention_with_entropy,
    _fake_attention_with_entropy,
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
        value: (B, N, H, E), dtype and device of ``query``.
        key_lengths: (B,) int32, how many keys each sample has (text of different lengths), each in
            [0, N]; or None: all.
        softmax_scale: the factor before the softmax; None: 1 / sqrt(E).
        backend: ``"auto"``, ``"triton"``, ``"native"``, ``"reference"`` or ``"library"``, the best
            attention of another library. Auto takes the first that can run from a table by device,
            dtype and head dim; ``tokencache info`` says which.

    Returns:
        out: (B, S, H, E), contiguous; zeros where a sample has no key.
        lse: (B, H, S), the log-sum-exp over the keys, in nats, in float32 (float64 for float64
            inputs); -inf where a sample has no key.

    Raises:
        ValueError: a shape, stride, device or backend name does not fit.
        TypeError: a dtype does not fit.
        RuntimeError: an input requires grad and ``backend`` is not ``"reference"``.
        BackendUnavailableError: the backend named cannot run here.

    Source:
        The KV-ALL and KV-CACHE variants of partial attention: RAS (arXiv:2502.10389), TokenCache
        (arXiv:2409.18523).
    """
    softmax_scale = _check_attention("attention", query, key, value, key_lengths, softmax_scale)
    if backend == "reference":
        return without_autocast(reference.attention)(query, key, value, key_lengths, softmax_scale)
    expect_no_grad("attention", query, key, value)
    out, lse = _attention(query, key, value, key_lengths, softmax_scale, backend)
    return out, lse


def attention_with_entropy(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None = None,
    softmax_scale: float | None = None,
    head_mean: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``attention``, and the entropy of each query's row of the attention map, in one pass.

    ``entropy[b, h, s] = -sum_n p log p`` with ``p = softmax(query[b, s, h] @ key[b, :, h].T *
    softmax_scale)``; with ``head_mean``, ``entropy[b, s]`` of ``mean_h p``.

    Args:
        query: see ``attention``.
        key: see ``attention``.
        value: see ``attention``.
        key_lengths: see ``attention``.
        softmax_scale: see ``attention``.
        head_mean: the entropy of the head-averaged map instead of each head's. It multiplies
            queries by keys twice, for one block of queries and all heads at a time: for the few
            keys of a text. Where keys are many, ``attention_entropy`` spreads over the device.
        backend: ``"auto"``, ``"triton"``, ``"native"`` or ``"reference"``: no library hands out the
            entropy.

    Returns:
        out, lse: as ``attention`` does.
        entropy: (B, H, S), with ``head_mean`` (B, S), in nats, dtype of ``lse``; 0 where a sample
            has no key.

    Raises:
        ValueError, TypeError, RuntimeError, BackendUnavailableError: see ``attention``.

    Source:
        s2 of ToCa (arXiv:2410.05317, section 3) is the entropy of the head-averaged map.
    """
    op = "attention_with_entropy"
    softmax_scale = _check_attention(op, query, key, value, key_lengths, softmax_scale)
    if backend == "reference":
        return without_autocast(reference.attention_with_entropy)(
            query, key, value, key_lengths, softmax_scale, head_mean
        )
    expect_no_grad(op, query, key, value)
    out, lse, entropy = _attention_with_entropy(
        query, key, value, key_lengths, softmax_scale, head_mean, backend
    )
    return out, lse, entropy


def _check_attention(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    softmax_scale: float | None,
) -> float:
    """Check the tensors; return the scale."""
    expect(op, "query", query, (None, None, None, None), "(B, S, H, E)")
    B, _, H, E = query.shape
    if E == 0:
        fail(op, "query", "have at least one channel a head", 0)
    expect(op, "key", key, (B, None, H, E), "(B, N, H, E)", like=query)
    expect(op, "value", value, key.shape, "(B, N, H, E)", like=query)
    if key_lengths is not None:
        expect(op, "key_lengths", key_lengths, (B,), "(B,)", like=query, dtypes=(torch.int32,))
    return E**-0.5 if softmax_scale is None else softmax_scale
