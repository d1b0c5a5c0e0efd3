import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tokencache_kernels import backends, settings
from tokencache_kernels.backends import native, reference
from tokencache_kernels.backends.native import loading
from tokencache_kernels.commands import info
from tokencache_kernels.errors import BackendUnavailableError
from tokencache_kernels.ops import drop_packed_weights, gather_rows
from tokencache_kernels.testing import assert_within_budget, in_float64, randn, random_indices
from tokencache_kernels.version import __version__

CPU = torch.device("cpu")
REASON = native.unavailable(CPU, torch.float32)
needs_library = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8]


@pytest.fixture(autouse=True)
def small_weights_are_packed(monkeypatch):
    """As if they were large."""
    monkeypatch.setattr(sys.modules["tokencache_kernels.backends.native.linear"], "_SMALL", 1)


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
    B, N, S, D = 3, 1031, 707, 321  # far above one thread's share, and no multiple of anything
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
    heads, table = randn(2, 4, 2, 4), randn(9, 4)
    ops = torch.ops.tokencache_kernels_native
    calls = {
        ops.gather_rows: (cache, indices),
        ops.scatter_rows_: (cache, indices, rows),
        ops.finish_heads_: (heads, indices, 9, None, None, False, 0.0, table, table),
        ops.attention_received: (heads, heads, None, 0.5, randn(2, 2, 4)),
        ops.attention: (heads, heads, heads, None, 0.5, randn(2, 4, 2, 4), *randn(2, 2, 2, 4)),
        ops.attention_entropy: (heads, heads, None, None, 0.5, randn(2, 4)),
        ops.head_norms: (heads, randn(2, 4)),
        ops.token_change: (rows, rows.clone(), True, randn(2, 4)),
    }

    for op, arguments in calls.items():
        torch.library.opcheck(op.default, arguments, test_utils="test_schema")


B, N, S, D, H, E = 2, 230, 101, 321, 3, 26  # enough for several threads


