"""Bad input gets one sentence, before anything is written."""

import re

import pytest
import torch

from tokencache_kernels import ops
from tokencache_kernels.testing import randn, random_indices

B, N, S, D, M = 2, 12, 5, 16, 32


def arguments(op):
    x, cache, rows = randn(B, N, D), randn(B, N, D, seed=1), randn(B, S, D, seed=2)
    indices = random_indices(B, N, S)
    shift = randn(B, D)
    qkv = randn(B, N, 2, 8)
    return {
        "gather_rows": {"hidden_states": x, "indices": indices},
        "scatter_rows_": {"cache": cache, "indices": indices, "rows": rows},
        "scatter_rows": {"cache": cache, "indices": indices, "rows": rows},
        "select_tokens_": {
            "scores": randn(B, N),
            "staleness": torch.zeros(B, N, dtype=torch.int32),
            "max_fresh": S,
        },
        "select_cycle_": {
            "scores": randn(3, B, N),
            "staleness": torch.zeros(3, B, N, dtype=torch.int32),
            "num_fresh": torch.ones(2, 3, dtype=torch.int32),
            "max_fresh": S,
        },
        "invert_indices": {"indices": indices, "num_tokens": N},
        "add_branches_": {"hidden_states": x, "branches": [cache], "gates": [shift]},
        "blend": {"cached": cache, "fresh": x, "weight": randn(B, N)},
        "gather_modulate": {
            "hidden_states": x, "indices": indices, "shift": shift, "scale": shift,
        },
        "row_pass_": {
            "hidden_states": x, "branches": [cache], "gates": [None], "indices": indices,
            "shift": shift, "scale": shift,
        },
        "linear": {"x": rows, "weight": randn(M, D), "bias": randn(M)},
        "linear_scatter_": {
            "cache": cache, "indices": indices, "x": rows, "weight": randn(D, D), "bias": randn(D),
        },
        "mlp_": {
            "cache": cache, "hidden_states": x, "indices": indices, "shift": shift, "scale": shift,
            "fc1_weight": randn(M, D), "fc1_bias": randn(M), "fc2_weight": randn(D, M),
            "fc2_bias": randn(D),
        },
        "attention": {"query": qkv[:, :S], "key": qkv, "value": qkv},
        "attention_received": {"query": qkv, "key": qkv},
        "attention_entropy": {"query": qkv, "key": qkv},
        "head_norms": {"x": qkv},
        "token_change": {"new": x, "old": cache},
    }[op]  # fmt: skip


