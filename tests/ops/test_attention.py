"""The reference of attention and of its statistics, against PyTorch's own attention and loops."""

import pytest
import torch
import torch.nn.functional as F

from tokencache_kernels import ops
from tokencache_kernels.testing import randn

OPS = ("attention", "attention_received", "attention_entropy")


def heads_first(x):
    return x.transpose(1, 2)


@pytest.mark.parametrize(("S", "N", "H", "E"), [(5, 11, 3, 8), (1, 1, 1, 4), (0, 7, 2, 8)])
def test_attention_is_the_librarys(backend, S, N, H, E):
    query, key, value = randn(2, S, H, E), randn(2, N, H, E), randn(2, N, H, E, seed=1)

    out, lse = ops.attention(query, key, value, backend=backend)

    wanted = F.scaled_dot_product_attention(*map(heads_first, (query, key, value)))
    torch.testing.assert_close(out, heads_first(wanted))
    logits = heads_first(query) @ heads_first(key).mT / E**0.5
    torch.testing.assert_close(lse, logits.exp().sum(-1).log())


def test_a_sample_without_a_key_attends_to_nothing(backend):
    query, key = randn(2, 3, 2, 8), randn(2, 6, 2, 8)
    lengths = torch.tensor([0, 4], dtype=torch.int32)

    out, lse = ops.attention(query, key, key, key_lengths=lengths, backend=backend)

    assert out[0].abs().max() == 0
    assert lse[0].isneginf().all()
    alone, _ = ops.attention(query[1:], key[1:, :4], key[1:, :4], backend=backend)
    torch.testing.assert_close(out[1:], alone)


def test_statistics_are_those_of_the_explicit_map(backend):
    query, key = randn(2, 7, 3, 8), randn(2, 11, 3, 8)
    weights = (heads_first(query) @ heads_first(key).mT * 0.4).softmax(-1)
    _, lse = ops.attention(query, key, key, softmax_scale=0.4, backend=backend)

    for given in (None, lse):
        out = ops.attention_received(query, key, lse=given, softmax_scale=0.4, backend=backend)
        torch.testing.assert_close(out, weights.mean(2))
    entropy = ops.attention_entropy(query, key, softmax_scale=0.4, backend=backend)

    mean = weights.mean(1)
    torch.testing.assert_close(entropy, -(mean * mean.log()).sum(-1))


def test_norms_and_change_are_what_they_say():
    x = randn(2, 5, 3, 8)
    new, old = randn(2, 5, 16), randn(2, 5, 16, seed=1)

    norms = ops.head_norms(x)
    cosine = ops.token_change(new, old)
    relative = ops.token_change(new, old, metric="relative_l1")

    torch.testing.assert_close(norms, x.square().sum(-1).sqrt().mean(-1))
    dot = (new * old).sum(-1) / (new.square().sum(-1) * old.square().sum(-1)).sqrt()
    torch.testing.assert_close(cosine, 1 - dot)
    torch.testing.assert_close(relative, (new - old).abs().sum(-1) / old.abs().sum(-1))
    assert ops.token_change(new, new).abs().max() < 1e-6
