"""Asks CMake for the native library where it can be built; everything else is in pyproject.toml."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import ExecError

ROOT = Path(__file__).resolve().parent
# in CMake's order
COMPILERS = ("c++", "g++", "clang++")
WITHOUT_TORCH = "torch was not installed in the build environment (try --no-build-isolation)"


def why_without_native() -> str | None:
    """Return the reason to build a pure Python package, or None to build native libraries.

    A GPU is not asked for: a build machine need not have one.
    """
    if os.environ.get("TOKENCACHE_SKIP_NATIVE", "0") == "1":
        return "TOKENCACHE_SKIP_NATIVE=1"
    named = os.environ.get("CXX")
    wanted = (named.split()[0],) if named else COMPILERS
    if not any(map(shutil.which, wanted)):
        return f"there was no C++ compiler ({', '.join(wanted)})"
    return None


def why_without_library() -> str | None:
    """Return the reason to leave the library for torch out; the C API does without torch."""
    if importlib.util.find_spec("torch") is None:
        return f"{WITHOUT_TORCH}; the C API was built"
    return None


class BuildPython(build_py):
    """The Python files, and in a package without the library the reason for that."""

    def run(self) -> None:
        """Write the reason where ``backends/native/loading.py`` looks for it."""
        super().run()
        if reason is not None and not self.editable_mode:
            path = Path(self.build_lib) / "tokencache_kernels" / "without_native.txt"
            path.write_text(f"{reason}\n")


class BuildNative(build_ext):
    """Configure, build and install with CMake, into the wheel or, for an editable one, the tree."""

    def run(self) -> None:
        """Fail with one sentence: the library is never left out silently."""
        # the cmake and ninja that pip installed go first, also where the environment is not active
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
        self._environment = {**os.environ, "PATH": path}
        cmake = shutil.which("cmake", path=path)
        if cmake is None:
            raise ExecError(_failure("there is no cmake (pip install cmake ninja)"))
        if self._build(cmake):
            return
        if os.environ.get("TOKENCACHE_SKIP_CUDA", "0") != "1":
            self._environment["TOKENCACHE_SKIP_CUDA"] = "1"
            if self._build(cmake):
                _say("built without the CUDA half, with which the build failed (see above)")
                return
        raise ExecError(_failure("CMake's message is above"))

    def _build(self, cmake: str) -> bool:
        """Tell whether every step of CMake succeeds."""
        prefix = ROOT if self.inplace else Path(self.build_lib).resolve()
        build = Path(self.build_temp).resolve() / "native"
        has_torch = why_without_library() is None
        options = {
            "TOKENCACHE_TORCH": has_torch,
            "TOKENCACHE_PACKAGE": True,
            # an editable package is a developer's
            "TOKENCACHE_DEVELOPER": has_torch and bool(self.inplace),
        }
        flags = [f"-D{name}={'ON' if value else 'OFF'}" for name, value in options.items()]
        # fresh: CMake's cache may be of another place, or of another environment
        configure = ["--fresh", "-S", ROOT, "-B", build, "-G", "Ninja", *flags]
        for command in (
            [*configure, f"-DPython_EXECUTABLE={sys.executable}"],
            ["--build", build],
            ["--install", build, "--prefix", prefix],
        ):
            done = subprocess.run([cmake, *command], env=self._environment, check=False)
            if done.returncode != 0:
                return False
        return True

    def get_outputs(self) -> list[str]:
        """CMake's install decides the contents; the wheel takes the whole build folder."""
        return []

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing to link: an editable build installs into the tree itself."""
        return {}


class BuildWheel(bdist_wheel):
    """A wheel for every Python: no library in it knows one."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of Python, of its ABI and of the platform."""
        return "py3", "none", super().get_tag()[2]


def _say(sentence: str) -> None:
    print(f"tokencache_kernels: {sentence}", file=sys.stderr)


def _failure(reason: str) -> str:
    return (
        f"the native library could not be built: {reason}; "
        "set TOKENCACHE_SKIP_NATIVE=1 to install without it"
    )


is_pure = why_without_native() is not None
reason = why_without_native() or why_without_library()
if reason is not None:
    _say(f"building without the native library: {reason}")

setup(
    # declaring an extension gives the wheel the tag of this platform
    ext_modules=[] if is_pure else [Extension("tokencache_kernels.native", sources=[])],
    cmdclass={"bdist_wheel": BuildWheel, "build_ext": BuildNative, "build_py": BuildPython},
)
