"""The C API as others use it: a program built against the installed library, NumPy, DLPack."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tokencache_kernels.version import __version__

ROOT = Path(__file__).parents[2]
HEADER = ROOT / "csrc" / "include" / "tokencache.h"
WARNINGS = ("-Wall", "-Wextra", "-pedantic", "-Werror")


def run(*command):
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake")
def test_a_program_builds_against_what_is_installed_and_runs(library_path, tmp_path):
    installed = library_path.parents[1]

    run("cmake", "-S", ROOT / "examples" / "c_api", "-B", tmp_path,
        f"-DCMAKE_PREFIX_PATH={installed}")  # fmt: skip
    run("cmake", "--build", tmp_path)
    out = run(tmp_path / "partial_step")

    assert "refused, as it should be: gather_rows: S must be at most N = 64, got 65" in out
    assert out.splitlines()[-1].startswith(f"tokencache {__version__}: 16 of 64 tokens selected")


@pytest.mark.parametrize(
    ("compiler", "language", "standard"),
    [("cc", "c", "c89"), ("cc", "c", "c99"), ("c++", "c++", "c++11"), ("c++", "c++", "c++20")],
)
def test_the_header_is_plain_c_and_c_plus_plus(compiler, language, standard):
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    run(compiler, "-x", language, f"-std={standard}", *WARNINGS, "-fsyntax-only", HEADER)


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_a_hostile_program_is_refused_call_by_call(library_path, tmp_path):
    program = tmp_path / "hostile"

    run("cc", "-std=c99", *WARNINGS, f"-I{HEADER.parent}", ROOT / "tests/c_api/hostile.c",
        library_path, f"-Wl,-rpath,{library_path.parent}", "-o", program)  # fmt: skip

    assert re.fullmatch(r"0 of \d{4} expectations failed\n", run(program))


@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
def test_the_library_exports_the_header_and_nothing_else(library_path):
    symbols = run("nm", "-D", "--defined-only", library_path)

    exported = set(re.findall(r" \w (\w+)$", symbols, re.MULTILINE))
    declared = set(re.findall(r"(tokencache_\w+)\(\s*(?:const|int64_t|void)\b", HEADER.read_text()))
    assert exported == declared


@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
def test_the_cuda_half_exports_one_symbol_and_asks_for_no_cuda_library(library_path):
    half = next(library_path.parent.glob("libtokencache_cuda.so.*"), None)
    if half is None:
        pytest.skip("the CUDA half was not built")

    symbols = [line.split()[-2:] for line in run("nm", "-D", half).splitlines()]

    assert [name for kind, name in symbols if kind in "BDRTVW"] == ["tokencache_cuda_launches"]
    assert not [name for kind, name in symbols if kind == "U" and re.match("_*cu", name)]


def test_a_library_without_its_cuda_half_says_so(library_path, tmp_path):
    alone = ctypes.CDLL(str(shutil.copy(library_path, tmp_path)))
    alone.tokencache_error.restype = ctypes.c_char_p
    nothing = ctypes.create_string_buffer(256)

    status = alone.tokencache_invert_indices(nothing, 1, None)

    sentence = alone.tokencache_error().decode()
    assert status == 2
    assert sentence.startswith("invert_indices: device must be one that can be used here, got ")
    assert f"no kernels were built, or they do not load: {tmp_path}/libtokencache_cuda" in sentence


def test_the_library_tells_its_version(library_path):
    library = ctypes.CDLL(str(library_path))
    library.tokencache_version.restype = ctypes.c_char_p

    assert library.tokencache_version().decode() == __version__


def test_numpy_calls_the_library_without_torch(library_path):
    out = run(sys.executable, ROOT / "examples" / "numpy_ctypes.py", library_path)

    assert out.splitlines()[-1] == "selected, passed, scattered and gathered from NumPy"


def test_other_frameworks_hand_their_memory_over():
    out = run(sys.executable, ROOT / "examples" / "dlpack.py")

    lines = dict(line.split(": ") for line in out.splitlines())
    assert list(lines) == ["numpy", "jax.numpy", "cupy"]
    assert lines.pop("numpy") == "selected, passed, scattered and gathered"
    assert set(lines.values()) <= {
        "selected, passed, scattered and gathered", "not installed", "needs a GPU"
    }  # fmt: skip