def token_numbers(B, N, K):
    """Number the vectors of the tokens, of K; some numbers are clipped."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-1, K + 1, (B, N), generator=generator, dtype=torch.int32)


# the inputs of everything that is compiled for each instruction set
VECTOR_OPS = {
    "add_branches": lambda some, wide: (
        some(B, N, D), some(B, N, D), [some(B, N, D)] * 2, [some(B, D), None],
    ),
    "gather_modulate": lambda some, wide: (
        some(B, N, D), random_indices(B, N, S, num_empty=2), some(B, D), some(B, D),
        reference.RowNorm(),
    ),
    "gather_modulate by numbers": lambda some, wide: (
        some(B, N, D), random_indices(B, N, S, num_empty=2), some(B, 3, D), some(B, D),
        reference.RowNorm("rms", some(D), some(D), 1.0, 1e-5), token_numbers(B, N, 3),
    ),
    "add_branches with norms": lambda some, wide: (
        some(B, N, D), some(B, N, D), [some(B, N, D)] * 3, [some(B, N, D), some(B, D), None],
        [reference.RowNorm("rms", some(D)), None, reference.RowNorm("rms", None, None, 0.0, 1e-3)],
    ),
    "blend": lambda some, wide: (some(B, N, D), some(B, N, D), wide(B, N).sigmoid()),
    "blend_backward": lambda some, wide: (
        some(B, N, D), some(B, N, D), some(B, N, D), wide(B, N).sigmoid(), True,
    ),
    "project_qkv_": lambda some, wide: (
        some(B, N, H, E), some(B, N, H, E), some(B, S, 8), random_indices(B, N, S, num_empty=2),
        [some(H * E, 8)] * 3, None, reference.QkNorm(some(E), some(E), kind="layer"),
        (wide(N, E), wide(N, E)), False,
    ),
    "attention_with_entropy": lambda some, wide: (
        some(B, S, H, E), some(B, N, H, E), some(B, N, H, E), None, 0.3, False,
    ),
    "attention_received": lambda some, wide: (some(B, S, H, E), some(B, N, H, E), None, 0.3),
    "attention_entropy": lambda some, wide: (some(B, N, H, E), some(B, S, H, E), None, 0.3),
    "head_norms": lambda some, wide: (some(B, N, H, E),),
    "token_change": lambda some, wide: (some(B, N, D), some(B, N, D), "cosine"),
}  # fmt: skip


def make_vector_inputs(op, dtype):
    seeds = iter(range(10))

    def some(*shape, dtype=dtype):
        return randn(*shape, dtype=dtype, seed=next(seeds))

    wide = torch.promote_types(dtype, torch.float32)
    return VECTOR_OPS[op](some, partial(some, dtype=wide))


def widen(value):
    """The same in float64."""
    if isinstance(value, reference.QkNorm | reference.RowNorm):
        return value._replace(**{k: widen(v) for k, v in value._asdict().items()})
    if isinstance(value, list | tuple):
        return type(value)(map(widen, value))
    return in_float64(value)[0]


def outputs_of(backend, op, inputs):
    """Return the results of the op, and its written tensors."""
    inputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    op = op.split()[0]
    returned = getattr(backend, op)(*inputs)
    written = {"add_branches": 1, "project_qkv_": 2}.get(op, 0)
    given = returned if isinstance(returned, tuple) else (returned,) * (returned is not None)
    return [*given, *inputs[:written]]


@pytest.fixture
def keeps_instructions():
    before = native.cpu_instructions()
    yield
    loading.OPS.use_cpu_instructions(before)


@pytest.fixture(params=settings.CPU_INSTRUCTIONS)
def instructions(request, keeps_instructions):
    if not loading.OPS.use_cpu_instructions(request.param):
        pytest.skip(f"this processor lacks {request.param}")


@needs_library
@pytest.mark.parametrize("dtype", DTYPES[1:4], ids=str)
@pytest.mark.parametrize("op", VECTOR_OPS)
def test_every_instruction_set_is_as_exact_as_eager(instructions, op, dtype):
    inputs = make_vector_inputs(op, dtype)

    outputs = outputs_of(native, op, inputs)

    exact = outputs_of(reference, op, widen(inputs))
    rounded = outputs_of(reference, op, inputs)
    for out, exactly, roughly in zip(outputs, exact, rounded, strict=True):
        assert_within_budget(out, exactly, roughly)


@needs_library
@pytest.mark.parametrize("op", VECTOR_OPS)
def test_float64_is_worked_in_as_such(instructions, op):
    inputs = make_vector_inputs(op, torch.float64)

    outputs = outputs_of(native, op, inputs)

    torch.testing.assert_close(outputs, outputs_of(reference, op, inputs), rtol=1e-12, atol=1e-13)


@needs_library
@pytest.mark.parametrize("op", VECTOR_OPS)
def test_the_number_of_threads_changes_no_bit(four_threads, op):
    inputs = make_vector_inputs(op, torch.float32)

    by_four = outputs_of(native, op, inputs)
    torch.set_num_threads(1)
    by_one = outputs_of(native, op, inputs)

    torch.testing.assert_close(by_four, by_one, rtol=0, atol=0)


@needs_library
@pytest.mark.parametrize(
    ("dtype", "lowest", "highest"), [(torch.float32, -87, 88), (torch.float64, -708, 709)], ids=str
)
def test_the_exponential_is_within_two_roundings(instructions, dtype, lowest, highest):
    """A single query of 1 gives each key e to the power of it."""
    x = torch.linspace(lowest, highest, 40_001, dtype=dtype)
    beyond = torch.tensor([-1e30, 1e30, torch.nan, -torch.inf], dtype=dtype)
    one, zero = torch.ones(1, 1, 1, 1, dtype=dtype), torch.zeros(1, 1, 1, dtype=dtype)

    out, limits = (
        native.attention_received(one, key[None, :, None, None], zero, 1.0)[0, 0]
        for key in (x, beyond)
    )

    wanted = x.double().exp()
    assert ((out - wanted) / wanted).abs().max() < 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(limits, beyond.exp(), rtol=0, atol=0, equal_nan=True)


@needs_library
def test_the_instructions_are_those_asked_for(monkeypatch, keeps_instructions):
    monkeypatch.setenv("TOKENCACHE_CPU_INSTRUCTIONS", "portable")

    reason = loading.load_library.__wrapped__()

    assert reason is None
    assert native.cpu_instructions() == "portable"
    assert info.describe_native_library()["instructions in use"] == "portable"


@needs_library
def test_instructions_that_the_processor_lacks_are_named_as_the_reason(monkeypatch):
    lacks_all = SimpleNamespace(use_cpu_instructions=lambda name: False)
    monkeypatch.setenv("TOKENCACHE_CPU_INSTRUCTIONS", "avx512")
    monkeypatch.setattr(loading, "OPS", lacks_all)

    reason = loading.load_library.__wrapped__()

    assert reason == (
        "TOKENCACHE_CPU_INSTRUCTIONS must name instructions that this processor has, got 'avx512'"
    )


@needs_library
def test_unknown_instructions_are_refused(monkeypatch):
    assert not loading.OPS.use_cpu_instructions("avx1024")

    monkeypatch.setenv("TOKENCACHE_CPU_INSTRUCTIONS", "avx1024")
    with pytest.raises(ValueError, match=r"INSTRUCTIONS must be one of portable, .*'avx1024'"):
        loading.load_library.__wrapped__()


@needs_library
def test_auto_on_the_cpu_takes_the_native_library(monkeypatch):
    monkeypatch.delenv("TOKENCACHE_BACKEND", raising=False)

    assert backends.resolve("gather_rows", CPU, torch.float32) is native.gather_rows


@needs_library
def test_a_missing_cuda_half_is_named_as_the_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "load_library", lambda: None)
    monkeypatch.setenv("TOKENCACHE_NATIVE_LIBRARY", str(tmp_path / "native.so"))
    monkeypatch.setattr(native, "load_cuda_library", loading.load_cuda_library.__wrapped__)

    monkeypatch.setattr(loading, "build_info", lambda: {"without_cuda": "there is no toolkit"})

    reason = native.unavailable(torch.device("cuda"), torch.float32)

    assert reason == "its CUDA half was not built (there is no toolkit)"


@needs_library
def test_the_cuda_half_loads_without_a_gpu_and_adds_its_kernels():
    reason = loading.load_cuda_library()
    if reason is not None:
        pytest.skip(reason)

    for name in (
        "gather_rows", "scatter_rows_", "add_branches", "gather_modulate", "row_pass", "blend",
        "blend_backward", "linear", "linear_scatter_", "finish_heads_", "attention",
        "attention_received", "attention_entropy", "head_norms", "token_change", "select_tokens_",
        "invert_indices",
    ):  # fmt: skip
        op = f"tokencache_kernels_native::{name}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA")


@pytest.mark.parametrize(
    ("driver", "capability", "reason"),
    [
        (13000, (8, 0), None),
        (13020, (8, 9), None),  # machine code of the same generation
        (13000, (9, 0), None),
        (13000, (12, 1), None),  # intermediate code
        (12080, (8, 0), "its CUDA half was built with CUDA 13.0, and the driver is for 12"),
        (
            13000,
            (7, 5),
            "its CUDA half was built for 80-real, 90a-real, 120, and this GPU is sm_75",
        ),
        (13000, (10, 0), "its CUDA half was built for .*, and this GPU is sm_100"),
    ],
)
def test_a_gpu_that_the_cuda_half_was_not_built_for_is_named_as_the_reason(
    monkeypatch, driver, capability, reason
):
    facts = {"cuda": "13.0", "cuda_architectures": "80-real 90a-real 120"}
    monkeypatch.setattr(loading, "build_info", lambda: facts)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    for name in ("load_library", "load_cuda_library"):
        monkeypatch.setattr(native, name, lambda: None)
    monkeypatch.setattr(native, "refuse_gpu", loading.refuse_gpu.__wrapped__)

    if reason is None:
        backends.resolve("gather_rows", torch.device("cuda"), torch.float32, "native")
    else:
        with pytest.raises(BackendUnavailableError, match=f"'native' cannot run here: {reason}"):
            backends.resolve("gather_rows", torch.device("cuda"), torch.float32, "native")
        assert info.describe_native_library()["CUDA state"].startswith("not usable: its CUDA half")


@pytest.mark.parametrize(
    ("cuda", "reason"),
    [(None, "this torch was built without CUDA"), ("13.0", "torch sees no CUDA")],
)
def test_a_missing_cuda_runtime_is_named_as_the_reason(monkeypatch, cuda, reason):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("load_library", "load_cuda_library"):
        monkeypatch.setattr(native, name, lambda: None)
    monkeypatch.setattr(native, "refuse_gpu", loading.refuse_gpu.__wrapped__)

    with pytest.raises(BackendUnavailableError, match=f"'native' cannot run here: .*{reason}"):
        backends.resolve("gather_rows", torch.device("cuda"), torch.float32, "native")
    assert reason in info.describe_native_library()["CUDA state"]


def test_float64_on_a_gpu_is_left_to_the_reference():
    reason = native.unavailable(torch.device("cuda"), torch.float64)

    assert reason == "its CUDA half computes in float32 and does not take float64"


def test_a_library_that_was_not_built_is_named_as_the_reason(monkeypatch, tmp_path, caplog):
    monkeypatch.delenv("TOKENCACHE_NATIVE_LIBRARY", raising=False)
    monkeypatch.setattr(loading, "_PACKAGE", tmp_path)
    monkeypatch.setattr(native, "load_library", loading.load_library.__wrapped__)

    with pytest.raises(BackendUnavailableError, match=r"gather_rows: .*'native'.* was not built"):
        gather_rows(randn(1, 3, 4), random_indices(1, 3, 2), backend="native")
    assert "was not built" in caplog.text  # also said where auto takes another backend
    (tmp_path / "without_native.txt").write_text("there was no C++ compiler\n")
    reason = loading.load_library.__wrapped__()
    assert reason.startswith("the native library was not built: there was no C++ compiler (pip ")


def test_a_library_path_that_does_not_fit_is_named_as_the_reason(monkeypatch, tmp_path):
    not_a_library = tmp_path / "native.so"
    not_a_library.write_text("text")
    load = loading.load_library.__wrapped__

    monkeypatch.setenv("TOKENCACHE_NATIVE_LIBRARY", str(tmp_path / "missing.so"))
    missing = load()
    monkeypatch.setenv("TOKENCACHE_NATIVE_LIBRARY", str(not_a_library))
    broken = load()

    assert missing.startswith("TOKENCACHE_NATIVE_LIBRARY must name a file, got ")
    assert broken.startswith("the native library does not load (")


def test_build_info_is_of_this_version():
    facts = native.build_info()

    assert facts["version"] == __version__
    assert all(facts.values())
    assert ("cuda" in facts) == (loading.cuda_library_path().is_file())
    assert ("without_cuda" in facts) == ("cuda" not in facts)


@needs_library
def test_float16_is_rounded_alike_by_every_instruction_set(instructions):
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    others = halves[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    products, copies = torch.empty(2, 1, 1, 2**16, dtype=torch.float16)
    zeros = torch.zeros_like(copies)

    native.add_branches(copies, halves[None, None], [], [])
    native.add_branches(products, zeros, [halves[None, None]], [others[None]])

    torch.testing.assert_close(copies[0, 0], halves, rtol=0, atol=0, equal_nan=True)
    exact = (halves.float() * others.float()).half()
    torch.testing.assert_close(products[0, 0], exact, rtol=0, atol=0, equal_nan=True)


def packed_parts():
    """The packed copies that are kept, of all weights."""
    weights = sys.modules[native.linear.__module__]._weights
    return [part for parts in weights._parts_of.values() for part in parts.values()]


@pytest.fixture
def no_packed_weights():
    drop_packed_weights()
    yield
    drop_packed_weights()


def fused_step(optimizer, parameter):
    parameter.grad = torch.ones_like(parameter)
    optimizer([parameter], lr=0.5, fused=True).step()


def merge_as_an_adapter(parameter):
    parameter.data = parameter.data + 0.5


def keep_an_average(parameter):
    parameter.data.copy_(2 * parameter.detach().clone())


def write_a_vector(parameter):
    nn.utils.vector_to_parameters(torch.ones(parameter.numel()), [parameter])


def write_as_numpy(parameter):
    parameter.detach().numpy()[:] = 1


def write_to_the_storage(parameter):
    other = torch.full_like(parameter, 0.5)
    parameter.untyped_storage().copy_(other.untyped_storage())


def swap(parameter):
    torch.utils.swap_tensors(parameter, nn.Parameter(torch.ones_like(parameter)))


def resize(parameter):
    size = parameter.untyped_storage().nbytes()
    parameter.untyped_storage().resize_(0)
    parameter.untyped_storage().resize_(size)
    parameter.data.fill_(0.5)


def write_a_slice(parameter):
    parameter.data[17:20] = 4


WRITERS = {
    "in place": lambda parameter: parameter.mul_(2),
    "by a view": lambda parameter: parameter[3:7].mul_(2),
    **{
        f"fused {optimizer.__name__}": partial(fused_step, optimizer)
        for optimizer in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad)
    },
    **{
        writer.__name__: writer
        for writer in (
            merge_as_an_adapter, keep_an_average, write_a_vector, write_as_numpy,
            write_to_the_storage, swap, resize, write_a_slice,
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("writer", WRITERS)
@torch.no_grad()
def test_a_packed_weight_follows_every_write_to_it(writer, no_packed_weights):
    parameter, x = nn.Parameter(randn(48, 32, seed=1)), randn(1, 7, 32)
    before = native.linear(x, parameter, None, "none", None)

    WRITERS[writer](parameter)

    out = native.linear(x, parameter, None, "none", None)
    torch.testing.assert_close(out, x @ parameter.T)
    assert not torch.equal(out, before)


@torch.no_grad()
def test_a_write_that_only_a_full_comparison_shows_is_seen_within_as_many_uses_as_pieces(
    no_packed_weights,
):
    weight, x = randn(192, 128, seed=1), randn(1, 7, 128)
    native.linear(x, weight, None, "none", None)

    weight.numpy()[101, 77] = 100
    # no sample of these lies there
    assert not (sys.modules[native.linear.__module__]._sample(weight) == 100).any()
    for _ in range(64):
        out = native.linear(x, weight, None, "none", None)

    torch.testing.assert_close(out, x @ weight.T)


@torch.no_grad()
def test_a_module_that_changes_its_dtype_is_packed_anew(no_packed_weights):
    layer, x = nn.Linear(32, 48), randn(1, 7, 32)
    for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.float16):
        layer.to(dtype)
        out = native.linear(x.to(dtype), layer.weight, layer.bias, "none", None)
        torch.testing.assert_close(out, layer(x.to(dtype)))

    assert len(packed_parts()) <= 1


def test_a_module_whose_weights_are_packed_can_be_swapped(no_packed_weights):
    layer = nn.Linear(32, 48)
    with torch.no_grad():
        native.linear(randn(1, 7, 32), layer.weight, layer.bias, "none", None)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)

    assert layer.weight.dtype == torch.float64
    assert packed_parts() == []


@torch.no_grad()
def test_packed_parts_of_a_weight_never_take_more_memory_than_it(no_packed_weights):
    weight, x = randn(96, 32), randn(1, 7, 32)
    for first in range(90):
        out = native.linear(x, weight[first:], None, "none", None)
        torch.testing.assert_close(out, x @ weight[first:].T)
    assert len(packed_parts()) == 1

    for part in weight.split(32):
        native.linear(x, part, None, "none", None)

    assert len(packed_parts()) == 3


@torch.no_grad()
def test_packed_weights_go_with_their_owner(no_packed_weights):
    weight = randn(48, 32)
    view = weight[3:]
    native.linear(randn(1, 7, 32), view, None, "none", None)
    del weight
    assert len(packed_parts()) == 1

    del view

    assert packed_parts() == []


@torch.no_grad()
def test_packed_weights_are_dropped_on_demand(no_packed_weights):
    layers = nn.Linear(32, 48), nn.Linear(32, 48)
    for layer in layers:
        native.linear(randn(1, 7, 32), layer.weight, layer.bias, "none", None)
    assert len(packed_parts()) == 2

    drop_packed_weights(layers[0])
    assert len(packed_parts()) == 1

    drop_packed_weights()
    assert packed_parts() == []


# of the flags' own context manager, where torch has no Intel GPU
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("way", ["setting", "flags"])
def test_no_weight_is_packed_where_that_is_turned_off(way, monkeypatch, no_packed_weights):
    weight, x = randn(48, 32), randn(1, 7, 32)
    if way == "setting":
        monkeypatch.setenv("TOKENCACHE_PACK_WEIGHTS", "0")
    with torch.backends.mkldnn.flags(enabled=way != "flags"):
        out = native.linear(x, weight, None, "none", None)

    torch.testing.assert_close(out, x @ weight.T)
    assert packed_parts() == []
