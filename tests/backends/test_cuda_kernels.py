"""The sources of csrc/cuda, compiled for the CPU, in the tests of the ops (tests/cuda_emulator)."""

import ctypes
import fcntl
import hashlib
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tokencache_kernels import ops
from tokencache_kernels.backends import native
from tokencache_kernels.testing import randn

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "tests" / "cuda_emulator"
FAMILIES = ("rows", "select", "modulate", "blend", "linear", "mlp", "project", "attention",
            "statistics")  # fmt: skip
NAMESPACE = "tokencache_kernels_emulated"


def find_cuda_headers():
    """The folder of the toolkit's headers, or None."""
    nvcc = shutil.which("nvcc")
    roots = [Path(nvcc).resolve().parents[1]] if nvcc else []
    roots.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")))
    return next((r / "include" for r in roots if (r / "include/cuda_runtime.h").is_file()), None)


def compile_for_cpu(compiler, headers, folder):
    """csrc/cuda, the CUDA half of csrc/api and some faulty kernels in one library."""
    torch_root = Path(torch.__file__).parent
    kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    api = folder / "api.cpp"
    # one file of all: torch's headers are read once
    api.write_text("".join(f'#include "api/{source.stem}.cpp"\n' for source in kernels))
    flags = [
        "-std=c++20", "-O1", "-fPIC", "-Wno-unknown-pragmas", f"-I{EMULATOR}", f"-I{ROOT}/csrc",
        f"-I{headers}", *os.environ.get("CXXFLAGS", "").split(),
    ]  # fmt: skip
    as_cuda = [
        "-x", "c++", "-include", EMULATOR / "emulator.h", "-ffp-contract=off",
        "-fsanitize=undefined",
    ]  # fmt: skip
    as_torch = [
        "-DTOKENCACHE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-Dtokencache_kernels_native={NAMESPACE}", "-isystem", torch_root / "include",
    ]  # fmt: skip
    jobs = {api: as_torch, EMULATOR / "emulator.cpp": []}
    jobs |= dict.fromkeys([*kernels, EMULATOR / "faults.cu"], as_cuda)

    def compile_one(source):
        target = folder / f"{source.name}.o"
        run(compiler, *flags, *jobs[source], "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs))
    run(
        compiler, *flags, "-fsanitize=undefined", "-shared", "-Wl,-Bsymbolic", *objects,
        f"-L{torch_root}/lib", "-ltorch_cpu", "-o", folder / "linked.so",
    )  # fmt: skip
    return folder / "linked.so"


def run(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory):
    """Compiled once for all processes of a session, and for the next ones if nothing changes."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    headers = find_cuda_headers()
    if compiler is None or headers is None or sys.platform != "linux":
        pytest.skip("it needs Linux, g++ and the headers of a CUDA toolkit")
    sources = sorted([*(ROOT / "csrc").rglob("*.*"), *EMULATOR.rglob("*.*"), Path(__file__)])
    digest = hashlib.sha256(torch.__version__.encode() + os.environ.get("CXXFLAGS", "").encode())
    for source in sources:
        digest.update(source.read_bytes())
    folder = tmp_path_factory.getbasetemp().parent / f"cuda-emulator-{digest.hexdigest()[:16]}"
    folder.mkdir(exist_ok=True)
    library = folder / "libemulated.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():
            with tempfile.TemporaryDirectory(dir=folder) as objects:
                compile_for_cpu(compiler, headers, Path(objects)).rename(library)
    return library


def read_schemas():
    """The definitions in csrc/api."""
    for source in (ROOT / "csrc" / "api").glob("*.cpp"):
        for words in re.findall(r'm\.def\(((?:\s*"[^"]*")+)\)', source.read_text()):
            yield "".join(re.findall(r'"([^"]*)"', words))


@pytest.fixture(scope="session")
def emulated_ops(emulated_library):
    """The ops of the native library, under another name, with the kernels as the CPU's."""
    with torch.library._scoped_library(NAMESPACE, "DEF") as library:
        for schema in read_schemas():
            library.define(schema)
        torch.ops.load_library(emulated_library)
        yield getattr(torch.ops, NAMESPACE)


@pytest.fixture
def device():
    """Return the device of the emulated kernels, the CPU also beside a GPU."""
    return "cpu"


@pytest.fixture
def backend(emulated_ops, monkeypatch, capfd):
    """The native backend as it is on a GPU; nothing undefined may have been done in it."""
    for name, module in list(sys.modules.items()):
        if name.startswith(native.__name__) and hasattr(module, "OPS"):
            monkeypatch.setattr(module, "OPS", emulated_ops)
    linear = sys.modules[f"{native.__name__}.linear"]
    monkeypatch.setattr(linear, "_has_kernel", lambda x: True)
    monkeypatch.setattr(native, "unavailable", lambda device, dtype: None)
    yield "native"
    assert "runtime error" not in capfd.readouterr().err


def find_tests(family):
    """The tests of one family's ops that run on any backend."""
    path = ROOT / "tests" / "ops" / f"test_{family}.py"
    spec = importlib.util.spec_from_file_location(f"emulated_{family}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, test in vars(module).items():
        if name.startswith("test_") and "backend" in inspect.signature(test).parameters:
            yield f"test_{family}_{name.removeprefix('test_')}", test


for _family in FAMILIES:
    globals().update(find_tests(_family))


@pytest.mark.parametrize(
    ("kernel", "blocks", "shared_bytes", "reason"),
    [
        ("is well", 1, 256, None),
        ("is well", 0, 256, "a launch that no GPU takes"),
        ("is well", 1, 1 << 20, "a launch that no GPU takes"),
        ("writes too far", 1, 256, "a block wrote behind its shared memory"),
        ("has variables of its own", 1, 48 << 10, None),
        ("has variables of its own", 1, 99 << 10, "a block has less shared memory than the launch"),
        ("waits at two barriers", 1, 0, "threads of a block wait at different barriers"),
        ("ends before a barrier", 1, 0, "a thread ended where others wait for it"),
        ("leaves a lane out", 1, 0, "the lanes of a warp do not do the same together"),
        ("waits in a branch", 1, 0, "the lanes of a warp do not do the same together"),
        ("forgets its copies", 1, 256, "a thread ended before its copies"),
        ("copies from between", 1, 256, "a copy must begin at 16 bytes"),
    ],
)
def test_the_emulator_sees_what_is_wrong_with_a_kernel(
    emulated_library, kernel, blocks, shared_bytes, reason
):
    run_kernel = ctypes.CDLL(emulated_library).run_kernel
    run_kernel.restype = ctypes.c_char_p
    out = torch.zeros(64)

    found = run_kernel(kernel.encode(), ctypes.c_void_p(out.data_ptr()), blocks, shared_bytes, True)

    assert (found or b"").decode().startswith(reason or "")
    assert (found is None) == (reason is None)


def test_the_emulator_counts_the_memory_that_a_launch_does_not_ask_for(emulated_library):
    run_kernel = ctypes.CDLL(emulated_library).run_kernel
    run_kernel.restype = ctypes.c_char_p
    out = torch.zeros(64)

    def launch(shared_bytes):
        return run_kernel(
            b"does not ask for them", ctypes.c_void_p(out.data_ptr()), 1, shared_bytes, False
        )

    assert launch((48 << 10) - 256) is None
    assert launch((48 << 10) - 252).startswith(b"a block has less shared memory than the launch")


@pytest.mark.parametrize(
    "kernel",
    ["reads too early", "reads before its copies", "forgets to meet", "overwrites too early"],
)
def test_what_is_read_too_early_is_nan(emulated_library, kernel):
    out = torch.zeros(64)

    ctypes.CDLL(emulated_library).run_kernel(
        kernel.encode(), ctypes.c_void_p(out.data_ptr()), 1, 256, True
    )

    assert out.isnan().any()


@pytest.mark.parametrize(
    "options",
    [{}, {"normalize": False, "staleness_weight": 0.5, "grid": (85, 107), "tile": 3, "bonus": 0.4}],
    ids=["plain", "all-options"],
)
def test_the_parts_of_a_long_row_select_as_the_reference_does(backend, options):
    L, B, N, S = 2, 1, 85 * 107, 700
    scores = (20 * randn(L, B, N)).round()  # the threshold lies amid ties, in several parts
    scores[0, :, ::7] = torch.nan
    staleness = torch.randint(5, (L, B, N), generator=torch.Generator().manual_seed(0)).int()
    num_fresh = torch.tensor([[700, 0], [31, 699]], dtype=torch.int32)
    expected_staleness = staleness.clone()
    expected = ops.select_cycle_(
        scores, expected_staleness, num_fresh, S, backend="reference", **options
    )

    selected = ops.select_cycle_(scores, staleness, num_fresh, S, backend=backend, **options)

    torch.testing.assert_close(selected, expected, rtol=0, atol=0)
    torch.testing.assert_close(staleness, expected_staleness, rtol=0, atol=0)


def test_more_branches_than_a_launch_takes_are_added_by_several(backend):
    x, branch = randn(1, 3, 16), randn(1, 3, 16, seed=1)
    gates = [None if j % 2 else randn(1, 16, seed=j) for j in range(70)]
    norms = [ops.RowNorm("rms") if j % 3 else None for j in range(70)]

    out = ops.add_branches(x, [branch] * 70, gates, branch_norms=norms, backend=backend)

    wanted = ops.add_branches(
        x.double(), [branch.double()] * 70,
        [None if gate is None else gate.double() for gate in gates],
        branch_norms=norms, backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-4)
