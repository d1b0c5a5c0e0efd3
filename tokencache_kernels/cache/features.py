"""Outputs of sub-layers, kept after the output projection and before the gate."""

import math
from collections.abc import Hashable

from torch import Tensor

from ..errors import CacheMissError


class FeatureCache:
    """One buffer per site; its address stays the same from one full step to the next.

    A captured graph, and the kernels that scatter into a buffer, rely on that: a full step copies
    into the buffer instead of replacing it.

    To forecast, it also keeps finite differences, a buffer of the same size for each order: with
    ``d_0`` what is stored, ``d_{i+1} = (d_i - the d_i before) / (steps in between)``. ``x`` steps
    later ``sum_i d_i * x^i / i!`` is expected. Only the orders up to ``forecast_order`` that the
    run has stored often enough for are known.

    Source:
        TaylorSeer (arXiv:2503.06923).
    """

    def __init__(self, forecast_order: int = 0) -> None:
        self._forecast_order = forecast_order
        self._step_index = 0
        self._buffers: dict[Hashable, list[Tensor]] = {}
        # the step that stored last, and how many orders of differences are known since
        self._stored: dict[Hashable, tuple[int, int]] = {}

    def begin_step(self, step_index: int) -> None:
        """Count distances from here; a step that is not later than the last begins a new run."""
        self._step_index = step_index

    def store(self, site: Hashable, value: Tensor, is_forecast: bool = True) -> None:
        """Copy ``value`` into the site's buffer, which is made anew when the shape changes.

        Without ``is_forecast`` no differences are kept.
        """
        buffers = self._buffers.setdefault(site, [])
        if buffers and not _fits(buffers[0], value):
            buffers.clear()
        last, known = self._stored.get(site, (self._step_index, 0))
        distance = self._step_index - last
        goes_on = is_forecast and bool(buffers) and distance > 0
        known = min(known + 1, self._forecast_order) if goes_on else 0
        self._stored[site] = self._step_index, known
        new = value.detach()
        for order in range(known + 1):
            if order == len(buffers):
                buffers.append(new.clone())
            elif order == known:
                buffers[order].copy_(new)
            else:
                difference = (new - buffers[order]) / distance
                buffers[order].copy_(new)
                new = difference

    def load(self, site: Hashable, like: Tensor) -> Tensor:
        """Return the site's buffer itself.

        Args:
            site: the site stored before.
            like: a tensor whose shape, dtype and device the features must have.

        Raises:
            CacheMissError: nothing that fits was stored.
        """
        if not self._buffers.get(site):
            raise CacheMissError(f"load: {site} must be stored by a full step first, got nothing")
        buffer = self._buffers[site][0]
        if not _fits(buffer, like):
            raise CacheMissError(
                f"load: {site} must fit {tuple(like.shape)} {like.dtype} on {like.device}, got "
                f"{tuple(buffer.shape)} {buffer.dtype} on {buffer.device}; reset the cache before "
                "sampling with another batch, size or dtype"
            )
        return buffer

    def differences(self, site: Hashable) -> list[tuple[Tensor, float]]:
        """The site's known differences themselves, from order 1, and their factors ``x^i / i!``."""
        last, known = self._stored[site]
        distance = self._step_index - last
        return [
            (self._buffers[site][order], distance**order / math.factorial(order))
            for order in range(1, known + 1)
        ]


def _fits(buffer: Tensor, value: Tensor) -> bool:
    return (
        buffer.shape == value.shape
        and buffer.dtype == value.dtype
        and buffer.device == value.device
    )
