"""How the package is built, and what it says when it leaves something out."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tokencache_kernels.version import __version__

ROOT = Path(__file__).resolve().parents[1]
BUILD = "from setuptools import build_meta; build_meta.build_wheel('dist')"
WITHOUT_TORCH = f"import sys; sys.modules['torch'] = None; {BUILD}"


@pytest.fixture
def checkout(tmp_path):
    """A folder with what the build reads, and hardly anything of the package."""
    for name in (
        "CMakeLists.txt",
        "CMakePresets.json",
        "LICENSE",
        "MANIFEST.in",
        "pyproject.toml",
        "setup.py",
    ):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").touch()
    for name in ("csrc", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    package = tmp_path / "tokencache_kernels"
    package.mkdir()
    for name in ("__init__.py", "py.typed", "version.py"):
        shutil.copy(ROOT / "tokencache_kernels" / name, package)
    # what an editable install leaves in the tree must not slip into a pure Python wheel
    (package / "libtokencache_kernels.so").write_text("left over")
    for name in ("include/tokencache.h", "lib/libtokencache.so.0.1", "lib/libtokencache.so"):
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text("left over")
    return tmp_path


def build(checkout, code=BUILD, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=checkout,
        env={**os.environ, "TOKENCACHE_SKIP_NATIVE": "0", **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("code", "environment", "reason"),
    [
        pytest.param(BUILD, {"TOKENCACHE_SKIP_NATIVE": "1"}, "SKIP_NATIVE=1", id="skipped"),
        pytest.param(WITHOUT_TORCH, {}, "torch is not installed", id="no-torch"),
        pytest.param(BUILD, {"CXX": "no-such-c++"}, "no C++ compiler", id="no-compiler"),
    ],
)
def test_without_the_native_library_the_wheel_is_pure_and_says_why(
    checkout, code, environment, reason
):
    done = build(checkout, code, **environment)

    assert done.returncode == 0, done.stderr
    assert "building without the native library: " in done.stderr
    assert reason in done.stderr
    wheel = checkout / "dist" / f"tokencache_kernels-{__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if ".so" in name or name.endswith(".h")]


def test_a_native_build_that_fails_is_an_error_in_one_sentence(checkout):
    done = build(checkout, CXX="false")  # a compiler that fails at everything

    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == (
        "error: the native library could not be built: CMake's message is above; "
        "set TOKENCACHE_SKIP_NATIVE=1 to install without it"
    )
    assert not list(checkout.glob("dist/*.whl"))


def test_the_sdist_holds_all_sources_and_examples_and_nothing_that_was_built(checkout):
    done = build(checkout, "from setuptools import build_meta; build_meta.build_sdist('dist')")

    assert done.returncode == 0, done.stderr
    sdist = checkout / "dist" / f"tokencache_kernels-{__version__}.tar.gz"
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    files = [path for folder in ("csrc", "examples") for path in checkout.glob(f"{folder}/**/*.*")]
    wanted = {str(path.relative_to(checkout)) for path in files}
    assert {"csrc/include/tokencache.h", "examples/c_api/partial_step.cpp"} <= wanted
    assert wanted | {"CMakeLists.txt", "CMakePresets.json"} <= held
    assert not [name for name in held if ".so" in name]


def test_importing_the_package_takes_no_time_to_speak_of():
    code = (
        "import time; start = time.perf_counter(); import tokencache_kernels; "
        "print(time.perf_counter() - start)"
    )

    seconds = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3)]

    # milliseconds, but the machine may be busy; torch alone would take a second or more
    assert min(seconds) < 0.3


def test_torch_stays_above_csrc_api():
    files = [
        path
        for folder in ("c_api", "cpu", "cuda", "include")
        for path in ROOT.glob(f"csrc/{folder}/**/*")
    ]
    sources = [path for path in [*files, ROOT / "csrc" / "params.h"] if path.is_file()]

    assert len(sources) > 2
    assert [
        path.name
        for path in sources
        if re.search(r"#include\W+(torch|ATen|c10)\b", path.read_text())
    ] == []


def test_every_setting_is_documented():
    settings = (ROOT / "tokencache_kernels" / "settings.py").read_text() + (
        ROOT / "setup.py"
    ).read_text()
    names = set(re.findall(r"environ\.get\(\"(\w+)\"", settings)) - {"PATH"}

    documented = set(re.findall(r"^\| `(\w+)`", (ROOT / "docs" / "settings.md").read_text(), re.M))

    assert len(names) > 5
    assert names <= documented
