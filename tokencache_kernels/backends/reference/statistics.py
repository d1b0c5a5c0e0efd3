"""What says which tokens matter."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attention_logits


def attention_received(
    query: Tensor, key: Tensor, lse: Tensor | None, softmax_scale: float
) -> Tensor:
    """The attention each key receives, averaged over the queries: (B, H, N), sums to 1."""
    out = query.new_empty(query.shape[0], query.shape[2], key.shape[1])
    if out.numel() == 0:
        return out
    received = []
    # one sample at a time: the maps of a whole batch would not fit into a cache
    for sample in range(query.shape[0]):
        one = slice(sample, sample + 1)
        logits = attention_logits(query[one], key[one], None, softmax_scale)
        weights = logits.softmax(dim=-1) if lse is None else torch.exp(logits - lse[one, ..., None])
        received.append(weights.mean(dim=2))
    return torch.cat(received)


def attention_entropy(
    query: Tensor, key: Tensor, key_lengths: Tensor | None, softmax_scale: float
) -> Tensor:
    """The entropy, in nats, of each query's row of the head-averaged attention map: (B, S)."""
    weights = attention_logits(query, key, key_lengths, softmax_scale).softmax(dim=-1).mean(dim=1)
    return -torch.special.xlogy(weights, weights).sum(dim=-1)


def head_norms(x: Tensor) -> Tensor:
    """The mean over heads of the L2 norm of each token's head vectors: (B, N, H, E) -> (B, N)."""
    return torch.linalg.vector_norm(x, dim=-1).mean(dim=-1)


def token_change(new: Tensor, old: Tensor, metric: str) -> Tensor:
    """How far each token moved: 1 - cos(new, old), or |new - old|_1 / |old|_1."""
    if metric == "cosine":
        return 1 - F.cosine_similarity(new, old, dim=-1)
    return (new - old).abs().sum(-1) / old.abs().sum(-1).clamp_min(1e-12)
