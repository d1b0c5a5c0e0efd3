"""Asks CMake for the native library where it can be built; everything else is in pyproject.toml."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError

ROOT = Path(__file__).resolve().parent


def why_without_native() -> str | None:
    """The reason to build a pure Python package, or None to build the native library.

    A GPU is not asked for: a build machine need not have one.
    """
    if os.environ.get("TOKENCACHE_SKIP_NATIVE", "0") == "1":
        return "TOKENCACHE_SKIP_NATIVE=1"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed in the build environment (try --no-build-isolation)"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        return f"there is no C++ compiler ({compiler})"
    return None


class BuildNative(build_ext):
    """Configure, build and install with CMake, into the wheel or, for an editable one, the tree."""

    def run(self) -> None:
        """Fail with one sentence: the library is never left out silently."""
        # the cmake and ninja that pip installed go first, also where the environment is not active
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
        cmake = shutil.which("cmake", path=path)
        if cmake is None:
            raise ExecError(_failure("there is no cmake (pip install cmake ninja)"))
        prefix = ROOT if self.inplace else Path(self.build_lib).resolve()
        build = Path(self.build_temp).resolve() / "native"
        for command in (
            ["-S", ROOT, "-B", build, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"],
            ["--build", build],
            ["--install", build, "--prefix", prefix],
        ):
            done = subprocess.run([cmake, *command], env={**os.environ, "PATH": path}, check=False)
            if done.returncode != 0:
                raise ExecError(_failure("CMake's message is above"))

    def get_outputs(self) -> list[str]:
        """CMake's install decides what there is; the wheel takes the whole build folder."""
        return []

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing to link: an editable build installs into the tree itself."""
        return {}


def _failure(reason: str) -> str:
    return (
        f"the native library could not be built: {reason}; "
        "set TOKENCACHE_SKIP_NATIVE=1 to install without it"
    )


reason = why_without_native()
if reason is not None:
    print(f"tokencache_kernels: building without the native library: {reason}", file=sys.stderr)

# Declaring an extension gives the wheel the tag of this Python and platform. The library alone
# would serve every Python, but the pybind11 module beside it is for this one only.
setup(
    ext_modules=[] if reason else [Extension("tokencache_kernels.native", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
