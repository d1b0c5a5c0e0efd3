"""Attention as a model computes it, seen where PyTorch's attention is called.

A model's processor keeps its queries and keys to itself. During one call of an attention module,
``torch.nn.functional.scaled_dot_product_attention`` is answered here instead, which sees them after
norm and rotary embedding, whatever the processor does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ... import ops
from ...errors import UnsupportedInputError
from .interception import eager

# queries whose weights are held at a time, where a mask keeps the fused statistics away
_CHUNK = 256


@dataclass(frozen=True)
class Attention:
    """The arguments of one attention.

    Attributes:
        query: (B, S, H, E).
        key: (B, N, H, E); heads shared by groups of queries are repeated.
        value: the values of the same call.
        mask: added to the logits (or kept where true), or None.
        scale: the factor of the logits; None: 1 / sqrt(E).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float | None

    def received(self, lse: Tensor | None, backend: str) -> Tensor:
        """The attention that each key receives, averaged over the heads: (B, N) float32."""
        if self.mask is None:
            received = ops.attention_received(
                self.query, self.key, lse=lse, softmax_scale=self.scale, backend=backend
            )
            return received.float().mean(dim=1)
        query, key = (rows.transpose(1, 2).float() for rows in (self.query, self.key))
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        received = query.new_zeros(key.shape[:3])
        for first in range(0, query.shape[2], _CHUNK):
            rows = slice(first, first + _CHUNK)
            logits = query[:, :, rows] @ key.transpose(-1, -2) * scale
            mask = self.mask if self.mask.shape[-2] == 1 else self.mask[..., rows, :]
            if mask.dtype == torch.bool:
                logits = logits.masked_fill(~mask, -torch.inf)
            else:
                logits = logits + mask
            received += logits.softmax(-1).nan_to_num(0).sum(2)
        return received.mean(dim=1)


class _Watch(TorchFunctionMode):
    def __init__(self, answer: Callable[..., Any]) -> None:
        super().__init__()
        self._answer = answer

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            return self._answer(*arguments, **(named or {}))
        return function(*arguments, **(named or {}))


@eager
def watch_attention(
    call: Callable[[], Any],
    look: Callable[[Attention, Tensor | None], None],
    needs_lse: bool,
    backend: str,
) -> Any:
    """Call an attention module, and look at the attention that it computes.

    Args:
        call: calls the module.
        look: is given the attention, and its log-sum-exp (B, H, S) if it has been computed here.
        needs_lse: whether ``ops.attention`` is to compute the output, so that there is a
            log-sum-exp; where there is a mask, PyTorch computes it all the same.
        backend: the backend of the ops.

    Raises:
        UnsupportedInputError: the module does not call PyTorch's attention, or not once.
    """
    seen = 0

    def answer(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        nonlocal seen
        seen += 1
        if is_causal or dropout_p:
            _refuse("a causal attention" if is_causal else "an attention with dropout")
        heads = query.shape[1] // key.shape[1]
        keys, values = (
            rows if heads == 1 else rows.repeat_interleave(heads, dim=1) for rows in (key, value)
        )
        q, k, v = (rows.transpose(1, 2) for rows in (query, keys, values))
        attention = Attention(q, k, v, attn_mask, scale)
        if needs_lse and attn_mask is None:
            out, lse = ops.attention(q, k, v, softmax_scale=scale, backend=backend)
            look(attention, lse)
            return out.transpose(1, 2)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, scale=scale, enable_gqa=enable_gqa
        )
        look(attention, None)
        return out

    with _Watch(answer):
        output = call()
    if seen != 1:
        _refuse(f"{seen} calls of it")
    return output


def _refuse(got: str) -> None:
    raise UnsupportedInputError(
        "token cache: to score tokens by their attention, an attention module must call "
        f"torch.nn.functional.scaled_dot_product_attention once, got {got}"
    )
