"""Scores of tokens, in float32 at least, whatever the dtype of the inputs.

An attention map is made for some queries and heads at a time, so that scratch grows with the number
of tokens and not with its square.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# of one sample's map at a time: 1 MiB, which stays in a CPU's cache, but at least so many queries
# of a head that its keys are worth reading
_BLOCK_ELEMENTS = 1 << 18
_MIN_BLOCK_QUERIES = 32
# of a row whose cosine is taken after it was multiplied
_TINY_SQUARES = 1e-12


def attention_received(
    query: Tensor, key: Tensor, lse: Tensor | None, softmax_scale: float
) -> Tensor:
    """The attention each key receives, averaged over the queries: (B, H, N), sums to 1.

    query (B, S, H, E), key (B, N, H, E), lse (B, H, S) or None. Zeros where there is no query.
    """
    B, S, H, _ = query.shape
    out = query.new_zeros(B, H, key.shape[1], dtype=_wide(query))
    for sample in range(B):
        for queries in _query_blocks(S, key.shape[1]):
            blocks = _logit_blocks(query[sample, queries], key[sample], softmax_scale)
            for heads, logits in blocks:
                if lse is None:
                    weights = logits.softmax(dim=-1)
                else:
                    weights = torch.exp(logits - lse[sample, heads, queries, None])
                out[sample, heads] += weights.sum(dim=1)
    return out / max(S, 1)


def attention_entropy(
    query: Tensor, key: Tensor, key_lengths: Tensor | None, softmax_scale: float
) -> Tensor:
    """The entropy, in nats, of each query's row of the head-averaged attention map: (B, S).

    query (B, S, H, E), key (B, N, H, E), key_lengths (B,) int32 or None. Zeros where there is no
    key.
    """
    B, S, H, _ = query.shape
    out = query.new_zeros(B, S, dtype=_wide(query))
    is_beyond = torch.zeros(B, key.shape[1], dtype=torch.bool, device=key.device)
    if key_lengths is not None:
        is_beyond = torch.arange(key.shape[1], device=key.device) >= key_lengths[:, None]
    for sample in range(B):
        for queries in _query_blocks(S, key.shape[1]):
            blocks = _logit_blocks(query[sample, queries], key[sample], softmax_scale)
            weights = out.new_zeros(())
            for _, logits in blocks:
                logits = logits.masked_fill(is_beyond[sample], -torch.inf)
                weights = weights + logits.softmax(dim=-1).sum(dim=0)
            # also where no key is left, whose softmax is NaN
            weights = (weights / H).masked_fill(is_beyond[sample], 0)
            out[sample, queries] = torch.special.entr(weights).sum(dim=-1)
    return out


def head_norms(x: Tensor) -> Tensor:
    """The mean over heads of the L2 norm of each token's head vectors: (B, N, H, E) -> (B, N)."""
    x = x.to(_wide(x))
    factor = _factor_of(x, 0.0)
    return (torch.linalg.vector_norm(x * factor, dim=-1) / factor[..., 0]).mean(dim=-1)


def token_change(new: Tensor, old: Tensor, metric: str) -> Tensor:
    """Measure the movement of each token: ``1 - cos(new, old)``, or ``|new - old|_1 / |old|_1``."""
    new, old = new.to(_wide(new)), old.to(_wide(old))
    if metric == "cosine":
        factors = (_factor_of(x, _TINY_SQUARES) for x in (new, old))
        new, old = (x * factor for x, factor in zip((new, old), factors, strict=True))
        return 1 - F.cosine_similarity(new, old, dim=-1)
    return (new - old).abs().sum(-1) / old.abs().sum(-1).clamp_min(1e-12)


def _factor_of(x: Tensor, tiny_squares: float) -> Tensor:
    """A power of two for each row, (..., 1): by it squares neither overflow nor vanish."""
    shrink = 2.0**-80 if x.dtype == torch.float32 else 2.0**-520
    squares = x.detach().square().sum(dim=-1, keepdim=True)
    factor = torch.ones_like(squares).masked_fill(squares < tiny_squares, 1 / shrink)
    return factor.masked_fill(squares.isinf(), shrink)


def _query_blocks(num_queries: int, num_keys: int) -> Iterator[slice]:
    block = max(_BLOCK_ELEMENTS // max(num_keys, 1), _MIN_BLOCK_QUERIES)
    for start in range(0, num_queries, block):
        yield slice(start, min(start + block, num_queries))


def _logit_blocks(
    query: Tensor, key: Tensor, softmax_scale: float
) -> Iterator[tuple[slice, Tensor]]:
    """Some heads at a time, and their scaled scores (heads, queries, keys) in one sample."""
    S, H, _ = query.shape
    block = max(_BLOCK_ELEMENTS // max(S * key.shape[0], 1), 1)
    for start in range(0, H, block):
        heads = slice(start, min(start + block, H))
        rows = query[:, heads].to(_wide(query)).transpose(0, 1)
        yield heads, rows @ key[:, heads].to(_wide(key)).permute(1, 2, 0) * softmax_scale


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
