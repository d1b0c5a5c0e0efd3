"""Compile the launches of the first call of a lease for an H200, on a machine without one."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

FAMILIES = ("attention", "linear", "mlp", "modulate", "project", "rows", "select", "statistics")
TARGET = (90, "NVIDIA H200", 132)
# batch, tokens, slots, channels; DiT-XL/2 at 256 px with 16 samples and FLUX at 1024 px, 10 %
PROBLEMS = ((16, 256, 26, 1152), (1, 4096, 410, 3072), (1, 4608, 460, 3072))


class _Driver:
    """A driver of a GPU that is not here: kernels are compiled for it, and none is launched."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", TARGET[0], 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_ahead(folder: Path) -> int:
    """Fill a folder that Triton finds its compiled kernels in; say how many it compiled."""
    os.environ |= {"TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1"}
    folder.mkdir(parents=True, exist_ok=True)
    from triton.runtime.cache import triton_key

    compiled = 0
    with _on_target():
        for run in _list_launches():
            run()
            compiled += 1
    (folder / "compiler.json").write_text(json.dumps({"triton_key": triton_key()}))
    num_kernels = len(list(folder.rglob("*.cubin")))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{compiled} launches, {num_kernels} kernels, {size / 2**20:.0f} MiB in {folder}")
    return 0


@contextmanager
def _on_target() -> Iterator[None]:
    """Let every launch on a CPU tensor compile for the target."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from tokencache_kernels.backends.triton import _launch

    modules = [sys.modules[f"{_launch.__package__}.{family}"] for family in FAMILIES]
    # to the end of the process: without a GPU there is no driver to return to
    driver.set_active(_Driver())
    device = _launch.Device(*TARGET)
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        return launch(self, *args, **{**kwargs, "warmup": True})

    kept = [module.device_of for module in modules]
    JITFunction.run = compile_only
    for module in modules:
        module.device_of = lambda _: device
    try:
        yield
    finally:
        JITFunction.run = launch
        for module, one in zip(modules, kept, strict=True):
            module.device_of = one


def _list_launches() -> Iterator[Callable[[], object]]:
    """The layers of ``PROBLEMS``, then the problems that the first call tunes."""
    from tokencache_kernels.backends import triton
    from tokencache_kernels.backends.triton import _launch

    linear = sys.modules[f"{_launch.__package__}.linear"]

    for B, N, S, D in PROBLEMS:
        x, branch = torch.zeros(2, B, N, D, dtype=torch.bfloat16)
        gate, shift, scale = torch.zeros(3, B, D, dtype=x.dtype)
        scores = torch.zeros(28, B, N)
        staleness = torch.zeros(28, B, N, dtype=torch.int32)
        indices = torch.zeros(B, S, dtype=torch.int32)
        positions = torch.zeros(B, N, dtype=torch.int32)
        packed, cache = torch.zeros(B, S, D, dtype=x.dtype), torch.zeros_like(x)
        hidden = torch.zeros(B, S, 4 * D, dtype=x.dtype)
        up, down = torch.zeros(4 * D, D, dtype=x.dtype), torch.zeros(D, 4 * D, dtype=x.dtype)
        bias, up_bias = torch.zeros(D, dtype=x.dtype), torch.zeros(4 * D, dtype=x.dtype)
        grid = (int(N**0.5), int(N**0.5)) if int(N**0.5) ** 2 == N else None
        for count in (1, 2):
            branches, gates = [branch] * count, [gate] * count
            modulation = (indices, positions, shift, scale, 1e-6)
            yield partial(triton.row_pass, x, x, branches, gates, *modulation)
            yield partial(triton.add_branches, x, x, branches, gates)
        yield partial(triton.gather_modulate, x, indices, shift, scale, 1e-6)
        yield partial(triton.gather_rows, x, indices)
        yield partial(triton.scatter_rows_, cache, indices, packed)
        yield partial(triton.linear, packed, up, up_bias, "gelu_tanh", None)
        yield partial(triton.linear_scatter_, cache, indices, hidden, down, bias, None, False)
        # weight, whether normalised, grid, tile, bonus
        mix = (0.1, True, grid, 2, 0.4)
        yield partial(triton.select_tokens_, scores, staleness, None, S, *mix)
    for case in linear.tune_cases(_launch.Device(*TARGET)):
        if "M=416" not in case.label and "M=460" not in case.label:
            continue
        for setting in case.candidates:
            if not getattr(setting, "in_library", False):
                yield partial(_run_on_trial, case, setting)


def _run_on_trial(case: Any, setting: Any) -> None:
    from tokencache_kernels.backends.triton._launch import on_trial

    with on_trial(case.kernel, setting):
        case.run()
