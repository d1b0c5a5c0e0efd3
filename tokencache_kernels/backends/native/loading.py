"""Where the native library is, whether it loads, and how it was built."""

import functools
import importlib
from pathlib import Path

import torch

from ... import settings

_PACKAGE = Path(__file__).resolve().parents[2]
OPS = torch.ops.tokencache_kernels_native


@functools.cache
def load_library() -> str | None:
    """Load the library, once in a process; the reason why it cannot be loaded, or None."""
    path = library_path()
    if not path.is_file():
        if settings.native_library_path():
            return f"TOKENCACHE_NATIVE_LIBRARY must name a file, got {str(path)!r}"
        return (
            "the native library was not built (pip install --no-build-isolation . with a C++ "
            "compiler and torch installed)"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the native library does not load ({error})"
    instructions = settings.cpu_instructions()
    if instructions is not None and not OPS.use_cpu_instructions(instructions):
        return (
            "TOKENCACHE_CPU_INSTRUCTIONS must name instructions that this processor has, "
            f"got {instructions!r}"
        )
    return None


@functools.cache
def load_cuda_library() -> str | None:
    """Load the CUDA half, which adds its kernels to the library's ops; see ``load_library``."""
    path = cuda_library_path()
    if not path.is_file():
        return "its CUDA half was not built (there was no CUDA toolkit at build time)"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"its CUDA half does not load ({error})"
    return None


def library_path() -> Path:
    """Where the library is: ``TOKENCACHE_NATIVE_LIBRARY``, or where the build installs it."""
    override = settings.native_library_path()
    return Path(override) if override else _PACKAGE / "libtokencache_kernels.so"


def cuda_library_path() -> Path:
    """Where the CUDA half is: beside the library."""
    return library_path().with_name("libtokencache_kernels_cuda.so")


def cpu_instructions() -> str:
    """The instruction set that the CPU loops of the loaded library use."""
    name: str = OPS.cpu_instructions()
    return name


def build_info() -> dict[str, str] | None:
    """How the installed library was built (compiler, flags, torch), or None if it cannot say."""
    try:
        module = importlib.import_module(f"{_PACKAGE.name}._build_info")
    except ImportError:
        return None
    facts: dict[str, str] = module.facts()
    return facts
