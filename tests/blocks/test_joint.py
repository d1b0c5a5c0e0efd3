"""FLUX's sub-layers by themselves: joint attention, and attention and MLP side by side."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokencache_kernels import backends, ops
from tokencache_kernels.blocks import (
    JointAttention,
    Layers,
    Modulation,
    ParallelLayer,
    ResidualStream,
    Runner,
)
from tokencache_kernels.policies import LayerGroup, Site, fora
from tokencache_kernels.testing import randn, random_indices

B, T, N, D, M = 2, 3, 9, 16, 40
ATTENTION, TOTAL = Site("double", 0, "attn"), Site("single", 0, "mlp")


def make_layer(device, is_fused, dtype=torch.float32, backend="auto"):
    torch.manual_seed(0)
    expand, project = (
        nn.Linear(*widths).to(device, dtype).requires_grad_(False)
        for widths in ((D, M), (D + M, D))
    )
    shift, scale, gate = (randn(B, D, seed=seed, device=device, dtype=dtype) for seed in range(3))

    def compute(rows, attended):
        hidden = F.gelu(expand(rows), approximate="tanh")
        return project(torch.cat([attended, hidden], dim=-1))

    attended = randn(B, N, D, seed=5, device=device, dtype=dtype)
    layer = ParallelLayer(
        TOTAL, gate, Modulation(shift, scale), lambda: attended, compute, backend=backend
    )  # fmt: skip
    layers = Layers(expand, project, "gelu_tanh")
    return replace(layer, layers=layers) if is_fused else layer


def recompute(layer, device, indices):
    """The cache after a recomputation, and the stream's sum, with a branch pending before."""
    x, branch, cache = (
        randn(B, N, D, seed=seed, device=device, dtype=layer.gate.dtype) for seed in (6, 7, 8)
    )
    stream = ResidualStream(x, layer.backend)
    stream.add(branch, None)
    layer.recompute_(cache, stream, indices, ops.invert_indices(indices, N))
    return cache, x + branch


@pytest.mark.parametrize("is_fused", [True, False], ids=["fused", "module"])
def test_fresh_rows_are_recomputed_from_their_cached_attention_and_no_others(device, is_fused):
    layer = make_layer(device, is_fused)
    indices = random_indices(B, N, 5, device=device, num_empty=1)

    cache, x = recompute(layer, device, indices)

    shift, scale, norm = layer.modulation
    rows = F.layer_norm(x, (D,), eps=norm.eps) * (1 + scale[:, None]) + shift[:, None]
    is_fresh = ops.invert_indices(indices, N)[..., None] >= 0
    stale = randn(B, N, D, seed=8, device=device)
    wanted = torch.where(is_fresh, layer.module(rows, layer.attend()), stale)
    torch.testing.assert_close(cache, wanted, rtol=1e-5, atol=1e-5)


def test_all_rows_recomputed_are_a_full_computation(device):
    layer = make_layer(device, is_fused=True)
    everyone = torch.arange(N, dtype=torch.int32, device=device).expand(B, N).contiguous()

    cache, x = recompute(layer, device, everyone)

    torch.testing.assert_close(cache, layer.compute(ResidualStream(x)), rtol=1e-5, atol=1e-5)


def test_no_launch_but_three(device):
    reason = backends.unavailable("triton", "linear", torch.device(device), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    from tokencache_kernels.testing.counting import count_launches

    layer = make_layer(device, is_fused=True, backend="triton")
    indices = random_indices(B, N, 5, device=device)
    positions = ops.invert_indices(indices, N)
    stream, cache = ResidualStream(randn(B, N, D, device=device), "triton"), layer.attend().clone()
    stream.add(layer.attend(), layer.gate)

    with count_launches() as launches:
        layer.recompute_(cache, stream, indices, positions)

    assert launches == ["_row_pass_kernel", "_linear_kernel", "_linear_scatter_kernel"]


def test_image_and_text_share_a_decision_and_have_a_feature_each(device):
    image, text = randn(B, N, D, device=device), randn(B, T, D, device=device)
    gates = randn(B, D, seed=1, device=device), randn(B, D, seed=2, device=device)
    zero = Modulation(torch.zeros_like(gates[0]), torch.zeros_like(gates[0]))
    calls = []

    def attend(image, text):
        calls.append((image, text))
        return 2 * image, 3 * text

    attention = JointAttention(ATTENTION, gates, (zero, zero), attend)
    runner = Runner(fora(2, 2))
    lanes = [LayerGroup((ATTENTION,), T + N, is_whole=True)]
    sums = []
    for later in (0.0, 1.0):
        streams = ResidualStream(image + later), ResidualStream(text + later)
        runner.begin_step(lanes, B, torch.device(device))
        attention.run(*streams, runner)
        runner.end_step()
        sums.append([stream.flush() - later for stream in streams])

    assert len(calls) == 1
    for x, gate, factor, *results in zip((image, text), gates, (2, 3), *sums, strict=True):
        wanted = x + gate[:, None] * factor * F.layer_norm(x, (D,), eps=1e-6)
        for result in results:
            torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)
