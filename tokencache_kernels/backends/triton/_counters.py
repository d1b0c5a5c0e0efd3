"""Counters through which the programs of one launch wait for each other."""

import ctypes
from functools import cache

import torch

_BUFFERS: dict[tuple[torch.device, int], torch.Tensor] = {}
# of each device: the capture under way, or the last one, and its buffer
_OF_CAPTURE: dict[torch.device, tuple[int, torch.Tensor]] = {}


def zeroed_counters(device: torch.device, count: int) -> torch.Tensor:
    """At least ``count`` int32 zeros, which the kernel must leave at zero.

    One buffer serves all launches on a stream, since these follow one another, so that no launch
    pays for clearing it. A captured graph may be replayed beside anything: it gets a buffer of its
    own, which a replay clears once.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _counters_of_capture(device, count)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    buffer = _BUFFERS.get((device, stream))
    if buffer is None or buffer.numel() < count:
        buffer = _BUFFERS[device, stream] = _new_buffer(device, count)
    return buffer


def _counters_of_capture(device: torch.device, count: int) -> torch.Tensor:
    capture = capture_under_way(torch.cuda.current_stream(device).cuda_stream)
    known, buffer = _OF_CAPTURE.get(device, (None, None))
    if capture is None or known != capture or buffer is None or buffer.numel() < count:
        # the fill is captured along with the kernels after it
        buffer = _new_buffer(device, count)
        if capture is not None:
            _OF_CAPTURE[device] = capture, buffer
    return buffer


def _new_buffer(device: torch.device, count: int) -> torch.Tensor:
    return torch.zeros(max(count, 4096), dtype=torch.int32, device=device)


def capture_under_way(stream: int) -> int | None:
    """Return the number of the capture on a CUDA stream, or None where the driver does not tell.

    No two captures of a process have the same number.
    """
    driver = _driver()
    if driver is None:
        return None
    status, number = ctypes.c_int(), ctypes.c_uint64()
    error = driver.cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
    )
    return number.value if error == 0 and status.value == 1 else None


@cache
def _driver() -> ctypes.CDLL | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        return driver if hasattr(driver, "cuStreamGetCaptureInfo_v2") else None
    except OSError:
        return None
