"""Cross-attention of fresh tokens against the same module in plain PyTorch, and its scores."""

import pytest
import torch
from torch import nn

from tokencache_kernels.blocks import CrossAttentionLayer, ResidualStream, Runner
from tokencache_kernels.policies import (
    FactorRouter,
    IntervalSchedule,
    LayerGroup,
    ScoreSelector,
    Site,
    ToCaConfig,
)
from tokencache_kernels.testing import randn, random_indices

B, N, M, H, E = 2, 12, 5, 2, 8
CROSS, MLP = Site("main", 0, "cross"), Site("main", 0, "mlp")
LENGTHS = torch.tensor([3, 5], dtype=torch.int32)


class Scaled(nn.Linear):
    """A linear layer with more than a weight, so that its weight does not describe it."""

    def forward(self, x):
        return 2 * super().forward(x)


def make_layer(runner, device, scored_site=CROSS, kind=nn.Linear):
    torch.manual_seed(0)
    query, out = kind(H * E, H * E), kind(H * E, H * E)
    return CrossAttentionLayer(
        CROSS, runner, scored_site,
        query.to(device).requires_grad_(False), out.to(device).requires_grad_(False),
        is_fused=kind is nn.Linear,
        project_text=lambda: (
            randn(B, M, H, E, seed=1, device=device), randn(B, M, H, E, seed=2, device=device)
        ),
        key_lengths=LENGTHS.to(device), softmax_scale=0.4,
    )  # fmt: skip


def begin(device):
    """A runner in its second step, in which both sites are partial."""
    router = FactorRouter(0.25)
    policy = ToCaConfig(IntervalSchedule(3), router, ScoreSelector("attention_entropy"), 3)
    runner = Runner(policy)
    lanes = [LayerGroup((CROSS,), N), LayerGroup((MLP,), N, selects_late=True, shares_scores=True)]
    runner.begin_step(lanes, B, torch.device(device))
    runner.end_step()
    runner.begin_step(lanes, B, torch.device(device))
    return runner


def scores_of(runner, site):
    return runner.token_state(site).scores[0]


def expected(layer, x):
    """All rows, and the entropy of each one's head-averaged map."""
    key, value = layer.project_text()
    query = layer.query(x).unflatten(-1, (H, E))
    logits = torch.einsum("bshe,bnhe->bhsn", query, key) * layer.softmax_scale
    beyond = torch.arange(M, device=x.device) >= layer.key_lengths[:, None]
    weights = logits.masked_fill(beyond[:, None, None], -torch.inf).softmax(-1)
    rows = layer.out(torch.einsum("bhsn,bnhe->bshe", weights, value).flatten(2))
    return rows, torch.special.entr(weights.mean(1)).sum(-1)


@pytest.mark.parametrize("kind", [nn.Linear, Scaled], ids=["fused", "module"])
def test_fresh_rows_and_their_scores_are_replaced_and_no_others(device, kind):
    runner = begin(device)
    layer = make_layer(runner, device, kind=kind)
    x, branch, cache = (randn(B, N, H * E, seed=seed, device=device) for seed in (3, 4, 5))
    indices = random_indices(B, N, 4, device=device, num_empty=1)
    stream, before = ResidualStream(x), cache.clone()
    stream.add(branch, None)

    layer.recompute_(cache, stream, indices, indices)

    rows, entropy = expected(layer, x + branch)
    is_fresh = torch.zeros(B, N + 1, dtype=torch.bool, device=device)
    # an empty slot marks the column that is cut off
    is_fresh = is_fresh.scatter(1, indices.long() % (N + 1), True)[:, :N]
    torch.testing.assert_close(cache, torch.where(is_fresh[..., None], rows, before))
    for site in (CROSS, MLP):
        torch.testing.assert_close(scores_of(runner, site), torch.where(is_fresh, entropy, 1.0))


def test_a_full_computation_scores_all_tokens(device):
    runner = begin(device)
    layer = make_layer(runner, device)
    x = randn(B, N, H * E, seed=3, device=device)

    out = layer.compute(ResidualStream(x))

    rows, entropy = expected(layer, x)
    torch.testing.assert_close(out, rows)
    for site in (CROSS, MLP):
        torch.testing.assert_close(scores_of(runner, site), entropy)


def test_without_a_scored_site_the_entropy_is_not_taken(device, monkeypatch):
    runner = begin(device)
    layer = make_layer(runner, device, scored_site=None)
    monkeypatch.setattr("tokencache_kernels.ops.attention_with_entropy", None)
    x = randn(B, N, H * E, seed=3, device=device)

    out = layer.compute(ResidualStream(x))

    torch.testing.assert_close(out, expected(layer, x)[0])
    assert (scores_of(runner, CROSS) == 1).all()
