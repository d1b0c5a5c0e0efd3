"""Every op of a file, on every backend that can run here and beside its baselines."""

import itertools

import pytest
import torch

from tokencache_kernels import backends, info

from .cases import LEADING, OPS, bind
from .timing import make_clock

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
# a CPU is here to see that everything runs, and to compare its own backends
SHAPES = LEADING if ON_GPU else [shape.shrink(8) for shape in LEADING]
BACKENDS = ("reference", "native", "triton")


def pytest_generate_tests(metafunc):
    cases = [
        pytest.param(op, shape, name, marks=marks, id=f"{op.name}-{shape.name}-{name}")
        for op in map(OPS.get, metafunc.module.TIMED)
        for shape in filter(op.fits, SHAPES)
        for name, marks in list_contenders(op)
    ]
    metafunc.parametrize(("op", "shape", "contender"), cases)


def list_contenders(op):
    """The baselines and the backends, these with a mark if they cannot run here."""
    for name in op.baselines:
        yield name, ()
    for name in BACKENDS:
        reason = backends.unavailable(name, op.name, DEVICE, DTYPE)
        yield name, pytest.mark.skip(f"{name}: {reason}") if reason else ()


def pytest_collection_modifyitems(items):
    clock = make_clock(DEVICE)
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=clock))


@pytest.fixture
def timed(benchmark, op, shape, contender):
    """Time one call, on sets of inputs in rotation."""
    if contender in BACKENDS:
        function, options = op.ours, {"backend": contender}
    else:
        function, options = op.baselines[contender], {}
    num_sets = op.num_sets(shape, DTYPE) if ON_GPU else 2
    calls = [
        bind(function, op.make_inputs(shape, DTYPE, DEVICE, seed), **options)
        for seed in range(num_sets)
    ]
    benchmark.group = f"{op.name} {shape.name}"
    benchmark.extra_info.update(
        contender=contender,
        dtype=str(DTYPE),
        bytes=op.count_bytes(shape, DTYPE.itemsize),
        flops=op.count_flops(shape),
        **info.machine_facts(DEVICE),
    )
    rotation = itertools.cycle(calls)

    return lambda: benchmark.pedantic(
        lambda: next(rotation)(), rounds=30, iterations=num_sets, warmup_rounds=1
    )
