"""The stage ``build``: the native library for the device at hand, and what it then can do."""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
# what is laid into WHEELS is unpacked beside it, and found by every stage (see gpu.py)
WHEELS = ROOT / "build" / "wheels"
UNPACKED = ROOT / "build" / "site-packages"


def run_stage(options: argparse.Namespace, deadline: float) -> int:
    """Build and install the native library; where it cannot be built, say what there is."""
    if wheels := sorted(WHEELS.glob("*.whl")):
        unpack = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--upgrade"]
        run_until(deadline, [*unpack, "--quiet", "--target", UNPACKED, *wheels])
    print(f"nvcc: {shutil.which('nvcc') or 'not found'}", flush=True)
    status = build_library(options, deadline)
    return run_until(deadline, [sys.executable, "-m", "tokencache_kernels", "info"]) or status


def build_library(options: argparse.Namespace, deadline: float) -> int:
    """Configure, build and install with CMake."""
    cmake = find_cmake()
    if cmake is None:
        print("build: there is no cmake, so that the native library stays as it is", flush=True)
        return 1
    if options.device.type == "cuda":
        # one architecture takes a sixth of the time of all
        os.environ.setdefault("TOKENCACHE_CUDA_ARCHITECTURES", name_architecture(options.device))
    # a rehearsal leaves the library in use alone
    prefix = options.out.resolve() if options.rehearse else ROOT
    folder = prefix / "build"
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    return run_until(
        deadline,
        [*cmake, "-S", ROOT, "-B", folder, *ninja, f"-DPython_EXECUTABLE={sys.executable}"],
        [*cmake, "--build", folder, "--parallel"],
        [*cmake, "--install", folder, "--prefix", prefix],
    )


def find_cmake() -> list[str] | None:
    """How to call CMake, the system's or the one of Python's package; None where there is none."""
    if found := shutil.which("cmake"):
        return [found]
    return [sys.executable, "-m", "cmake"] if importlib.util.find_spec("cmake") else None


def name_architecture(device: torch.device) -> str:
    """As CMake calls it: ``90a-real`` for sm_90, whose matrix instructions need the ``a``."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}{minor}{'a' if major == 9 else ''}-real"


def run_until(deadline: float, *commands: list[str | Path]) -> int:
    """Run commands in the project's root until one fails; nothing is begun after the deadline."""
    for command in commands:
        if time.monotonic() > deadline:
            print(f"the budget is spent before {' '.join(map(str, command))}", flush=True)
            return 1
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if status != 0:
            return status
    return 0
