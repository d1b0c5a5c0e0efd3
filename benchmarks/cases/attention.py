"""Fresh queries over all keys, and over a text with the entropies of its weights."""

from tokencache_kernels import ops

from .. import published
from .op import Op


def _attention_with_entropy(fresh_query, text_key, text_value, text_lengths, backend):
    out, _, entropy = ops.attention_with_entropy(
        fresh_query, text_key, text_value, key_lengths=text_lengths, head_mean=True, backend=backend
    )
    return out, entropy


def _attention_with_received(query, key, value, backend):
    out, lse = ops.attention(query, key, value, backend=backend)
    return out, ops.attention_received(query, key, lse=lse, backend=backend)


def _of_all_queries(attend):
    return lambda query, key, value: attend(query, key, value)


OPS = (
    Op(
        "attention",
        lambda fresh_query, key, value, backend: ops.attention(
            fresh_query, key, value, backend=backend
        )[0],
        published.attention,
        lambda s, size: 2 * s.B * (s.S + s.N) * s.D * size,
        lambda s: 4 * s.B * s.S * s.N * s.D,
        eager="sdpa",
        others=published.ATTENTIONS_OF_LIBRARIES,
        on_cuda=published.ATTENTIONS_OF_TORCH,
        dense=published.dense_attention,
    ),
    Op(
        # the price of scores in a full step; all others but the first are without
        "attention_with_received",
        _attention_with_received,
        published.attention_with_received,
        lambda s, size: 4 * s.B * s.N * s.D * size + 4 * s.B * s.heads * s.N,
        lambda s: 6 * s.B * s.N * s.N * s.D,
        fits=lambda s: s.S < s.N <= 4608,
        op="attention_received",
        backends=("auto", "triton", "native"),
        others={"sdpa": _of_all_queries(published.attention)},
        on_cuda={
            name: _of_all_queries(attend) for name, attend in published.ATTENTIONS_OF_TORCH.items()
        },
        compiled="sdpa",
    ),
    Op(
        "attention_with_entropy",
        _attention_with_entropy,
        published.attention_with_entropy,
        lambda s, size: 2 * s.B * (s.S + s.T) * s.D * size + 4 * s.B * s.S,
        # queries are multiplied by keys twice
        lambda s: 6 * s.B * s.S * s.T * s.D,
        fits=lambda s: s.T > 0,
    ),
)
