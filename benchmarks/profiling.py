"""What a call runs and takes, as torch's profiler and allocator see it."""

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def list_kernels(call: Callable[[], object], device: torch.device) -> list[str]:
    """What ``call`` ran, in order: kernels and copies of a GPU, torch's calls on a CPU."""
    on_gpu = device.type == "cuda"
    call()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [
        event
        for event in trace.events()
        if event.device_type == kind and event.cpu_parent is None and event.name != "[memory]"
    ]
    return [event.name for event in sorted(events, key=lambda event: event.time_range.start)]


def measure_peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """What a call allocates at its peak on a GPU, beyond what there was."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
