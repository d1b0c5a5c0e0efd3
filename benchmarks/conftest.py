"""The cases of ``cases`` as pytest-benchmark's: one test a contender, timed by the device."""

from functools import partial

import pytest
import torch

from tokencache_kernels.commands import info

from .cases import CPU_SHAPES, LEADING, OPS
from .kernels import check_result, list_ways, name_dtype, prepare_run
from .timing import make_clock

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
# a CPU is here to see that everything runs, and to compare its own backends
SHAPES = LEADING if ON_GPU else [shape.shrink(4) for shape in CPU_SHAPES[:1]]
ROUNDS = 30


class Clock:
    """The device's clock, slowed down so that a run of many calls seems to take as long as one."""

    def __init__(self):
        self.seconds = make_clock(DEVICE)
        self.calls = 1

    def __call__(self):
        return self.seconds() / self.calls


def pytest_generate_tests(metafunc):
    cases = [
        pytest.param(op, shape, way, mode, id=f"{op.name}-{shape.name}-{way.name}-{mode}")
        for op in OPS.values()
        for shape in filter(op.fits, SHAPES)
        for way in list_ways(op, DTYPE, DEVICE, with_compiled=ON_GPU)
        for mode in way.modes
    ]
    metafunc.parametrize(("op", "shape", "way", "mode"), cases)


def pytest_collection_modifyitems(items):
    clock = Clock()
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=clock))
        # by a library that refuses the problem, which is skipped
        item.add_marker(pytest.mark.filterwarnings("ignore:Benchmark fixture was not used"))


@pytest.fixture
def timed(request, benchmark, op, shape, way, mode):
    """Time one call, on sets of inputs in rotation."""
    make_inputs = partial(op.make_inputs, shape, DTYPE, DEVICE)
    try:
        if way.is_comparable:
            check_result(way, op, make_inputs)
    except NotImplementedError as refusal:
        pytest.skip(f"{way.name}: {refusal}")
    sets = [make_inputs(seed) for seed in range(op.num_sets(shape, DTYPE) if ON_GPU else 2)]
    run = prepare_run([way.bind(inputs) for inputs in sets], mode)
    benchmark.group = f"{op.name} {shape.name}"
    benchmark.extra_info.update(
        backend=way.name,
        mode=mode,
        baseline=way.is_baseline,
        dtype=name_dtype(DTYPE),
        bytes=op.count_bytes(shape, DTYPE.itemsize),
        flops=op.count_flops(shape),
        input_sets=len(sets),
        **info.machine_facts(DEVICE),
    )
    request.node.get_closest_marker("benchmark").kwargs["timer"].calls = len(sets)
    yield lambda: benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)
    del sets
