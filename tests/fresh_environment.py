"""`make package`: what is installed from a wheel works, in an environment that has nothing else.

The wheel is built from the sdist, so that the sdist is shown to be whole. torch is lent by the
environment that runs this; what that one has of this package is not.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECK = """
import torch
import tokencache_kernels as tck
from tokencache_kernels.backends import native

assert "fresh" in tck.__file__, tck.__file__
assert native.unavailable(torch.device("cpu"), torch.float32) is None
x = torch.randn(1, 9, 4)
assert torch.equal(tck.gather_rows(x, torch.tensor([[3]], dtype=torch.int32)), x[:, [3]])
"""


def run(*command, **environment):
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, capture_output=True)
    run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps",
        "--wheel-dir", folder, next(folder.glob("*.tar.gz")))  # fmt: skip
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


def test_the_native_library_runs_from_a_wheel(fresh, tmp_path):
    subprocess.run([fresh / "bin" / "python", "-c", CHECK], cwd=tmp_path, check=True)


def test_a_program_builds_against_a_wheel(fresh, tmp_path):
    package = next(fresh.glob("lib/python*/site-packages/tokencache_kernels"))

    run("cmake", "-S", ROOT / "examples" / "c_api", "-B", tmp_path,
        f"-DCMAKE_PREFIX_PATH={package}")  # fmt: skip
    run("cmake", "--build", tmp_path)

    assert "tokens selected" in run(tmp_path / "partial_step")


def test_numpy_finds_the_library_of_a_wheel(fresh, tmp_path):
    run(fresh / "bin" / "python", ROOT / "examples" / "numpy_ctypes.py")
