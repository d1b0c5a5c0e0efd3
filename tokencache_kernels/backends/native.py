"""The native library: C++ loops registered as torch ops of their own, loaded on first use."""

import functools
import importlib
from pathlib import Path

import torch
from torch import Tensor

from .. import settings

_PACKAGE = Path(__file__).resolve().parents[1]
_OPS = torch.ops.tokencache_kernels_native


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """The library must be there, and it works on the CPU; any dtype will do for a copy."""
    if device.type == "cuda":
        return "it has no CUDA half yet"
    if device.type != "cpu":
        return f"it needs a CPU tensor, got {device.type}"
    return _load_library()


@functools.cache
def _load_library() -> str | None:
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
    return None


def library_path() -> Path:
    """Where the library is: ``TOKENCACHE_NATIVE_LIBRARY``, or where the build installs it."""
    override = settings.native_library_path()
    return Path(override) if override else _PACKAGE / "libtokencache_kernels.so"


def build_info() -> dict[str, str] | None:
    """How the installed library was built (compiler, flags, torch), or None if it cannot say."""
    try:
        module = importlib.import_module(f"{_PACKAGE.name}._build_info")
    except ImportError:
        return None
    facts: dict[str, str] = module.facts()
    return facts


# rows


def gather_rows(hidden_states: Tensor, indices: Tensor) -> Tensor:
    """out[b, s] = hidden_states[b, indices[b, s]]; an empty slot: 0."""
    out: Tensor = _OPS.gather_rows(hidden_states, indices)
    return out


def scatter_rows_(cache: Tensor, indices: Tensor, rows: Tensor) -> None:
    """cache[b, indices[b, s]] = rows[b, s]; an empty slot writes nothing."""
    _OPS.scatter_rows_(cache, indices, rows)
