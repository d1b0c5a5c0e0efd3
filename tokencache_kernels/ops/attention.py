"""Attention of fresh queries over all keys."""

import torch
from torch import Tensor

from ..backends import reference
from ._checks import expect, expect_no_grad
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


def _fake_attention(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    B, S, H, _E = query.shape
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(B, H, S)


_attention = define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? key_lengths, float softmax_scale,"
    " str backend) -> (Tensor, Tensor)",
    _run_attention,
    _fake_attention,
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
