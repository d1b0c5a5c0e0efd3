"""Launch settings as data: the device of a launch, its tuned settings, and the cases to compile."""

import dataclasses
import importlib
import json
import logging
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from ... import settings

logger = logging.getLogger(__name__)

Setting = TypeVar("Setting")
SHIPPED = Path(__file__).parent / "settings"


@dataclass(frozen=True)
class Device:
    """The facts of a device that a heuristic may use: ``arch`` is 90 for sm_90."""

    arch: int
    name: str
    num_sms: int


INTERPRETER = Device(arch=90, name="interpreter", num_sms=1)


@cache
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


def early_start(device: Device) -> dict[str, bool]:
    """The launch options of a kernel that may start before the one ahead of it has ended.

    That is programmatic dependent launch, of sm_90 and later: the programs of this kernel are
    placed while the last ones of that kernel still run, and begin with ``await_previous``.
    """
    if device is INTERPRETER or device.arch < 90 or not settings.starts_early():
        return {"STARTS_EARLY": False}
    return {"STARTS_EARLY": True, "launch_pdl": True}


@dataclass
class Trial:
    """While on, launches of one kernel take ``setting`` (None: the heuristic's) whatever was tuned.

    ``seen`` holds the heuristic's setting of every problem that was launched.
    """

    kernel: str
    setting: Any = None
    seen: dict[str, Any] = field(default_factory=dict)

    def choose(self, key: str, heuristic: Setting) -> Setting:
        """The setting on trial, which remembers the one that it replaces."""
        self.seen[key] = heuristic
        chosen: Setting = heuristic if self.setting is None else self.setting
        return chosen


_trial: Trial | None = None


@contextmanager
def on_trial(kernel: str, setting: Any = None) -> Iterator[Trial]:
    """Try a setting on the launches within; for tuning, in one thread."""
    global _trial
    _trial = Trial(kernel, setting)
    try:
        yield _trial
    finally:
        _trial = None


def choose(
    kernel: str,
    device: Device,
    problem: Mapping[str, int],
    heuristic: Setting,
    candidates: Callable[[], Iterable[Setting]] = tuple,
) -> Setting:
    """Return the setting tuned for this kernel, device and problem, else ``heuristic``.

    Args:
        kernel: the launcher's name.
        device: of the launch.
        problem: the sizes that decide, rounded up to a power of two when looked up.
        heuristic: a frozen dataclass.
        candidates: the settings that may take its place at this problem. Another one is not
            launched: nobody has compiled it, and it may not fit the device. A warning says so once.

    Raises:
        ValueError: a file of launch settings cannot be read, or an entry is not a whole setting.
    """
    if _trial is not None and _trial.kernel == kernel:
        return _trial.choose(problem_key(kernel, problem), heuristic)
    entries = tuned(device.name, settings.launch_settings_path())
    if not entries and not _adopted:
        return heuristic
    key = problem_key(kernel, problem)
    if key in _adopted:
        setting: Setting = _adopted[key]
        source = "this process"
    elif key in entries:
        path, fields = entries[key]
        setting, source = _whole_setting(kernel, key, path, fields, heuristic), str(path)
    else:
        return heuristic
    if setting == heuristic or setting in candidates():
        return setting
    _warn_of_stranger(key, source, describe_setting(setting))
    return heuristic


# settings tuned in this process, by problem
_adopted: dict[str, Any] = {}


def adopt(key: str, setting: Any) -> None:
    """Launch a problem with this setting from now on, in this process."""
    _adopted[key] = setting


def _whole_setting(
    kernel: str, key: str, path: Path, fields: Mapping[str, Any], heuristic: Setting
) -> Setting:
    wanted = vars(heuristic)
    if fields.keys() == wanted.keys():
        strange = [name for name in fields if type(fields[name]) is not type(wanted[name])]
    else:
        strange = sorted(fields.keys() ^ wanted.keys())
    if strange:
        raise ValueError(
            f"{kernel}: the launch settings in {path} must give all fields of a setting such as "
            f"{describe_setting(heuristic)}, got {dict(fields)} for {key}: see {strange[0]!r}"
        )
    return type(heuristic)(**fields)


