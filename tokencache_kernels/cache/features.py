"""Outputs of sub-layers, kept after the output projection and before the gate."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ..errors import CacheMissError
from .trend import NO_TREND, Trend


class FeatureCache:
    """One buffer per site; its address stays the same from one full step to the next.

    A captured graph, and the kernels that scatter into a buffer, rely on that: a full step copies
    into the buffer instead of replacing it. Which step it is, only the caller knows.

    To forecast, it also keeps finite differences, a buffer of the same size for each order. ``d_0``
    is the stored feature, and ``d_{i+1} = (d_i - previous d_i) / (steps in between)``. A policy's
    carrier gives the factors of their sum.

    Source:
        TaylorSeer (arXiv:2503.06923).
    """

    def __init__(self) -> None:
        self._buffers: dict[Hashable, list[Tensor]] = {}

    def store(self, site: Hashable, value: Tensor, trend: Trend = NO_TREND) -> None:
        """Copy ``value`` into the site's buffer, which is made anew when the shape changes.

        Args:
            site: where.
            value: any tensor; no gradient goes through.
            trend: the orders known with this value, and the steps since the value before.
        """
        buffers = self._buffers.setdefault(site, [])
        if buffers and not _fits(buffers[0], value):
            buffers.clear()
        new = value.detach()
        known = min(trend.known, len(buffers))
        for order in range(known + 1):
            if order == len(buffers):
                # a later run may be outside of the inference mode of this one
                with torch.inference_mode(False):
                    buffers.append(new.clone())
            elif order == known:
                buffers[order].copy_(new)
            else:
                difference = (new - buffers[order]) / trend.gap
                buffers[order].copy_(new)
                new = difference

    def load(self, site: Hashable, like: Tensor | None = None) -> Tensor:
        """Return the site's buffer itself.

        Args:
            site: the site stored before.
            like: a tensor whose shape, dtype and device the features must have, if they must.

        Raises:
            CacheMissError: nothing that fits was stored.
        """
        if not self._buffers.get(site):
            raise CacheMissError(
                f"token cache: no cached output for {site}; a full step must run first"
            )
        buffer = self._buffers[site][0]
        if like is not None and not _fits(buffer, like):
            raise CacheMissError(
                f"token cache: the cached output of {site} is {tuple(buffer.shape)} "
                f"{buffer.dtype} on {buffer.device}, but the model now has {tuple(like.shape)} "
                f"{like.dtype} on {like.device}; call reset_token_cache before sampling with "
                "another batch, size or dtype"
            )
        return buffer

    def differences(
        self, site: Hashable, factors: Sequence[float] = ()
    ) -> list[tuple[Tensor, float]]:
        """Pair the site's differences themselves, from order 1, with their factors.

        Args:
            site: the site stored before.
            factors: from order 0, which is left out; of as many orders as are known at most.
        """
        return list(zip(self._buffers[site][1:], factors[1:], strict=False))

    def count_bytes(self) -> int:
        """The bytes of all buffers."""
        return sum(buffer.nbytes for buffers in self._buffers.values() for buffer in buffers)


def _fits(buffer: Tensor, value: Tensor) -> bool:
    return (
        buffer.shape == value.shape
        and buffer.dtype == value.dtype
        and buffer.device == value.device
    )
