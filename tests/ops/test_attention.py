"""The reference of attention and of its statistics, against PyTorch's own attention and loops."""

import pytest
import torch
import torch.nn.functional as F

from tokencache_kernels import ops
from tokencache_kernels.testing import randn, random_indices

OPS = ("attention", "project_qkv_", "attention_received", "attention_entropy")


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


def test_projection_stores_keys_and_values_in_their_rows(backend):
    """With rotation and norm, against the same done for all tokens and then picked."""
    B, N, S, H, E, K = 2, 9, 4, 2, 8, 12
    x, weight, bias = randn(B, N, K), randn(3 * H * E, K), randn(3 * H * E)
    gain_q, gain_k = randn(E), randn(E, seed=1)
    angle = randn(N, E // 2).repeat_interleave(2, -1)
    indices = random_indices(B, N, S, num_empty=1)
    keys, values = randn(B, N, H, E), randn(B, N, H, E, seed=1)

    def rotate(y):
        pairs = torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous())
        turn = torch.polar(torch.ones(N, E // 2), angle[:, ::2])[None, :, None]
        return torch.view_as_real(pairs * turn).flatten(-2)

    q, k, v = (x @ weight.T + bias).unflatten(-1, (3, H, E)).unbind(2)
    q = rotate(F.rms_norm(q, (E,), gain_q, 1e-6))
    k = rotate(F.rms_norm(k, (E,), gain_k, 1e-6))
    wanted_keys, wanted_values = keys.clone(), values.clone()
    for b, row in enumerate(indices.tolist()):
        for token in row:
            if token >= 0:
                wanted_keys[b, token], wanted_values[b, token] = k[b, token], v[b, token]

    packed = ops.gather_rows(x, indices)
    query, new_keys, new_values = ops.project_qkv(
        keys, values, packed, indices, weight, bias, query_norm=gain_q, key_norm=gain_k,
        rotary=(angle.cos(), angle.sin()), backend=backend,
    )  # fmt: skip

    torch.testing.assert_close(new_keys, wanted_keys)
    torch.testing.assert_close(new_values, wanted_values)
    live = indices >= 0
    assert not torch.equal(new_keys, keys)
    for b in range(B):
        torch.testing.assert_close(query[b, live[b]], q[b, indices[b][live[b]].long()])


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
