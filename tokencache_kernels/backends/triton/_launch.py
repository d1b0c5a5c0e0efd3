"""Launch settings as data: which device a launch is for, what was tuned for it, what must compile."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from ... import settings

Setting = TypeVar("Setting")
SHIPPED = Path(__file__).parent / "settings"


@dataclass(frozen=True)
class Device:
    """What a heuristic may know of the device: ``arch`` is 90 for sm_90."""

    arch: int
    name: str
    num_sms: int


INTERPRETER = Device(arch=90, name="interpreter", num_sms=1)


@lru_cache(maxsize=None)
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(
        arch=10 * properties.major + properties.minor,
        name=properties.name,
        num_sms=properties.multi_processor_count,
    )


def device_of(device: torch.device) -> Device:
    """The device that a launch on ``device`` runs on."""
    if device.type != "cuda":
        return INTERPRETER
    return _cuda_device(torch.cuda.current_device() if device.index is None else device.index)


def choose(kernel: str, device: Device, problem: Mapping[str, int], heuristic: Setting) -> Setting:
    """Return the setting tuned for this kernel, device and problem, else ``heuristic``.

    Args:
        kernel: the launcher's name.
        device: where the launch runs.
        problem: the sizes that decide, rounded up to a power of two when looked up.
        heuristic: a frozen dataclass; a tuned entry replaces the fields it names.
    """
    entry = tuned(device.name).get(problem_key(kernel, problem))
    if entry is None:
        return heuristic
    return dataclasses.replace(heuristic, **entry)  # type: ignore[type-var]


def problem_key(kernel: str, problem: Mapping[str, int]) -> str:
    """``linear/K=2048,M=512``: the key of one bucket of problems in a file of launch settings."""
    sizes = ",".join(
        f"{name}={1 << max(size - 1, 0).bit_length()}" for name, size in sorted(problem.items())
    )
    return f"{kernel}/{sizes}"


@lru_cache(maxsize=None)
def tuned(device_name: str) -> dict[str, dict[str, Any]]:
    """All tuned entries for a device: the shipped file, then ``TOKENCACHE_LAUNCH_SETTINGS``."""
    entries: dict[str, dict[str, Any]] = {}
    for path in (SHIPPED / f"{file_name(device_name)}.json", settings.launch_settings_path()):
        if path is not None and Path(path).exists():
            content = json.loads(Path(path).read_text())
            if content["device"] == device_name:
                entries.update(content["settings"])
    return entries


def file_name(device_name: str) -> str:
    """``NVIDIA H200`` -> ``nvidia-h200``."""
    return "-".join(device_name.lower().split())


@dataclass(frozen=True)
class CompileCase:
    """One kernel with one launch setting, as the compile gate builds it for an architecture.

    Attributes:
        kernel: the ``@triton.jit`` function.
        variant: what distinguishes it for the reader, such as ``gelu_tanh bf16``.
        setting: the launch setting, printed in the report.
        signature: the type of each argument that is not a constexpr, such as ``{"x_ptr": "*bf16", "N": "i32"}``.
        constexprs: the value of each constexpr argument.
        aligned: the arguments known to be divisible by 16 at a launch: pointers, and strides or sizes.
        num_warps: warps per program.
        num_stages: pipeline stages.
        is_gemm: whether it must use tensor cores and asynchronous copies.
    """

    kernel: Any
    variant: str
    setting: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    aligned: frozenset[str]
    num_warps: int
    num_stages: int = 1
    is_gemm: bool = False
