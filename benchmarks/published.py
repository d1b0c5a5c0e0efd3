"""The ops as others compute them: by the published methods, and with the libraries' own fusions.

The paper's composition is eager PyTorch, one small kernel after another. Indices are int64, as
``gather`` and ``argsort`` want and give them. The package is timed against these, so they do no
more work than they must.
"""

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokencache_kernels.backends import library

EPS = 1e-6
# the gain of the best token of each 2 x 2 square (ToCa's s4)
BONUS = 0.4


# rows


def gather_rows(x, fresh):
    return x.gather(1, _columns(fresh, x))


def scatter_rows_(cache, fresh, rows):
    return cache.scatter_(1, _columns(fresh, cache), rows)


def gather_rows_by_index(x, flat_fresh):
    """With one index a row, of the tokens of all samples in a row."""
    rows = x.flatten(0, 1).index_select(0, flat_fresh)
    return rows.unflatten(0, (len(x), -1))


def scatter_rows_by_index_(cache, flat_fresh, rows):
    cache.flatten(0, 1).index_copy_(0, flat_fresh, rows.flatten(0, 1))
    return cache


def _columns(fresh, x):
    return fresh[..., None].expand(-1, -1, x.shape[-1])


# modulate


def add_branches(x, attention, mlp, gate):
    x = x + gate[:, None] * attention
    return x + gate[:, None] * mlp


def gather_modulate(x, fresh, shift, scale):
    rows = F.layer_norm(gather_rows(x, fresh), x.shape[-1:], eps=EPS)
    return rows * (1 + scale[:, None]) + shift[:, None]


def row_pass(x, attention, mlp, gate, fresh, shift, scale):
    """Two gated additions over all tokens, then gather, normalise and modulate."""
    x = add_branches(x, attention, mlp, gate)
    # all rows are wanted: a compiler would leave out those that nobody sees
    return gather_modulate(x, fresh, shift, scale), x


# select


def select_by_argsort(scores, staleness, num_fresh, staleness_weight, grid):
    """Layer by layer, as the methods' code has it."""
    for of_layer in zip(scores, staleness, strict=True):
        choose_by_argsort(*of_layer, num_fresh, staleness_weight, grid)
    return staleness


def choose_by_argsort(scores, staleness, num_fresh, staleness_weight, grid=None):
    """The fresh tokens of one layer; updates its staleness."""
    combined = combine_scores(scores, staleness, staleness_weight, grid)
    fresh = combined.argsort(dim=-1, descending=True)[:, :num_fresh]
    staleness.add_(1).scatter_(-1, fresh, 0)
    return fresh


def select_by_topk(scores, staleness, num_fresh, staleness_weight, grid):
    """All layers and samples at once."""
    combined = combine_scores(scores, staleness, staleness_weight, grid)
    fresh = combined.topk(num_fresh, dim=-1, sorted=False).indices
    return staleness.add_(1).scatter_(-1, fresh, 0)


def select_cycle_by_argsort(scores, staleness, cycle_num_fresh, num_fresh, staleness_weight, grid):
    for _ in cycle_num_fresh:
        select_by_argsort(scores, staleness, num_fresh, staleness_weight, grid)
    return staleness


def select_cycle_by_topk(scores, staleness, cycle_num_fresh, num_fresh, staleness_weight, grid):
    for _ in cycle_num_fresh:
        select_by_topk(scores, staleness, num_fresh, staleness_weight, grid)
    return staleness


