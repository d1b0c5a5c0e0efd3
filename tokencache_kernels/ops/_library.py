"""Registers the ops with PyTorch: one namespace, schemas by hand, a fake for each."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import backends

NAMESPACE = "tokencache_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define one op and return its overload; the schema's last argument is ``str backend``."""
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def run(
    op: str, anchor: Tensor, backend: str, preference: Iterable[str] | None = None
) -> Callable[..., Any]:
    """The function that runs ``op`` where ``anchor`` lies; only called inside a registered op."""
    launch = backends.resolve(op, anchor.device, anchor.dtype, backend, preference)
    if anchor.device.type != "cuda" or anchor.device.index == torch.cuda.current_device():
        return launch

    def launch_there(*arguments: Any) -> Any:
        with torch.cuda.device(anchor.device):
            return launch(*arguments)

    return launch_there


def no_result(*_: Any) -> None:
    """The fake implementation of every op that only writes in place."""
