"""`make package`: what is installed from a wheel works, in an environment that has nothing else.

Three wheels are built from the sdist, so that the sdist is shown to be whole: without torch, with
torch and a compiler, and with a CUDA toolkit as well, where there is one. To run, torch is lent by
the environment that runs this; what that one has of this package is not.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GATHER = """
import torch
import tokencache_kernels as tck
from tokencache_kernels.backends import native

assert "fresh" in tck.__file__, tck.__file__
x = torch.randn(1, 9, 4)
assert torch.equal(tck.gather_rows(x, torch.tensor([[3]], dtype=torch.int32)), x[:, [3]])
print(native.unavailable(torch.device("cpu"), torch.float32))
"""
IMPORT = """
import time

start = time.perf_counter()
import tokencache_kernels
print(time.perf_counter() - start)
"""
CALL_CUDA = """
import ctypes
import sys

library = ctypes.CDLL(sys.argv[1])
library.tokencache_error.restype = ctypes.c_char_p
status = library.tokencache_invert_indices(ctypes.create_string_buffer(256), 1, None)
print(status, library.tokencache_error().decode())
"""


def run(*command, **options):
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", build, cwd=ROOT)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module", params=["pure", "cpu", "cuda"])
def kind(request):
    """Built where there is no torch; torch and a compiler; these and a CUDA toolkit."""
    if request.param == "cuda" and shutil.which("nvcc") is None:
        pytest.skip("there is no CUDA toolkit")
    return request.param


@pytest.fixture(scope="module")
def wheel(sdist, kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp(kind)
    settings = {
        "TOKENCACHE_SKIP_CUDA": "0" if kind == "cuda" else "1",
        # one is enough to see that it is built
        "TOKENCACHE_CUDA_ARCHITECTURES": "90a-real",
    }
    # pip's isolated build has no torch
    isolation = [] if kind == "pure" else ["--no-build-isolation"]
    run(sys.executable, "-m", "pip", "wheel", *isolation, "--no-deps", "--wheel-dir", folder,
        sdist, env={**os.environ, **settings})  # fmt: skip
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory):
    """A new environment with the wheel."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    packages = next(folder.glob("lib/python*/site-packages"))
    # a path added like this is searched, but the editable install that it holds stays asleep
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib"))
    run(sys.executable, "-m", "pip", f"--python={folder}/bin/python", "install", "--no-deps",
        "--ignore-installed", wheel)  # fmt: skip
    return folder


@pytest.fixture
def prefix(fresh, kind):
    """Where the C library is."""
    if kind == "pure":
        pytest.skip("a pure wheel has no C library")
    return next(fresh.glob("lib/python*/site-packages/tokencache_kernels"))


def test_the_wheel_says_what_is_in_it(wheel, kind):
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert ("-py3-none-any" if kind == "pure" else f"-{python}-{python}-linux_") in wheel.name


def test_the_ops_run(fresh, kind, tmp_path):
    reason = run(fresh / "bin" / "python", "-c", GATHER, cwd=tmp_path).strip()

    assert reason.startswith("the native library was not built" if kind == "pure" else "None")


def test_importing_takes_no_time_to_speak_of(fresh, kind, tmp_path, capsys):
    python = fresh / "bin" / "python"
    seconds = [float(run(python, "-c", IMPORT, cwd=tmp_path)) for _ in range(5)]

    with capsys.disabled():
        print(f"\nimport tokencache_kernels ({kind}): {1000 * min(seconds):.1f} ms, the best of 5")
    assert min(seconds) < 0.3


def test_cuda_is_there_or_said_to_be_missing(prefix, kind):
    library = prefix / "lib" / "libtokencache.so"

    status, _, sentence = run(sys.executable, "-c", CALL_CUDA, library).partition(" ")

    was_built = "no kernels were built" not in sentence
    assert was_built == (kind == "cuda")
    # an empty problem: 0 where there is a GPU, else unsupported
    assert status == "2" or (status == "0" and kind == "cuda")
    assert (prefix / "libtokencache_kernels_cuda.so").is_file() == (kind == "cuda")


def test_the_c_program_of_the_documentation_builds_to_the_letter(fresh, prefix, tmp_path):
    page = (ROOT / "docs" / "c-api.md").read_text()
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "program.c").write_text(next(code for _, code in blocks if "main(void)" in code))
    commands = next(code for name, code in blocks if name == "sh" and "program.c" in code)

    path = f"{fresh / 'bin'}{os.pathsep}{os.environ['PATH']}"
    out = run("sh", "-e", "-c", commands, cwd=tmp_path, env={**os.environ, "PATH": path})

    assert re.fullmatch(r"tokencache [\d.]+: row 6 begins with 1.5\n", out)


def test_a_program_builds_against_a_wheel(prefix, tmp_path):
    run("cmake", "-S", ROOT / "examples" / "c_api", "-B", tmp_path,
        f"-DCMAKE_PREFIX_PATH={prefix}")  # fmt: skip
    run("cmake", "--build", tmp_path)

    assert "tokens selected" in run(tmp_path / "partial_step")


def test_numpy_finds_the_library_of_a_wheel(fresh, prefix, tmp_path):
    out = run(fresh / "bin" / "python", ROOT / "examples" / "numpy_ctypes.py", cwd=tmp_path)

    assert out.splitlines()[-1] == "selected, passed, scattered and gathered from NumPy"
