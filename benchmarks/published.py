"""The ops as the published methods compute them: eager PyTorch, one small kernel after another.

Indices are int64, as ``gather`` and ``argsort`` want and give them. These are what the package is
timed against, so they do no more work than they must.
"""

import torch
import torch.nn.functional as F

EPS = 1e-6


def gather_rows(x, fresh):
    return x.gather(1, _columns(fresh, x))


def scatter_rows_(cache, fresh, rows):
    return cache.scatter_(1, _columns(fresh, cache), rows)


def row_pass(x, attention, mlp, gate, fresh, shift, scale):
    """Two gated additions over all tokens, then gather, normalise and modulate."""
    x = x + gate[:, None] * attention
    x = x + gate[:, None] * mlp
    return gather_modulate(x, fresh, shift, scale)


def gather_modulate(x, fresh, shift, scale):
    rows = F.layer_norm(gather_rows(x, fresh), x.shape[-1:], eps=EPS)
    return rows * (1 + scale[:, None]) + shift[:, None]


def select_by_argsort(scores, staleness, num_fresh, staleness_weight):
    combined = F.normalize(scores, dim=-1) + staleness_weight * staleness
    fresh = combined.argsort(dim=-1, descending=True)[:, :num_fresh]
    return staleness.add_(1).scatter_(-1, fresh, 0)


def select_by_topk(scores, staleness, num_fresh, staleness_weight):
    combined = F.normalize(scores, dim=-1) + staleness_weight * staleness
    fresh = combined.topk(num_fresh, dim=-1, sorted=False).indices
    return staleness.add_(1).scatter_(-1, fresh, 0)


def linear_gelu(rows, fc1, fc1_bias):
    return F.gelu(F.linear(rows, fc1, fc1_bias), approximate="tanh")


def linear_gelu_in_library(rows, fc1, fc1_bias):
    """The library's own fusion, where it has one."""
    return torch._addmm_activation(fc1_bias, rows.flatten(0, 1), fc1.t(), use_gelu=True)


def linear_scatter_(cache, fresh, hidden, fc2, fc2_bias):
    return scatter_rows_(cache, fresh, F.linear(hidden, fc2, fc2_bias))


def mlp_(cache, x, fresh, shift, scale, fc1, fc1_bias, fc2, fc2_bias):
    rows = linear_gelu(gather_modulate(x, fresh, shift, scale), fc1, fc1_bias)
    return linear_scatter_(cache, fresh, rows, fc2, fc2_bias)


def dense_mlp(x, shift, scale, fc1, fc1_bias, fc2, fc2_bias):
    """The MLP of all tokens, which is what caching saves."""
    rows = F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]
    return F.linear(linear_gelu(rows, fc1, fc1_bias), fc2, fc2_bias)


def _columns(fresh, x):
    return fresh[..., None].expand(-1, -1, x.shape[-1])


def attention_received(query, key):
    """The whole map, averaged over its queries."""
    logits = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * query.shape[-1] ** -0.5
    return logits.softmax(-1).mean(2)
