"""The build of the package, and its words when it leaves something out."""

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


@pytest.fixture
def checkout(tmp_path):
    """A folder with the inputs of the build, and hardly anything of the package."""
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
    for name in ("cmake", "csrc", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    package = tmp_path / "tokencache_kernels"
    package.mkdir()
    for name in ("__init__.py", "py.typed", "version.py"):
        shutil.copy(ROOT / "tokencache_kernels" / name, package)
    # leftovers of an editable install must not slip into a pure Python wheel
    (package / "libtokencache_kernels.so").write_text("left over")
    for name in ("include/tokencache.h", "lib/libtokencache.so.0.2", "lib/libtokencache.so"):
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
    ("environment", "reason"),
    [
        pytest.param({"TOKENCACHE_SKIP_NATIVE": "1"}, "SKIP_NATIVE=1", id="skipped"),
        pytest.param({"CXX": "no-such-c++"}, "no C++ compiler (no-such-c++)", id="no-compiler"),
    ],
)
def test_without_the_native_library_the_wheel_is_pure_and_says_why(checkout, environment, reason):
    done = build(checkout, **environment)

    assert done.returncode == 0, done.stderr
    assert "building without the native library: " in done.stderr
    assert reason in done.stderr
    wheel = checkout / "dist" / f"tokencache_kernels-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        left = archive.read("tokencache_kernels/without_native.txt").decode()
    assert not [name for name in names if ".so" in name or name.endswith(".h")]
    assert reason in left  # from there it is told when the package runs


def test_the_compiler_may_have_any_of_its_usual_names(checkout, tmp_path):
    """In a process without ``CXX`` and with one compiler on its path."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is neither g++ nor clang++")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / Path(compiler).name).symlink_to(compiler)
    environment = {name: value for name, value in os.environ.items() if name != "CXX"}

    done = subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=checkout, capture_output=True, text=True,
        env={**environment, "PATH": str(tools), "TOKENCACHE_SKIP_NATIVE": "0"},
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "building without" not in done.stderr


def configure(checkout, *options, path=None, **environment):
    """Configure the checkout with CMake, and return all that it prints."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("there is no cmake")
    environment = {"TOKENCACHE_SKIP_CUDA": "1", **environment}
    if path is not None:
        environment["PATH"] = f"{path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [cmake, "-S", checkout, "-B", checkout / "build", *options], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **environment},
    )  # fmt: skip
    return done.returncode, done.stdout


def test_a_project_that_takes_the_sources_in_gets_the_c_api_alone(checkout, tmp_path):
    project = tmp_path / "engine"
    project.mkdir()
    (project / "CMakeLists.txt").write_text(f"""
        cmake_minimum_required(VERSION 3.25)
        project(engine LANGUAGES CXX)
        include(FetchContent)
        FetchContent_Declare(tokencache SOURCE_DIR "{checkout}")
        FetchContent_MakeAvailable(tokencache)
        add_executable(engine engine.cpp)
        target_link_libraries(engine PRIVATE tokencache::tokencache)
        if(TARGET tokencache_kernels OR CMAKE_BUILD_TYPE)
          message(FATAL_ERROR "more than the C API")
        endif()
    """)
    (project / "engine.cpp").write_text("#include <tokencache.h>\nint main() {}\n")

    status, printed = configure(project)

    assert status == 0, printed
    assert "Found torch" not in printed


def test_a_compiler_that_is_too_old_is_named_in_one_sentence(checkout, tmp_path):
    gcc = shutil.which("g++")
    if gcc is None:
        pytest.skip("there is no g++")
    old = tmp_path / "g++-10"
    old.write_text(f'#!/bin/sh\nexec {gcc} -w -U__GNUC__ -D__GNUC__=10 "$@"\n')
    old.chmod(0o755)

    status, printed = configure(checkout, "-DTOKENCACHE_TORCH=OFF", f"-DCMAKE_CXX_COMPILER={old}")

    assert status != 0
    sentence = "The C++ compiler must be GCC 11, Clang 14 or newer, got GNU 10."
    assert sentence in " ".join(printed.split())


def make_nvcc(folder, version, refuses=()):
    """Put an nvcc of a version into a folder, which refuses some words and is the real one else."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no CUDA toolkit")
    folder.mkdir()
    refusals = "".join(
        f'case "$*" in *{word}*) echo "nvcc fatal: Unsupported {word}" >&2; exit 1;; esac\n'
        for word in refuses
    )
    (folder / "nvcc").write_text(
        "#!/bin/sh\n"
        f'if [ "$*" = --version ]; then echo "release {version}, V{version}.99"; exit; fi\n'
        f'{refusals}exec {nvcc} "$@"\n'
    )
    (folder / "nvcc").chmod(0o755)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "refuses", "said"),
    [
        ("12.4", ["100", "120"], "80-real 86-real 89-real 90a-real 80-virtual"),
        ("12.8", [], "80-real 86-real 89-real 90a-real 100-real 120-real 80-virtual"),
        ("12.3", [], 'without the CUDA half: CUDA 12.4 or newer is needed, got "12.3"'),
        ("13.0", ["c++20"], "without the CUDA half: CUDA 13.0 does not compile with "),
    ],
)
def test_the_toolkit_says_what_is_built_for_cuda(checkout, tmp_path, version, refuses, said):
    toolkit = make_nvcc(tmp_path / "toolkit", version, refuses)

    status, printed = configure(
        checkout, "-DTOKENCACHE_TORCH=OFF", path=toolkit, TOKENCACHE_SKIP_CUDA="0",
        CUDACXX=str(toolkit / "nvcc"),
    )  # fmt: skip

    assert status == 0, printed
    assert said in printed


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