@cache
def _warn_of_stranger(key: str, source: str, setting: str) -> None:
    logger.warning(
        "%s: the setting of %s (%s) is no candidate here: not used", key, source, setting
    )


def problem_key(kernel: str, problem: Mapping[str, int]) -> str:
    """``linear/K=2048,M=512``: the key of one bucket of problems in a file of launch settings."""
    sizes = ",".join(
        f"{name}={1 << max(size - 1, 0).bit_length()}" for name, size in sorted(problem.items())
    )
    return f"{kernel}/{sizes}"


@cache
def tuned(device_name: str, path: str | None) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The tuned settings of a device, by problem: the source file, and the setting's fields.

    Entries of the file at ``path`` go before the shipped ones. Each file is read once in a process.
    """
    shipped = SHIPPED / f"{file_name(device_name)}.json"
    entries = read_settings(shipped, device_name) if shipped.exists() else {}
    if path is not None:
        entries.update(read_settings(Path(path), device_name))
    return entries


def read_settings(path: Path, device_name: str) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The entries of one file; none when it was written for another device."""
    try:
        content = json.loads(path.read_text())
        device, entries = content["device"], content["settings"]
        found = {key: (path, dict(fields)) for key, fields in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"launch settings: {path} must be a JSON file with a device and its settings, "
            f"got {type(error).__name__}: {error}"
        ) from error
    if device != device_name:
        logger.debug("passing over %s: it is for %r, not for %r", path, device, device_name)
        return {}
    return found


def file_name(device_name: str) -> str:
    """``NVIDIA H200`` -> ``nvidia-h200``."""
    return "-".join(device_name.lower().split())


@dataclass(frozen=True)
class CompileCase:
    """One kernel with one launch setting, as the compile gate builds it for an architecture.

    Attributes:
        kernel: the ``@triton.jit`` function.
        variant: the reader's name of the case, such as ``gelu_tanh bf16``.
        setting: the launch setting, printed in the report.
        signature: the type of each argument that is not a constexpr, such as
            ``{"x_ptr": "*bf16", "N": "i32"}``; of a tuple, one type for each of its items.
        constexprs: the value of each constexpr argument.
        aligned: the arguments divisible by 16 at a launch: pointers, and strides or sizes.
        num_warps: warps per program.
        num_stages: pipeline stages.
        max_registers: the launch's ``maxnreg``; None leaves it to the assembler.
        fuses_multiply_add: the launch's ``enable_fp_fusion``.
        is_gemm: whether it must use tensor cores and asynchronous copies.
        copy_bytes: of each copy of a GEMM, at least. A narrow tile has fewer for each thread.
    """

    kernel: Any
    variant: str
    setting: Any
    signature: Mapping[str, str | tuple[str, ...]]
    constexprs: Mapping[str, Any]
    aligned: frozenset[str]
    num_warps: int
    num_stages: int = 1
    max_registers: int | None = None
    fuses_multiply_add: bool = True
    is_gemm: bool = False
    copy_bytes: int = 16


@dataclass(frozen=True)
class TuneCase:
    """One problem of one kernel, for ``tokencache tune``.

    Attributes:
        kernel: the name under which its launcher calls :func:`choose`.
        label: the problem, for the reader, such as ``R=512 D=1152 bf16``.
        candidates: the settings to try beside the heuristic's.
        run: one call of the launcher, on inputs made beforehand.
    """

    kernel: str
    label: str
    candidates: Sequence[Any]
    run: Callable[[], object]


def modules_with(function: str) -> list[str]:
    """The modules of this package that define ``compile_cases`` or ``tune_cases``."""
    found = pkgutil.iter_modules([str(Path(__file__).parent)], f"{__package__}.")
    return [name for _, name, _ in found if hasattr(importlib.import_module(name), function)]


def describe_setting(setting: Any) -> str:
    """``block_m=128 num_warps=8``."""
    if dataclasses.is_dataclass(setting):
        return " ".join(f"{name}={value}" for name, value in vars(setting).items())
    return str(setting)
