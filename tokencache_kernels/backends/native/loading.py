"""The native library: its path, whether it loads, and the facts of its build."""

import functools
import importlib
import logging
import re
from pathlib import Path

import torch

from ... import settings

_logger = logging.getLogger(__name__)
_PACKAGE = Path(__file__).resolve().parents[2]
OPS = torch.ops.tokencache_kernels_native


@functools.cache
def load_library() -> str | None:
    """Load the library, once in a process; the reason why it cannot be loaded, or None."""
    path = library_path()
    if not path.is_file():
        if settings.native_library_path():
            return f"TOKENCACHE_NATIVE_LIBRARY must name a file, got {str(path)!r}"
        reason = f"the native library was not built{_why_not_built()}"
        _logger.warning("%s: ops on the CPU run in plain PyTorch", reason)
        return reason
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the native library does not load ({error.__cause__ or error})"
    if "norm_kind" not in str(
        torch.ops.tokencache_kernels_native.row_pass.default._schema
    ):  # of the schemas the newest
        return "the native library was built from older sources (build it again)"
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
        why = (build_info() or {}).get("without_cuda", "it is not beside the library")
        return f"its CUDA half was not built ({why})"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"its CUDA half does not load ({error.__cause__ or error})"
    return None


def library_path() -> Path:
    """Give the path of the library: ``TOKENCACHE_NATIVE_LIBRARY``, or the place of installation."""
    override = settings.native_library_path()
    return Path(override) if override else _PACKAGE / "libtokencache_kernels.so"


def cuda_library_path() -> Path:
    """Give the path of the CUDA half, beside the library."""
    return library_path().with_name("libtokencache_kernels_cuda.so")


def cpu_instructions() -> str:
    """The instruction set that the CPU loops of the loaded library use."""
    name: str = OPS.cpu_instructions()
    return name


@functools.cache
def refuse_gpu(device: torch.device) -> str | None:
    """Why the CUDA half as it was built cannot run on this GPU, or None where nothing tells."""
    if torch.version.cuda is None:
        return "its CUDA half takes the stream from torch, and this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device or no driver"
    facts = build_info() or {}
    if "cuda" not in facts:
        return None
    driver = torch._C._cuda_getDriverVersion() // 1000  # type: ignore[attr-defined]
    if driver < int(facts["cuda"].split(".")[0]):
        return f"its CUDA half was built with CUDA {facts['cuda']}, and the driver is for {driver}"
    major, minor = torch.cuda.get_device_capability(device)
    built = facts["cuda_architectures"]
    if any(_runs_on(arch, major, minor) for arch in built.split()):
        return None
    return (
        f"its CUDA half was built for {', '.join(built.split())}, and this GPU is sm_{major}{minor}"
    )


def _runs_on(arch: str, major: int, minor: int) -> bool:
    """Tell whether code for ``80-real``, ``90a-real``, ...

    runs on a GPU of that compute capability.
    """
    match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", arch)
    if match is None:
        return True  # "native", "all": it cannot be told
    built, kind, form = (int(match[1]), int(match[2])), match[3], match[4]
    if built == (major, minor):
        return True
    if kind == "a":
        return False
    # machine code runs on later GPUs of its generation; intermediate code on all later ones
    same = built[0] == major and built[1] < minor
    return same if form == "-real" or kind == "f" else built < (major, minor)


@functools.cache
def build_info() -> dict[str, str] | None:
    """Return how the loaded library was built (compiler, flags, torch), or None without one."""
    if load_library() is not None:
        return None
    facts: str = OPS.build_info()
    return dict(line.split("=", 1) for line in facts.splitlines())


def built_resources() -> str:
    """Return cuobjdump's report on the CUDA half of a developer's build, or nothing."""
    if settings.native_library_path():
        return ""
    try:
        module = importlib.import_module(f"{_PACKAGE.name}._cuda_resources")
    except ImportError:
        return ""
    printed: str = module.printed
    return printed


def _why_not_built() -> str:
    """Return the build's note on a missing part, with the remedy."""
    left = _PACKAGE / "without_native.txt"
    why = f": {left.read_text().strip()}" if left.is_file() else ""
    return (
        f"{why} (pip install --no-build-isolation --no-cache-dir builds it where torch, cmake, "
        "ninja and a C++ compiler are installed)"
    )
