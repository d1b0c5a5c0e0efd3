"""The sources of csrc/cuda, compiled for the CPU, in the tests of the ops (tests/cuda_emulator)."""

import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tokencache_kernels.backends import native

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


def build_emulated_library(compiler, headers, folder):
    """Compile csrc/cuda and the CUDA half of csrc/api for the CPU."""
    torch_root = Path(torch.__file__).parent
    api = folder / "api.cpp"
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    # one file of all: torch's headers are read once
    api.write_text("".join(f'#include "api/{source.stem}.cpp"\n' for source in sources))
    flags = [
        "-std=c++20", "-O1", "-fPIC", f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}", f"-I{headers}",
        *os.environ.get("CXXFLAGS", "").split(),
    ]  # fmt: skip
    as_cuda = [
        "-x", "c++", "-include", EMULATOR / "emulator.h", "-ffp-contract=off",
        "-fsanitize=undefined",
    ]  # fmt: skip
    as_torch = [
        "-DTOKENCACHE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-Dtokencache_kernels_native={NAMESPACE}", "-isystem", torch_root / "include",
    ]  # fmt: skip
    jobs = {api: as_torch, EMULATOR / "emulator.cpp": [], **dict.fromkeys(sources, as_cuda)}

    def compile_one(source):
        target = folder / f"{source.name}.o"
        run(compiler, *flags, *jobs[source], "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs))
    library = folder / "libemulated.so"
    run(
        compiler, *flags, "-fsanitize=undefined", "-shared", "-Wl,-Bsymbolic", *objects,
        f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-o", library,
    )  # fmt: skip
    return library


def read_schemas():
    """What csrc/api defines."""
    for source in (ROOT / "csrc" / "api").glob("*.cpp"):
        for words in re.findall(r'm\.def\(((?:\s*"[^"]*")+)\)', source.read_text()):
            yield "".join(re.findall(r'"([^"]*)"', words))


def run(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="session")
def emulated_ops(tmp_path_factory):
    """The ops of the native library, under another name, with the kernels as the CPU's."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    headers = find_cuda_headers()
    if compiler is None or headers is None or sys.platform != "linux":
        pytest.skip("it needs Linux, g++ and the headers of a CUDA toolkit")
    folder = tmp_path_factory.mktemp("cuda_emulator")
    with torch.library._scoped_library(NAMESPACE, "DEF") as library:
        for schema in read_schemas():
            library.define(schema)
        torch.ops.load_library(build_emulated_library(compiler, headers, folder))
        yield getattr(torch.ops, NAMESPACE)


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
