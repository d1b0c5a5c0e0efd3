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


@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
def test_the_library_exports_the_header_and_nothing_else(library_path):
    symbols = run("nm", "-D", "--defined-only", library_path)

    exported = set(re.findall(r" \w (\w+)$", symbols, re.MULTILINE))
    declared = set(re.findall(r"(tokencache_\w+)\(\s*(?:const|int64_t|void)\b", HEADER.read_text()))
    assert exported == declared


def test_the_library_tells_its_version(library_path):
    library = ctypes.CDLL(str(library_path))
    library.tokencache_version.restype = ctypes.c_char_p

    assert library.tokencache_version().decode() == __version__


def test_numpy_calls_the_library_without_torch(library_path):
    out = run(sys.executable, ROOT / "examples" / "numpy_ctypes.py", library_path)

    assert out.splitlines()[-1] == "gathered and scattered from NumPy"


def test_other_frameworks_hand_their_memory_over():
    out = run(sys.executable, ROOT / "examples" / "dlpack.py")

    assert out.splitlines()[0] == "numpy: gathered and scattered"
    assert re.fullmatch(r"(\w+: [\w ]+\n){3}", out)