INT64 = random_indices(B, N, S).long()
# ruff: noqa: E501
CASES = [
    ("gather_rows", {"hidden_states": randn(N, D)}, "hidden_states must have shape (B, N, D), got (12, 16)"),
    ("gather_rows", {"hidden_states": [1.0]}, "hidden_states must be a tensor, got list"),
    ("gather_rows", {"hidden_states": randn(B, N, D).int()}, "hidden_states must be float16 or bfloat16 or float32 or float64, got int32"),
    ("gather_rows", {"hidden_states": randn(B, D, N).mT}, "hidden_states must have stride 1 along D, got 12"),
    ("gather_rows", {"indices": INT64}, "indices must be int32, got int64"),
    ("gather_rows", {"indices": random_indices(3, N, S)}, "indices must have shape (B, S) = (2, any), got (3, 5)"),
    ("gather_rows", {"indices": random_indices(B, 20, 13)}, "indices must hold at most N = 12 slots, got 13"),
    ("gather_rows", {"indices": random_indices(B, N, S).to("meta")}, "indices must be on cpu, got meta"),
    ("gather_rows", {"backend": "cuda"}, "backend must be one of auto, triton, native, reference, library, got 'cuda'"),
    ("scatter_rows_", {"rows": randn(B, 4, D)}, "rows must have shape (B, S, D) = (2, 5, 16), got (2, 4, 16)"),
    ("scatter_rows_", {"rows": randn(B, S, D).half()}, "rows must be float32, got float16"),
    ("scatter_rows", {"rows": randn(B, S, 8)}, "rows must have shape (B, S, D) = (2, 5, 16), got (2, 5, 8)"),
    ("select_tokens_", {"max_fresh": 13}, "max_fresh must be in [0, N = 12], got 13"),
    ("select_tokens_", {"max_fresh": -1}, "max_fresh must be in [0, N = 12], got -1"),
    ("select_tokens_", {"grid": (3, 5)}, "grid must multiply to N = 12, got (3, 5)"),
    ("select_tokens_", {"grid": (3, 4), "tile": 0}, "tile must be at least 1, got 0"),
    ("select_tokens_", {"scores": randn(N)}, "scores must have shape (B, N) or (L, B, N), got (12,)"),
    ("select_tokens_", {"scores": randn(B, N).double()}, "scores must be float16 or bfloat16 or float32, got float64"),
    ("select_tokens_", {"staleness": torch.zeros(B, N)}, "staleness must be int32, got float32"),
    ("select_tokens_", {"num_fresh": torch.ones(2, dtype=torch.int32)}, "num_fresh must be None for scores of rank 2, got a tensor"),
    ("select_cycle_", {"num_fresh": torch.ones(2, 4, dtype=torch.int32)}, "num_fresh must have shape (P, L) = (any, 3), got (2, 4)"),
    ("invert_indices", {"num_tokens": 4}, "num_tokens must be at least S = 5, got 4"),
    ("add_branches_", {"gates": []}, "gates must hold one entry per branch, 1, got 0"),
    ("add_branches_", {"branches": [randn(B, 3, D)]}, "branches[0] must have shape (B, N, D) = (2, 12, 16), got (2, 3, 16)"),
    ("add_branches_", {"gates": [randn(D)]}, "gates[0] must have shape (B, D), got (16,)"),
    ("blend", {"fresh": randn(B, S, D)}, "fresh must have shape (B, N, D) = (2, 12, 16), got (2, 5, 16)"),
    ("blend", {"weight": 0.5}, "weight must be a tensor of shape (), (N,) or (B, N), got float"),
    ("blend", {"weight": randn(B, N, 1)}, "weight must be a tensor of shape (), (N,) or (B, N), got (2, 12, 1)"),
    ("blend", {"weight": randn(B)}, "weight must have shape (N) = (12), got (2,)"),
    ("blend", {"weight": randn(B, N).half()}, "weight must be float32, got float16"),
    ("gather_modulate", {"scale": randn(B, 8)}, "scale must have shape (B, D) = (2, 16), got (2, 8)"),
    ("row_pass_", {"positions": torch.zeros(B, 3, dtype=torch.int32)}, "positions must have shape (B, N) = (2, 12), got (2, 3)"),
    ("linear", {"weight": randn(M, 7)}, "weight must have shape (O, K) = (any, 16), got (32, 7)"),
    ("linear", {"bias": randn(4)}, "bias must have shape (O,) = (32), got (4,)"),
    ("linear", {"activation": "relu"}, "activation must be one of none, gelu, gelu_tanh, silu, got 'relu'"),
    ("linear_scatter_", {"gate": randn(B, 3)}, "gate must have shape (B, O) = (2, 16), got (2, 3)"),
    ("linear_scatter_", {"features": randn(B, 3, 8)}, "features must have shape (B, N, F) = (2, 12, any), got (2, 3, 8)"),
    ("linear_scatter_", {"features": randn(B, N, 8)}, "weight must have shape (O, F + K) = (16, 24), got (16, 16)"),
    ("linear_scatter_", {"x": randn(B, S, 0), "weight": randn(D, 0)}, "x must have at least one channel, got 0"),
    ("mlp_", {"fc2_weight": randn(D, 8)}, "fc2_weight must have shape (D, M) = (16, 32), got (16, 8)"),
    ("mlp_", {"hidden_states": randn(B, 3, D)}, "hidden_states must have shape (B, N, D) = (2, 12, 16), got (2, 3, 16)"),
    ("attention", {"key": randn(B, N, 3, 8)}, "key must have shape (B, N, H, E) = (2, any, 2, 8), got (2, 12, 3, 8)"),
    ("attention_received", {"lse": randn(B, 2, 3)}, "lse must have shape (B, H, S) = (2, 2, 12), got (2, 2, 3)"),
    ("attention_entropy", {"key_lengths": INT64[:, 0]}, "key_lengths must be int32, got int64"),
    ("head_norms", {"x": randn(B, N, D)}, "x must have shape (B, N, H, E), got (2, 12, 16)"),
    ("token_change", {"metric": "l2"}, "metric must be one of cosine, relative_l1, got 'l2'"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "changed", "sentence"), CASES, ids=[c[2][:60] for c in CASES])
def test_bad_input_gets_one_sentence_and_writes_nothing(op, changed, sentence):
    given = {**arguments(op), **changed}
    tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
    before = [value.clone() for value in tensors if value.device.type != "meta"]

    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(f'{op}: {sentence}')}$"):
        getattr(ops, op)(**given)

    after = [value for value in tensors if value.device.type != "meta"]
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)


@pytest.mark.parametrize("op", ["gather_rows", "scatter_rows_", "linear", "row_pass_", "mlp_"])
def test_an_input_that_requires_grad_is_refused(op):
    given = arguments(op)
    name = next(iter(given))
    given[name] = given[name].requires_grad_()

    with pytest.raises(RuntimeError, match=f"^{op}: inputs must not require grad"):
        getattr(ops, op)(**given)

    with torch.no_grad():
        getattr(ops, op)(**given)


def test_the_reference_has_a_gradient():
    x = randn(B, N, D).requires_grad_()
    indices = random_indices(B, N, S)
    weight = randn(D, D).requires_grad_()

    rows = ops.gather_rows(x, indices, backend="reference")
    out = ops.linear_scatter(torch.zeros(B, N, D), indices, rows, weight, backend="reference")
    out.sum().backward()

    assert weight.grad.abs().sum() > 0
    touched = ops.invert_indices(indices, N) >= 0
    assert (x.grad.abs().sum(-1) > 0).equal(touched)


def test_index_values_are_checked_when_asked_for(monkeypatch):
    x = randn(1, N, D)
    wild = torch.tensor([[0, 12]], dtype=torch.int32)
    repeated = torch.tensor([[3, 3]], dtype=torch.int32)
    assert ops.gather_rows(x, wild)[0, 1].abs().max() == 0

    monkeypatch.setenv("TOKENCACHE_CHECK_INDICES", "1")

    with pytest.raises(
        ValueError, match=r"indices must lie in \[-1, 12\), got values in \[0, 12\]"
    ):
        ops.gather_rows(x, wild)
    with pytest.raises(ValueError, match="name each token once, got a repeated token in sample 0"):
        ops.scatter_rows_(x, repeated, randn(1, 2, D))
    ops.gather_rows(x, torch.tensor([[-1, -1]], dtype=torch.int32))
    ops.gather_rows(x, repeated)
