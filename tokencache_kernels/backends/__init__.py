"""Who runs an op: plain PyTorch, the native library, Triton, or another library's attention.

A backend is a module with functions named like the ops (the contract is spelled out in
``reference``) and one function ``unavailable(device, dtype) -> str | None``, the reason it cannot
run there.
"""

import importlib
import logging
from collections.abc import Callable, Iterable
from functools import cache
from types import ModuleType
from typing import Any

import torch

from .. import settings
from ..errors import BackendUnavailableError

logger = logging.getLogger(__name__)

# the order in which "auto" tries backends; "reference" is last and always runs
_PREFERENCE = {"cuda": ("triton", "native", "reference"), "cpu": ("native", "reference")}


def resolve(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "auto",
    preference: Iterable[str] | None = None,
) -> Callable[..., Any]:
    """Return the function that runs ``op`` on ``device``.

    A backend that is named, as an argument or through ``TOKENCACHE_BACKEND``, either runs or
    raises. Only ``"auto"`` may pick another, and it logs at debug level which backends it passed
    over and why. It tries the backends in the order of ``preference``, or in that of the device.

    Raises:
        ValueError: ``backend`` is not a backend's name.
        BackendUnavailableError: the backend named cannot run ``op`` here.
    """
    choose = _choose_again if logger.isEnabledFor(logging.DEBUG) else _choose
    return choose(op, device, dtype, backend, None if preference is None else tuple(preference))


def _choose_again(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    preference: tuple[str, ...] | None,
) -> Callable[..., Any]:
    if backend not in settings.BACKENDS:
        raise ValueError(
            f"{op}: backend must be one of {', '.join(settings.BACKENDS)}, got {backend!r}"
        )
    name = settings.backend() if backend == "auto" else backend
    if name != "auto":
        reason = unavailable(name, op, device, dtype)
        if reason is not None:
            raise BackendUnavailableError(f"{op}: backend {name!r} cannot run here: {reason}")
        return getattr(load(name), op)
    for name in preference or _PREFERENCE.get(device.type, ("reference",)):
        reason = unavailable(name, op, device, dtype)
        if reason is None:
            return getattr(load(name), op)
        logger.debug("%s: passing over backend %r: %s", op, name, reason)
    raise AssertionError("the reference backend is always available")


def unavailable(name: str, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why backend ``name`` cannot run ``op`` on ``device`` in ``dtype``, or None."""
    module = _import_once(name)
    if isinstance(module, str):
        return f"it cannot be imported ({module})"
    reason: str | None = module.unavailable(device, dtype)
    if reason is None and not hasattr(module, op):
        reason = f"it has no {op}"
    return reason


@cache
def _import_once(name: str) -> ModuleType | str:
    """The backend's module, or why it cannot be imported: a broken library may raise anything."""
    try:
        return load(name)
    except Exception as error:
        text = str(error) or "no reason given"
        return text if isinstance(error, ImportError) else f"{type(error).__name__}: {text}"


# who runs an op changes with its device and dtype alone; an error is not kept
_choose = settings.until_reread(_choose_again)


@cache
def load(name: str) -> ModuleType:
    """Import the backend's module on first use."""
    return importlib.import_module(f"{__name__}.{name}")
