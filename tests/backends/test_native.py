import sys

import pytest
import torch

from tokencache_kernels import backends
from tokencache_kernels.backends import native, reference
from tokencache_kernels.backends.native import library
from tokencache_kernels.errors import BackendUnavailableError
from tokencache_kernels.ops import gather_rows
from tokencache_kernels.testing import randn, random_indices
from tokencache_kernels.version import __version__

CPU = torch.device("cpu")
REASON = native.unavailable(CPU, torch.float32)
needs_library = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8]


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def make_rows(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, generator=generator).to(dtype)


def scatter_in_order(cache, indices, rows):
    """The meaning, written as loops: of a token's slots the last one stays."""
    out = cache.clone()
    for b, row in enumerate(indices.tolist()):
        for s, token in enumerate(row):
            if 0 <= token < cache.shape[1]:
                out[b, token] = rows[b, s]
    return out


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_move_the_same_rows_as_the_reference(four_threads, dtype):
    B, N, S, D = 3, 1031, 707, 321  # far above what one thread takes, and no multiple of anything
    hidden_states = make_rows(B, N, D, dtype=dtype)
    rows = make_rows(B, S, D, dtype=dtype, seed=1)
    indices = random_indices(B, N, S, num_empty=5)
    wanted = hidden_states.clone()
    reference.scatter_rows_(wanted, indices, rows)

    out = native.gather_rows(hidden_states, indices)
    cache = hidden_states.clone()
    native.scatter_rows_(cache, indices, rows)

    assert torch.equal(out, reference.gather_rows(hidden_states, indices))
    assert torch.equal(cache, wanted)


@needs_library
def test_wild_and_repeated_indices_touch_only_their_rows(four_threads):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        B, N, S, D = (int(n) for n in torch.randint(1, 60, (4,), generator=generator))
        canvas = randn(B + 1, N + 2, 3, D + 4)
        cache = canvas[1:, 1:-1, 1, 2:-2]
        slots = torch.randint(-(2**31), 2**31, (B, S), generator=generator)
        near = torch.randint(-2, N + 2, (B, S), generator=generator)
        wide = torch.stack([torch.where(near % 3 == 0, slots, near).int()] * 2, dim=1)
        indices = wide[:, 1]  # rows of indices that do not lie next to each other
        rows = randn(S, B, D).transpose(0, 1)
        before, wanted = canvas.clone(), canvas.clone()
        wanted[1:, 1:-1, 1, 2:-2] = scatter_in_order(cache, indices, rows)

        out = native.gather_rows(cache, indices)
        native.scatter_rows_(cache, indices, rows)

        assert torch.equal(out, reference.gather_rows(before[1:, 1:-1, 1, 2:-2], indices))
        assert torch.equal(canvas, wanted)


@needs_library
def test_of_a_repeated_token_one_whole_row_stays(four_threads):
    cache = torch.zeros(1, 4, 65_536)
    rows = torch.arange(1.0, 5.0)[None, :, None].expand(1, 4, 65_536).contiguous()
    indices = torch.full((1, 4), 2, dtype=torch.int32)

    for _ in range(10):
        native.scatter_rows_(cache, indices, rows)

        assert torch.equal(cache[0].unique(), torch.tensor([0.0, 4.0]))
        assert (cache[0, 2] == 4.0).all()


@needs_library
def test_the_schemas_tell_what_is_written():
    cache, rows = randn(2, 9, 8), randn(2, 4, 8)
    indices = random_indices(2, 9, 4)
    ops = torch.ops.tokencache_kernels_native

    torch.library.opcheck(ops.gather_rows.default, (cache, indices), test_utils="test_schema")
    torch.library.opcheck(
        ops.scatter_rows_.default, (cache, indices, rows), test_utils="test_schema"
    )


@needs_library
def test_auto_on_the_cpu_takes_the_native_library(monkeypatch):
    monkeypatch.delenv("TOKENCACHE_BACKEND", raising=False)

    assert backends.resolve("gather_rows", CPU, torch.float32) is native.gather_rows


@needs_library
def test_a_missing_cuda_half_is_named_as_the_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "load_library", lambda: None)
    monkeypatch.setenv("TOKENCACHE_NATIVE_LIBRARY", str(tmp_path / "native.so"))
    monkeypatch.setattr(native, "load_cuda_library", library.load_cuda_library.__wrapped__)

    reason = native.unavailable(torch.device("cuda"), torch.float32)

    assert reason.startswith("its CUDA half was not built (")


@needs_library
def test_the_cuda_half_loads_without_a_gpu_and_adds_its_kernels():
    reason = native.unavailable(torch.device("cuda"), torch.float32)
    if reason is not None:
        pytest.skip(reason)

    for name in ("gather_rows", "scatter_rows_", "blend", "blend_backward"):
        op = f"tokencache_kernels_native::{name}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA")


def test_float64_on_a_gpu_is_left_to_the_reference():
    reason = native.unavailable(torch.device("cuda"), torch.float64)

    assert reason == "its CUDA half computes in float32 and does not take float64"


def test_a_library_that_was_not_built_is_named_as_the_reason(monkeypatch, tmp_path):
    monkeypatch.delenv("TOKENCACHE_NATIVE_LIBRARY", raising=False)
    monkeypatch.setattr(library, "_PACKAGE", tmp_path)
    monkeypatch.setattr(native, "load_library", library.load_library.__wrapped__)

    with pytest.raises(BackendUnavailableError, match=r"gather_rows: .*'native'.* was not built"):
        gather_rows(randn(1, 3, 4), random_indices(1, 3, 2), backend="native")


def test_a_library_path_that_does_not_fit_is_named_as_the_reason(monkeypatch, tmp_path):
    not_a_library = tmp_path / "native.so"
    not_a_library.write_text("text")
    load = library.load_library.__wrapped__

    monkeypatch.setenv("TOKENCACHE_NATIVE_LIBRARY", str(tmp_path / "missing.so"))
    missing = load()
    monkeypatch.setenv("TOKENCACHE_NATIVE_LIBRARY", str(not_a_library))
    broken = load()

    assert missing.startswith("TOKENCACHE_NATIVE_LIBRARY must name a file, got ")
    assert broken.startswith("the native library does not load (")


def test_build_info_is_of_this_version():
    facts = native.build_info()
    if facts is None:
        pytest.skip("the build-info module is not installed")

    assert facts["version"] == __version__
    assert all(facts.values())


def test_a_packed_weight_follows_every_write_to_it():
    weight, x = randn(48, 32, seed=1), randn(1, 7, 32)
    first = native.linear(x, weight, None, "none", None)
    assert torch.equal(native.linear(x, weight, None, "none", None), first)
    torch.testing.assert_close(first, x @ weight.T)

    weight[:24] *= 2
    out = native.linear(x, weight, None, "none", None)
    part = native.linear(x, weight[8:24], None, "none", None)

    torch.testing.assert_close(out, x @ weight.T)
    torch.testing.assert_close(part, x @ weight[8:24].T)


def test_packed_weights_go_with_their_owner():
    weight = randn(48, 32)
    native.linear(randn(1, 7, 32), weight, None, "none", None)
    packed = sys.modules[native.linear.__module__]._weights._views_of
    before = len(packed)

    del weight

    assert len(packed) == before - 1


def test_no_weight_is_packed_where_that_is_turned_off(monkeypatch):
    monkeypatch.setenv("TOKENCACHE_PACK_WEIGHTS", "0")
    weight = randn(48, 32)
    native.linear(randn(1, 7, 32), weight, None, "none", None)

    assert weight not in sys.modules[native.linear.__module__]._weights._views_of
