"""Counters through which the programs of one launch wait for each other."""

import torch

_BUFFERS: dict[tuple[torch.device, int], torch.Tensor] = {}


def zeroed_counters(device: torch.device, count: int) -> torch.Tensor:
    """At least ``count`` int32 zeros, which the kernel must leave at zero.

    One buffer serves all launches on a stream, since these follow one another, so that no launch
    pays for clearing it. A captured graph may be replayed beside anything: it gets counters of its
    own, which each replay clears.
    """
    on_cuda = device.type == "cuda"
    if on_cuda and torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream if on_cuda else 0)
    buffer = _BUFFERS.get(key)
    if buffer is None or buffer.numel() < count:
        buffer = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
        _BUFFERS[key] = buffer
    return buffer
