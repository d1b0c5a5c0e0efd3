"""What says which tokens matter, in float32 at least, whatever the inputs are.

An attention map is made for some of the queries at a time, so that scratch grows with the number of
tokens and not with its square.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# of one sample's map at a time: 1 MiB, which stays in a CPU's cache, but at least so many queries
# that the keys are worth reading
_BLOCK_ELEMENTS = 1 << 18
_MIN_BLOCK_QUERIES = 32


def attention_received(
    query: Tensor, key: Tensor, lse: Tensor | None, softmax_scale: float
) -> Tensor:
    """The attention each key receives, averaged over the queries: (B, H, N), sums to 1.

    query (B, S, H, E), key (B, N, H, E), lse (B, H, S) or None. Zeros where there is no query.
    """
    B, S, H, _ = query.shape
    out = query.new_zeros(B, H, key.shape[1], dtype=_wide(query))
    for sample in range(B):
        for queries, logits in _logit_blocks(query[sample], key[sample], softmax_scale):
            if lse is None:
                weights = logits.softmax(dim=-1)
            else:
                weights = torch.exp(logits - lse[sample, :, queries, None])
            out[sample] += weights.sum(dim=1)
    return out / max(S, 1)


def attention_entropy(
    query: Tensor, key: Tensor, key_lengths: Tensor | None, softmax_scale: float
) -> Tensor:
    """The entropy, in nats, of each query's row of the head-averaged attention map: (B, S).

    query (B, S, H, E), key (B, N, H, E), key_lengths (B,) int32 or None. Zeros where there is no
    key.
    """
    B, S, _, _ = query.shape
    out = query.new_zeros(B, S, dtype=_wide(query))
    is_beyond = torch.zeros(B, key.shape[1], dtype=torch.bool, device=key.device)
    if key_lengths is not None:
        is_beyond = torch.arange(key.shape[1], device=key.device) >= key_lengths[:, None]
    for sample in range(B):
        for queries, logits in _logit_blocks(query[sample], key[sample], softmax_scale):
            weights = logits.masked_fill(is_beyond[sample], -torch.inf).softmax(dim=-1).mean(dim=0)
            # also where no key is left, whose softmax is NaN
            weights = weights.masked_fill(is_beyond[sample], 0)
            out[sample, queries] = torch.special.entr(weights).sum(dim=-1)
    return out


def head_norms(x: Tensor) -> Tensor:
    """The mean over heads of the L2 norm of each token's head vectors: (B, N, H, E) -> (B, N)."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=_wide(x)).mean(dim=-1)


def token_change(new: Tensor, old: Tensor, metric: str) -> Tensor:
    """How far each token moved: 1 - cos(new, old), or |new - old|_1 / |old|_1."""
    new, old = new.to(_wide(new)), old.to(_wide(old))
    if metric == "cosine":
        return 1 - F.cosine_similarity(new, old, dim=-1)
    return (new - old).abs().sum(-1) / old.abs().sum(-1).clamp_min(1e-12)


def _logit_blocks(
    query: Tensor, key: Tensor, softmax_scale: float
) -> Iterator[tuple[slice, Tensor]]:
    """The scaled scores (H, some queries, N) of one sample, and which queries they are of."""
    S, H, _ = query.shape
    block = max(_BLOCK_ELEMENTS // max(H * key.shape[0], 1), _MIN_BLOCK_QUERIES)
    columns = key.to(_wide(key)).permute(1, 2, 0)
    for start in range(0, S, block):
        queries = slice(start, min(start + block, S))
        rows = query[queries].to(columns.dtype).transpose(0, 1)
        yield queries, rows @ columns * softmax_scale


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