def combine_scores(scores, staleness, staleness_weight, grid):
    """Normalised scores and staleness, and the bonus of the best token of each square."""
    combined = F.normalize(scores, dim=-1) + staleness_weight * staleness
    if grid is None:
        return combined
    squares = combined.unflatten(-1, (grid[0] // 2, 2, grid[1] // 2, 2))
    is_best = squares == squares.amax((-3, -1), keepdim=True)
    return (squares * (1 + BONUS * is_best)).flatten(-4)


def invert_indices(fresh, num_tokens):
    slots = torch.arange(fresh.shape[1], device=fresh.device).expand_as(fresh)
    return fresh.new_full((len(fresh), num_tokens), -1).scatter_(1, fresh, slots)


# linear and mlp


def linear_gelu(rows, fc1, fc1_bias):
    return F.gelu(F.linear(rows, fc1, fc1_bias), approximate="tanh")


def linear_gelu_in_library(rows, fc1, fc1_bias):
    """The library's own fusion, where it has one."""
    flat = torch._addmm_activation(fc1_bias, rows.flatten(0, 1), fc1.t(), use_gelu=True)
    return flat.unflatten(0, rows.shape[:2])


def dense_linear_gelu(x, fc1, fc1_bias):
    return linear_gelu(x, fc1, fc1_bias)


def linear_gathered(x, fresh, fc1, fc1_bias):
    return linear_gelu(gather_rows(x, fresh), fc1, fc1_bias)


def linear_scatter_(cache, fresh, hidden, fc2, fc2_bias):
    return scatter_rows_(cache, fresh, F.linear(hidden, fc2, fc2_bias))


def linear_scatter_by_index_(cache, flat_fresh, hidden, fc2, fc2_bias):
    return scatter_rows_by_index_(cache, flat_fresh, F.linear(hidden, fc2, fc2_bias))


def mlp_(cache, x, fresh, shift, scale, fc1, fc1_bias, fc2, fc2_bias):
    rows = linear_gelu(gather_modulate(x, fresh, shift, scale), fc1, fc1_bias)
    return linear_scatter_(cache, fresh, rows, fc2, fc2_bias)


def mlp_in_library(cache, x, fresh, shift, scale, fc1, fc1_bias, fc2, fc2_bias):
    """Two of the library's products, and a kernel of the compiler's before and after them."""
    rows = _compiled(gather_modulate)(x, fresh, shift, scale)
    hidden = linear_gelu_in_library(rows, fc1, fc1_bias)
    return _compiled(scatter_rows_)(cache, fresh, F.linear(hidden, fc2, fc2_bias))


def dense_mlp(x, shift, scale, fc1, fc1_bias, fc2, fc2_bias):
    """The MLP of all tokens, which caching saves."""
    rows = F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]
    return F.linear(linear_gelu(rows, fc1, fc1_bias), fc2, fc2_bias)


@cache
def _compiled(function):
    return torch.compile(function, dynamic=False, fullgraph=True)


def name_library_gelu(dtype, device):
    """Name the GELU of torch's fused product here: that of ``tanh`` or that of ``erf``."""
    # where the two differ most, and with nothing added that would round
    bias = torch.linspace(-3, -1, 512, dtype=dtype, device=device)
    rows, weight = bias.new_zeros(1, 64, 64), bias.new_zeros(512, 64)
    found = linear_gelu_in_library(rows, weight, bias)[0, 0].double()
    distance = {
        name: (found - F.gelu(bias.double(), approximate=approximate)).norm().item()
        for name, approximate in (("tanh", "tanh"), ("erf", "none"))
    }
    return min(distance, key=distance.get)


# project


def project_qkv_(key_cache, value_cache, rows, fresh, qkv, qkv_bias, norm, rotary):
    query, key, value = _split_heads(F.linear(rows, qkv, qkv_bias), key_cache)
    if norm is not None:
        query = F.rms_norm(query, query.shape[-1:], norm.query_weight, norm.eps)
        key = F.rms_norm(key, key.shape[-1:], norm.key_weight, norm.eps)
    if rotary is not None:
        cosine, sine = (table[fresh][:, :, None] for table in rotary)
        query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
    columns = fresh[..., None, None].expand(-1, -1, *key.shape[2:])
    key_cache.scatter_(1, columns, key)
    value_cache.scatter_(1, columns, value)
    return query, key_cache, value_cache


def dense_project_qkv(x, key_cache, qkv, qkv_bias, norm, rotary):
    query, key, value = _split_heads(F.linear(x, qkv, qkv_bias), key_cache)
    if norm is not None:
        query = F.rms_norm(query, query.shape[-1:], norm.query_weight, norm.eps)
        key = F.rms_norm(key, key.shape[-1:], norm.key_weight, norm.eps)
    if rotary is not None:
        cosine, sine = (table[:, None] for table in rotary)
        query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
    return query, key, value


def rotate(x, cosine, sine):
    """Pairs of channels turned by their angles, in float32 as the models do it."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return (x * cosine + turned * sine).to(x.dtype)


def _split_heads(packed, like):
    return (part.unflatten(-1, like.shape[2:]) for part in packed.chunk(3, dim=-1))


# attention


def attention(fresh_query, key, value):
    """Torch's, which picks one of its implementations."""
    heads_first = (tensor.transpose(1, 2) for tensor in (fresh_query, key, value))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def dense_attention(query, key, value):
    return attention(query, key, value)


def _force(implementation):
    def forced(fresh_query, key, value):
        with sdpa_kernel(implementation):
            return attention(fresh_query, key, value)

    return forced


ATTENTIONS_OF_TORCH = {
    "sdpa-cudnn": _force(SDPBackend.CUDNN_ATTENTION),
    "sdpa-flash": _force(SDPBackend.FLASH_ATTENTION),
    "sdpa-efficient": _force(SDPBackend.EFFICIENT_ATTENTION),
}


def _call_library(name, fresh_query, key, value):
    candidate = library.CANDIDATES[name]
    reason = candidate.refusal(fresh_query, key, value, None)
    if reason is not None:
        raise NotImplementedError(reason)
    return candidate.run(fresh_query, key, value, None, key.shape[-1] ** -0.5)[0]


# those that hand out the log-sum-exp, which the scores are made of
ATTENTIONS_OF_LIBRARIES = {name: partial(_call_library, name) for name in library.CANDIDATES}


def attention_with_received(query, key, value):
    """Attention with its map, which is averaged over the queries."""
    weights = _map(query, key)
    return torch.einsum("bhqk,bkhe->bqhe", weights, value), weights.mean(dim=2)


def attention_with_entropy(fresh_query, text_key, text_value, text_lengths):
    """Attention to a text of the sample's own length, and the entropy of the mean map."""
    weights = _map(fresh_query, text_key, text_lengths)
    out = torch.einsum("bhqk,bkhe->bqhe", weights.to(text_value.dtype), text_value)
    return out, _entropy(weights)


# statistics


def attention_received(query, key):
    """The whole map, averaged over its queries."""
    return _map(query, key).mean(dim=2)


def attention_entropy(query, text_key, text_lengths):
    return _entropy(_map(query, text_key, text_lengths))


def head_norms(value):
    return value.norm(dim=-1).mean(dim=-1)


def token_change(x, cache):
    return 1 - F.cosine_similarity(x, cache, dim=-1)


def _map(query, key, lengths=None):
    logits = torch.einsum("bqhe,bkhe->bhqk", query, key) * query.shape[-1] ** -0.5
    if lengths is not None:
        beyond = torch.arange(key.shape[1], device=key.device) >= lengths[:, None]
        logits = logits.masked_fill(beyond[:, None, None], -torch.inf)
    return logits.softmax(dim=-1)


def _entropy(weights):
    mean = weights.float().mean(dim=1)
    return -(mean * (mean + 1e-12).log()).sum(dim=-1)


# blend


def blend(cache, x, weight):
    return torch.lerp(cache, x, weight[..., None].to(x.dtype))


def blend_backward(mlp, cache, x, weight):
    """Compute the gradients of ``blend``, with ``mlp`` as the incoming gradient."""
    w = weight[..., None].to(x.dtype)
    fresh = w * mlp
    return mlp - fresh, fresh, ((x - cache) * mlp).sum(dim=-1)
