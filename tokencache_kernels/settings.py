"""Every environment variable that the package reads, each in one place, at its first use.

An op asks for several settings at every call, and looking one up costs as much as a small op.
``reread`` takes notice of later changes.
"""

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

BACKENDS = ("auto", "triton", "native", "reference", "library")
CPU_INSTRUCTIONS = ("portable", "avx2", "avx512")


_CACHES: list[Any] = []


def until_reread(function: Function) -> Function:
    """Keep the results of a function of settings until ``reread``; its errors are not kept."""
    cached = lru_cache(maxsize=1024)(function)
    _CACHES.append(cached)
    return cached  # type: ignore[return-value]


def reread() -> None:
    """Read every variable anew at its next use, and choose anew whatever depends on one."""
    for cached in _CACHES:
        cached.cache_clear()


@until_reread
def backend() -> str:
    """``TOKENCACHE_BACKEND``: the backend of every op called with ``backend="auto"``."""
    name = os.environ.get("TOKENCACHE_BACKEND", "auto")
    if name not in BACKENDS:
        raise ValueError(f"TOKENCACHE_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@until_reread
def check_indices() -> bool:
    """``TOKENCACHE_CHECK_INDICES=1``: read indices on the host, check range and uniqueness."""
    return os.environ.get("TOKENCACHE_CHECK_INDICES", "0") == "1"


@until_reread
def cpu_instructions() -> str | None:
    """``TOKENCACHE_CPU_INSTRUCTIONS``: of the native CPU loops, or None: the best there are."""
    name = os.environ.get("TOKENCACHE_CPU_INSTRUCTIONS")
    if name is not None and name not in CPU_INSTRUCTIONS:
        wanted = ", ".join(CPU_INSTRUCTIONS)
        raise ValueError(f"TOKENCACHE_CPU_INSTRUCTIONS must be one of {wanted}, got {name!r}")
    return name


@until_reread
def launch_settings_path() -> str | None:
    """``TOKENCACHE_LAUNCH_SETTINGS``: a JSON file of launch settings to prefer to the shipped."""
    return os.environ.get("TOKENCACHE_LAUNCH_SETTINGS")


@until_reread
def native_library_path() -> str | None:
    """``TOKENCACHE_NATIVE_LIBRARY``: the native library to load instead of the installed one."""
    return os.environ.get("TOKENCACHE_NATIVE_LIBRARY")


@until_reread
def is_interpreting() -> bool:
    """``TRITON_INTERPRET=1``: Triton's own switch to run kernels on the CPU, in NumPy."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@until_reread
def packs_weights() -> bool:
    """``TOKENCACHE_PACK_WEIGHTS=0``: keep no packed copies of weights on the CPU."""
    return os.environ.get("TOKENCACHE_PACK_WEIGHTS", "1") == "1"


@until_reread
def starts_early() -> bool:
    """``TOKENCACHE_EARLY_START=1``: place a kernel's programs while the one before it ends."""
    return os.environ.get("TOKENCACHE_EARLY_START", "0") == "1"
