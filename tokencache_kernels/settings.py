"""Every environment variable that the package reads, each in one place, at the time of use."""

import os

BACKENDS = ("auto", "triton", "native", "reference", "library")
CPU_INSTRUCTIONS = ("portable", "avx2", "avx512")


def backend() -> str:
    """``TOKENCACHE_BACKEND``: the backend of every op called with ``backend="auto"``."""
    name = os.environ.get("TOKENCACHE_BACKEND", "auto")
    if name not in BACKENDS:
        raise ValueError(f"TOKENCACHE_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def check_indices() -> bool:
    """``TOKENCACHE_CHECK_INDICES=1``: read indices on the host, check range and uniqueness."""
    return os.environ.get("TOKENCACHE_CHECK_INDICES", "0") == "1"


def cpu_instructions() -> str | None:
    """``TOKENCACHE_CPU_INSTRUCTIONS``: of the native CPU loops, or None: the best there are."""
    name = os.environ.get("TOKENCACHE_CPU_INSTRUCTIONS")
    if name is not None and name not in CPU_INSTRUCTIONS:
        wanted = ", ".join(CPU_INSTRUCTIONS)
        raise ValueError(f"TOKENCACHE_CPU_INSTRUCTIONS must be one of {wanted}, got {name!r}")
    return name


def launch_settings_path() -> str | None:
    """``TOKENCACHE_LAUNCH_SETTINGS``: a JSON file of launch settings to prefer to the shipped."""
    return os.environ.get("TOKENCACHE_LAUNCH_SETTINGS")


def native_library_path() -> str | None:
    """``TOKENCACHE_NATIVE_LIBRARY``: the native library to load instead of the installed one."""
    return os.environ.get("TOKENCACHE_NATIVE_LIBRARY")


def is_interpreting() -> bool:
    """``TRITON_INTERPRET=1``: Triton's own switch to run kernels on the CPU, in NumPy."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def packs_weights() -> bool:
    """``TOKENCACHE_PACK_WEIGHTS=0``: keep no packed copies of weights on the CPU."""
    return os.environ.get("TOKENCACHE_PACK_WEIGHTS", "1") == "1"


def starts_early() -> bool:
    """``TOKENCACHE_EARLY_START=1``: place a kernel's programs while the one before it ends."""
    return os.environ.get("TOKENCACHE_EARLY_START", "0") == "1"
