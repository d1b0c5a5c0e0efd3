"""`make package`: an installed wheel works, in an environment that has nothing else.

Four wheels are built from the sdist, so that the sdist is shown to be whole: without a compiler,
without torch (as plain ``pip install`` does), with both, and with a CUDA toolkit as well, where
there is one. To run, torch is lent by the environment that runs this, but not its copy of this
package. The wheel with the library for torch is installed for every other Python that is
found, too: there without torch, which `make matrix` adds.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLATFORM = sysconfig.get_platform().replace("-", "_").replace(".", "_")
OTHER_PYTHONS = [f"3.{minor}" for minor in range(10, 15) if minor != sys.version_info.minor]
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
CONSUMER = """
import tokencache_kernels as tck
import torch

x, indices = torch.randn(1, 9, 4), torch.tensor([[3]], dtype=torch.int32)
rows: torch.Tensor = tck.gather_rows(x, indices)
reveal_type(tck.select_tokens)
reveal_type(tck.ToCaConfig.preset)
tck.gather_rows(x, "indices")
"""
NAMES = "import tokencache_kernels as tck; print(*tck.__all__)"
WITHOUT_TORCH = """
import ctypes
import sys

import tokencache_kernels

assert "tried" in tokencache_kernels.__file__, tokencache_kernels.__file__
library = ctypes.CDLL(tokencache_kernels.__path__[0] + "/lib/libtokencache.so")
library.tokencache_version.restype = ctypes.c_char_p
assert library.tokencache_version().decode() == tokencache_kernels.__version__
print(sys.version_info[:2])
"""
CALL_CUDA = """
import ctypes
import sys

library = ctypes.CDLL(sys.argv[1])
library.tokencache_error.restype = ctypes.c_char_p
status = library.tokencache_invert_indices(ctypes.create_string_buffer(256), 1, None)
print(status, library.tokencache_error().decode())
"""


def run(*command, status=0, **options):
    options = {"env": os.environ, **options}
    # a path to the sources would come before the installation
    options["env"] = {k: v for k, v in options["env"].items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert done.returncode == status, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", build, cwd=ROOT)
    return next(folder.glob("*.tar.gz"))


def test_the_sdist_holds_all_that_git_tracks(sdist):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("there is no git checkout")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}

    missing = {name for name in tracked.stdout.splitlines() if (ROOT / name).exists()} - held

    assert {name for name in missing if not name.startswith((".ci/", ".github/"))} == set()


@pytest.fixture(scope="module", params=["pure", "c-api", "cpu", "cuda"])
def kind(request):
    """Built without a compiler, without torch, with these, and with these and a CUDA toolkit."""
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
    if kind == "pure":
        settings["CXX"] = "no-such-c++"
    # pip's isolated build has no torch
    isolation = [] if kind == "c-api" else ["--no-build-isolation"]
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
    """The C API's folder in that environment."""
    if kind == "pure":
        pytest.skip("a pure wheel has no C library")
    return next(fresh.glob("lib/python*/site-packages/tokencache_kernels"))


def test_the_wheel_says_what_is_in_it(wheel, kind):
    assert wheel.name.endswith(f"-py3-none-{'any' if kind == 'pure' else PLATFORM}.whl")


def test_a_native_wheel_can_be_a_manylinux_wheel(wheel, kind, tmp_path):
    if kind == "pure" or not sys.platform.startswith("linux"):
        pytest.skip("it is for every platform, or for none of Linux")

    run(sys.executable, "-m", "auditwheel", "repair", "--exclude", "libtorch_cpu.so",
        "--wheel-dir", tmp_path, wheel)  # fmt: skip

    (repaired,) = tmp_path.glob("*.whl")
    assert re.search(r"-py3-none-(manylinux_\d+_\d+_\w+\.?)+\.whl$", repaired.name)
    before, after = (
        # some versions of auditwheel list the folders, too
        {n for n in zipfile.ZipFile(w).namelist() if ".dist-info" not in n and not n.endswith("/")}
        for w in (wheel, repaired)
    )
    assert after == before  # nothing is bundled


@pytest.mark.parametrize("version", OTHER_PYTHONS)
def test_a_native_wheel_is_for_every_python(wheel, kind, version, tmp_path):
    python = find_python(version)
    if kind != "cpu" or python is None:
        pytest.skip(f"only of one wheel; or there is no Python {version}")
    folder = tmp_path / "tried"
    run(python, "-m", "venv", folder)

    run(folder / "bin" / "python", "-m", "pip", "install", "--no-deps", wheel)

    out = run(folder / "bin" / "python", "-c", WITHOUT_TORCH, cwd=tmp_path)
    assert out == f"(3, {version.removeprefix('3.')})\n"


def find_python(version):
    """A Python of that version that runs: on the path, or pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [shutil.which(f"python{version}"), *pyenv.glob(f"versions/{version}.*/bin/python")]
    for python in filter(None, found):
        if subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            return python
    return None


def test_a_consumer_is_type_checked_against_the_wheel(fresh, kind, tmp_path):
    if kind != "pure":
        pytest.skip("the Python files of all wheels are the same")
    names = run(fresh / "bin" / "python", "-c", NAMES, cwd=tmp_path).split()
    assert len(names) > 30
    (tmp_path / "consumer.py").write_text(CONSUMER + "".join(f"tck.{name}\n" for name in names))

    printed = run(sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache",
                  "--python-executable", fresh / "bin" / "python", "consumer.py",
                  cwd=tmp_path, status=1)  # fmt: skip

    said = printed.splitlines()
    assert "Tensor" in said[0], printed
    assert "-> tokencache_kernels.policies.toca.ToCaConfig" in said[1], printed
    assert 'incompatible type "str"; expected "Tensor"' in said[2], printed
    assert said[3:] == ["Found 1 error in 1 file (checked 1 source file)"]


def test_the_ops_run(fresh, kind, tmp_path):
    reason = run(fresh / "bin" / "python", "-c", GATHER, cwd=tmp_path).strip()

    said = {
        "pure": "the native library was not built: there was no C++ compiler (",
        "c-api": "the native library was not built: torch was not installed in the build "
        "environment (try --no-build-isolation); the C API was built (pip install ",
    }
    assert reason.splitlines()[-1].startswith(said.get(kind, "None"))
    # without it the ops run all the same, and that is said once
    assert reason.count("ops on the CPU run in plain PyTorch") == (kind in said)


def test_no_library_knows_a_python(fresh, prefix):
    for library in (*prefix.glob("*.so"), *prefix.glob("lib/*.so*")):
        symbols = run("nm", "-D", "--undefined-only", library)
        assert not re.search(r" _?Py[A-Z]\w+$", symbols, re.MULTILINE), library
        assert "cpython" not in library.name


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
