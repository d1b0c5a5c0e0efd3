"""The backends of this machine: installed packages, the ops that each can run, and the refusals."""

import argparse
import importlib.metadata
import os
import platform
import subprocess
from inspect import isfunction
from itertools import product
from pathlib import Path

import torch

from .. import backends, ops, settings
from ..backends import library, native, reference
from ..version import __version__

PACKAGES = ("torch", "triton", "diffusers", "safetensors", "mlxtend", "matplotlib", "tqdm")
DEVICES = ("cpu", "cuda")
# as Linux calls them
CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16",
                "amx_bf16", "asimd", "bf16", "sve")  # fmt: skip
# in the order in which a block calls them; a functional twin runs through its in-place op
OPS = tuple(name for name in ops.__all__ if isfunction(getattr(reference, name, None)))
# B, S, N, H, E: all queries, fresh ones, and those over a text of different lengths
ATTENTIONS = {
    "DiT-XL, 256 px": (2, 256, 256, 16, 72),
    "FLUX, 1024 px, fresh": (1, 614, 4608, 24, 128),
    "PixArt, 1024 px, text": (2, 4096, 300, 16, 72),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing to choose."""


def run(_: argparse.Namespace) -> int:
    """Print everything, one heading after another."""
    print(f"tokencache_kernels {__version__} at {Path(__file__).parent}")
    _print_table("Versions", {"python": platform.python_version(), **versions()})
    devices = {"cpu": describe_cpu(), "cpu features": cpu_features(), "cuda": describe_cuda()}
    _print_table("Devices", devices)
    _print_table("Native library", describe_native_library())
    _print_table("Environment", environment())
    for device in DEVICES:
        absent = device == "cuda" and not torch.cuda.is_available()
        print(f"\nBackends on {device}, for float32" + " (no such device here)" * absent)
        for line in describe_backends(torch.device(device)):
            print(f"  {line}")
        if not absent:
            print(f"\nAttention on {device}, under auto")
            for line in describe_attentions(torch.device(device)):
                print(f"  {line}")
    return 0


def machine_facts(device: torch.device) -> dict[str, str | int]:
    """Collect the facts of a machine that a measurement on ``device`` must carry."""
    return {
        "device": describe_device(device),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "tokencache_kernels": __version__,
        **{name: version for name, version in versions().items() if name in PACKAGES[:3]},
    }


def source_facts() -> dict[str, str | bool | None]:
    """The package's commit, and whether its files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "HEAD"], stderr=subprocess.DEVNULL)
        changes = subprocess.check_output([*git, "status", "--porcelain", "--", "."])
    except (OSError, subprocess.CalledProcessError):
        return {"git": None, "dirty": None}
    return {"git": commit.decode().strip(), "dirty": bool(changes.strip())}


def versions() -> dict[str, str]:
    """The version of every package that some part of this one uses."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    # the metadata leave out the CUDA version of torch
    found["torch"] = torch.__version__
    return found


def describe_device(device: torch.device) -> str:
    """The name of the device, and how much of it there is."""
    return describe_cuda() if device.type == "cuda" else describe_cpu()


def describe_cpu() -> str:
    """The processor's name and number of cores."""
    name = platform.processor() or platform.machine()
    facts = Path("/proc/cpuinfo")
    if facts.is_file():
        models = [line for line in facts.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return f"{name}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()}"


def cpu_features() -> str:
    """List the CPU features that this package can use."""
    facts = Path("/proc/cpuinfo")
    if not facts.is_file():
        return "unknown: there is no /proc/cpuinfo"
    found = set(facts.read_text().split())
    return ", ".join(name for name in CPU_FEATURES if name in found) or "none that is looked for"


def describe_cuda() -> str:
    """The first CUDA device's name and architecture, or why there is none."""
    if torch.version.cuda is None:
        return "none: this torch was built without CUDA"
    if not torch.cuda.is_available():
        return f"none: torch {torch.__version__} sees no device or no driver"
    properties = torch.cuda.get_device_properties(0)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"


def describe_native_library() -> dict[str, str]:
    """Give the path of the native library, and the facts of its build."""
    reason = native.unavailable(torch.device("cpu"), torch.float32)
    facts = native.build_info() or {}
    state = f"not usable: {reason}" if reason else "loaded"
    in_use = {} if reason else {"instructions in use": native.cpu_instructions()}
    reason = native.unavailable(torch.device("cuda"), torch.float32)
    cuda = {
        "CUDA state": f"not usable: {reason}" if reason else "loaded",
        "CUDA kernels": native.summarise_resources(),
    }
    return {"path": str(native.library_path()), "state": state, **in_use, **cuda, **facts}


def environment() -> dict[str, str]:
    """The settings in effect, by the environment variable that sets each."""
    return {
        "TOKENCACHE_BACKEND": settings.backend(),
        "TOKENCACHE_CHECK_INDICES": "1" if settings.check_indices() else "0",
        "TOKENCACHE_CPU_INSTRUCTIONS": settings.cpu_instructions() or "(the best there are)",
        "TOKENCACHE_EARLY_START": "1" if settings.starts_early() else "0",
        "TOKENCACHE_LAUNCH_SETTINGS": settings.launch_settings_path() or "(shipped settings only)",
        "TOKENCACHE_NATIVE_LIBRARY": settings.native_library_path() or "(the installed one)",
        "TRITON_INTERPRET": "1" if settings.is_interpreting() else "0",
    }


def describe_backends(device: torch.device) -> list[str]:
    """One line a backend: how much it runs; then one for each reason why not the rest."""
    lines = []
    for name in settings.BACKENDS[1:]:
        refused: dict[str, list[str]] = {}
        for op in OPS:
            reason = backends.unavailable(name, op, device, torch.float32)
            if reason is not None:
                # "it has no <op>" differs from op to op, and is one reason
                refused.setdefault(reason.replace(op, "such op"), []).append(op)
        num_refused = sum(map(len, refused.values()))
        lines.append(f"{name}: runs {len(OPS) - num_refused} of {len(OPS)} ops")
        for reason, names in refused.items():
            others = ", ".join(op for op in OPS if op not in names)
            if not others:
                what = "not all"
            elif 2 * len(names) > len(OPS):
                what = f"none but {others}"
            else:
                what = f"not {', '.join(names)}"
            lines.append(f"  {what}: {reason}")
    chosen = sorted({chosen_backend(op, device) for op in OPS})
    lines.append(f"auto: takes {', '.join(chosen)}")
    return lines


def chosen_backend(op: str, device: torch.device) -> str:
    """The name of the backend that ``auto`` takes for ``op`` in float32."""
    # an op's function lies in its backend's module, or in a file of its family below it
    module = backends.resolve(op, device, torch.float32).__module__
    return module.removeprefix(f"{backends.__name__}.").split(".")[0]


def describe_attentions(device: torch.device) -> list[str]:
    """Give the attention chosen for typical sizes, and the reasons why better-ranked ones are
    rejected.
    """
    lines = []
    for (label, (B, S, N, H, E)), dtype in product(
        ATTENTIONS.items(), (torch.float32, torch.bfloat16)
    ):
        query, key = (torch.empty(B, n, H, E, dtype=dtype, device=device) for n in (S, N))
        lengths = torch.empty(B, dtype=torch.int32, device=device) if "text" in label else None
        row = library.find_row(query)
        refused = []
        for name in (*row.order, "reference"):
            reason = library.refusal(name, query, key, key, lengths)
            if reason is None and name not in library.CANDIDATES:
                reason = backends.unavailable(name, "attention", device, dtype)
            if reason is None:
                lines.append(f"{label}, {str(dtype).removeprefix('torch.')}: {name} ({row.source})")
                break
            refused.append(f"  not {name}: {reason}")
        lines += refused
    return lines


def _print_table(heading: str, rows: dict[str, str]) -> None:
    print(f"\n{heading}")
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"  {name:{width}}  {value}")
