"""The launch settings of the GEMM kernels: whichever is taken, the result is the same."""

from itertools import product

import pytest
import torch

from tokencache_kernels.backends import reference, triton
from tokencache_kernels.backends.triton import _counters
from tokencache_kernels.backends.triton._gemm import (
    GemmSetting,
    gemm_heuristic,
    gemm_settings,
    gemm_tiles,
)
from tokencache_kernels.backends.triton._launch import Device, on_trial
from tokencache_kernels.backends.triton.mlp import MlpSetting
from tokencache_kernels.testing import assert_within_budget, in_float64, randn, random_indices
from tokencache_kernels.testing.counting import count_launches

H200 = Device(90, "NVIDIA H200", 132)
LIBRARY = GemmSetting(64, 64, 32, num_warps=4, num_stages=3, in_library=True)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _can_run(device):
    reason = triton.unavailable(torch.device(device), torch.float32)
    if reason is not None:
        pytest.skip(f"triton: {reason}")


def counters_left():
    return [int(buffer.count_nonzero()) for buffer in _counters._BUFFERS.values()]


def make_linear(dtype, device):
    x = randn(2, 40, 200, dtype=dtype, device=device)
    weight = randn(136, 200, dtype=dtype, device=device) / 200**0.5
    return x, weight, randn(136, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split_k", [2, 3, 8])
def test_split_tiles_are_as_exact_as_whole_ones(device, split_k, dtype):
    inputs = make_linear(dtype, device)
    setting = GemmSetting(64, 64, 32, num_warps=4, num_stages=3, split_k=split_k)

    with on_trial("linear", setting):
        out = triton.linear(*inputs, "silu", None)
        again = triton.linear(*inputs, "silu", None)

    torch.testing.assert_close(again, out, rtol=0, atol=0)
    assert not any(counters_left())
    assert_within_budget(
        out,
        exact=reference.linear(*in_float64(*inputs), "silu", None),
        rounded=reference.linear(*inputs, "silu", None),
    )


@pytest.mark.parametrize(
    "setting",
    [
        GemmSetting(64, 64, 32, num_warps=4, num_stages=3, split_k=3),
        GemmSetting(128, 256, 64, num_warps=8, num_stages=3),
    ],
    ids=["split", "wide"],
)
@pytest.mark.parametrize("num_features", [None, 40, 128])
def test_every_kind_of_tile_scatters(device, setting, num_features):
    x, weight, bias = make_linear(torch.float32, device)
    cache = randn(2, 50, 136, device=device)
    indices = random_indices(2, 50, 40, num_empty=3, device=device)
    gate = randn(2, 136, device=device)
    features = None
    if num_features is not None:
        features = randn(2, 50, num_features, device=device)
        x = x[..., num_features:].contiguous()
    inputs = (indices, x, weight, bias, gate, True, features)

    wanted, out = cache.clone(), cache.clone()
    with on_trial("linear_scatter_", setting):
        triton.linear_scatter_(out, *inputs)

    reference.linear_scatter_(wanted, *inputs)
    torch.testing.assert_close(out, wanted)
    assert not any(counters_left())


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_may_be_the_librarys(device, dtype, activation):
    inputs = make_linear(dtype, device)

    with on_trial("linear", LIBRARY), count_launches() as launches:
        out = triton.linear(*inputs, activation, None)

    # the library has one kind of GELU, which is not the same on every device
    is_librarys = activation == "none" or activation == (
        "gelu_tanh" if device == "cuda" else "gelu"
    )
    assert launches == ([] if is_librarys else ["_linear_kernel"])
    assert_within_budget(
        out,
        exact=reference.linear(*in_float64(*inputs), activation, None),
        rounded=reference.linear(*inputs, activation, None),
    )


@pytest.mark.parametrize("residual", [False, True])
def test_a_product_of_the_library_is_scattered(device, residual):
    x, weight, bias = make_linear(torch.float32, device)
    cache = randn(2, 50, 136, device=device)
    indices = random_indices(2, 50, 40, num_empty=3, device=device)
    inputs = (indices, x, weight, bias, None, residual)

    wanted, out = cache.clone(), cache.clone()
    with on_trial("linear_scatter_", LIBRARY), count_launches() as launches:
        triton.linear_scatter_(out, *inputs)

    # it does not add to the old rows
    assert launches == ["_linear_scatter_kernel" if residual else "_scatter_rows_kernel"]
    reference.linear_scatter_(wanted, *inputs)
    torch.testing.assert_close(out, wanted)


def test_a_wide_tile_activates_both_halves(device):
    inputs = make_linear(torch.float32, device)

    with on_trial("linear", GemmSetting(64, 256, 64, num_warps=8, num_stages=3)):
        out = triton.linear(*inputs, "gelu_tanh", None)

    torch.testing.assert_close(out, reference.linear(*inputs, "gelu_tanh", None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_persistent_launch_is_as_exact_as_eager(device, dtype):
    B, N, S, D, M = 2, 60, 50, 72, 136
    weights = ((M, D), (M,), (D, M), (D,))
    shapes = ((B, N, D), (B, D), (B, D), *weights)
    x, shift, scale, fc1, fc1_bias, fc2, fc2_bias = (
        randn(*shape, dtype=dtype, device=device) for shape in shapes
    )
    cache = randn(B, N, D, dtype=dtype, device=device, seed=1)
    indices = random_indices(B, N, S, num_empty=2, device=device)
    layers = (fc1 / D**0.5, fc1_bias, fc2 / M**0.5, fc2_bias)
    inputs = [x, indices, shift, scale, *layers, "gelu_tanh", reference.RowNorm()]
    setting = MlpSetting(64, 64, 64, num_warps=4, num_stages=3, is_persistent=True)

    out, again, exact, rounded = (cache.clone() for _ in range(4))
    with on_trial("mlp_", setting):
        triton.mlp_(out, *inputs)
        # the counters serve a second launch as they were left
        triton.mlp_(again, *inputs)

    exact = exact.double()
    reference.mlp_(exact, *in_float64(*inputs))
    reference.mlp_(rounded, *inputs)
    assert not any(counters_left())
    torch.testing.assert_close(again, out, rtol=0, atol=0)
    assert_within_budget(out, exact=exact, rounded=rounded)


def test_counters_are_shared_and_grow(device):
    where = torch.device(device, 0) if device == "cuda" else torch.device(device)

    first = _counters.zeroed_counters(where, 10)
    second = _counters.zeroed_counters(where, first.numel())
    larger = _counters.zeroed_counters(where, first.numel() + 1)

    assert second is first
    assert larger.numel() > first.numel()
    assert larger.count_nonzero() == 0


# heuristics: pure functions, so any device can be asked about


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_tiles_fit_the_shared_memory_of_their_architecture(arch):
    limit = {80: 163, 90: 227, 100: 227}.get(arch, 99) * 1024

    for itemsize in (2, 4):
        for tile in gemm_tiles(arch, itemsize):
            buffers = tile.num_stages if arch in (90, 100) else tile.num_stages - 1
            stage = (tile.block_m + tile.block_n) * tile.block_k * itemsize
            assert buffers * stage <= limit


def test_few_rows_are_split_and_many_take_the_widest_tile():
    few = gemm_heuristic(H200, 2, 512, 1152, 4608)
    many = gemm_heuristic(H200, 2, 16384, 12288, 3072)

    assert few.split_k > 1
    assert few.num_tiles(512, 1152) * few.split_k <= H200.num_sms
    assert many == GemmSetting(128, 256, 64, num_warps=8, num_stages=4)


def test_the_number_of_rows_chooses_among_few_kernels():
    chosen = {
        (setting.block_m, setting.block_n, setting.split_k > 1)
        for rows in range(1, 4096, 7)
        for setting in [gemm_heuristic(H200, 2, rows, 1152, 4608)]
    }

    assert 2 <= len(chosen) <= 8


def test_the_heuristic_is_one_of_the_settings_tried():
    for itemsize, rows, O, K in product((2, 4), (1, 777), (72, 1152), (7, 4608)):  # noqa: E741
        assert gemm_heuristic(H200, itemsize, rows, O, K) in gemm_settings(H200, itemsize, O, K)


def test_indices_may_be_a_part_of_wider_ones(device):
    x, weight, bias = make_linear(torch.float32, device)
    wide = random_indices(2, 40, 30, num_empty=3, device=device)
    part = wide[:, :17]
    rows = x[:, :17].contiguous()
    cache = randn(2, 40, 136, device=device)
    out, wanted = cache.clone(), cache.clone()

    gathered = triton.linear(x, weight, bias, "none", part)
    triton.linear_scatter_(out, part, rows, weight, bias, None, False)

    torch.testing.assert_close(gathered, triton.linear(x, weight, bias, "none", part.contiguous()))
    triton.linear_scatter_(wanted, part.contiguous(), rows, weight, bias, None, False)
    torch.testing.assert_close(out, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("num_rows", "out_features", "in_features", "tile"),
    [
        (416, 4608, 1152, (128, 256, 1)),
        (416, 1152, 4608, (128, 128, 2)),
        (460, 12288, 3072, (128, 256, 1)),
        (460, 3072, 12288, (128, 256, 2)),
    ],
    ids=["dit-fc1", "dit-fc2", "flux-fc1", "flux-fc2"],
)
def test_products_bound_by_the_l2_take_wide_tiles(num_rows, out_features, in_features, tile):
    setting = gemm_heuristic(H200, 2, num_rows, out_features, in_features)

    assert (setting.block_m, setting.block_n, setting.split_k) == tile


def test_no_program_of_a_split_tile_is_without_a_step():
    setting = GemmSetting(64, 64, 32, num_warps=4, num_stages=3, split_k=8)

    assert [setting.num_splits(steps) for steps in (1, 7, 8, 100)] == [1, 7, 8, 8]


def test_the_launches_of_a_capture_share_counters_of_their_own(monkeypatch):
    cpu = torch.device("cpu")
    captures = iter([7, 7, 8, None, None])
    monkeypatch.setattr(_counters, "_OF_CAPTURE", {})
    monkeypatch.setattr(_counters, "capture_under_way", lambda stream: next(captures))
    stream = type("Stream", (), {"cuda_stream": 1})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)

    first, second, other, unknown, again = (
        _counters._counters_of_capture(cpu, 10) for _ in range(5)
    )

    assert first is second
    assert len({first.data_ptr(), other.data_ptr(), unknown.data_ptr(), again.data_ptr()}) == 4
    assert not first.any()
