"""Outputs of sub-layers, kept after the output projection and before the gate."""

from collections.abc import Hashable

from torch import Tensor

from ..errors import CacheMissError


class FeatureCache:
    """One buffer per site; its address stays the same from one full step to the next.

    A captured graph, and the kernels that scatter into a buffer, rely on that: a full step copies
    into the buffer instead of replacing it.
    """

    def __init__(self) -> None:
        self._buffers: dict[Hashable, Tensor] = {}

    def store(self, site: Hashable, value: Tensor) -> None:
        """Copy ``value`` into the site's buffer, which is made anew when the shape changes."""
        buffer = self._buffers.get(site)
        if buffer is None or not _fits(buffer, value):
            self._buffers[site] = value.detach().clone()
        else:
            buffer.copy_(value.detach())

    def load(self, site: Hashable, like: Tensor) -> Tensor:
        """Return the site's buffer itself.

        Args:
            site: the site stored before.
            like: a tensor whose shape, dtype and device the features must have.

        Raises:
            CacheMissError: nothing that fits was stored.
        """
        buffer = self._buffers.get(site)
        if buffer is None:
            raise CacheMissError(f"load: {site} must be stored by a full step first, got nothing")
        if not _fits(buffer, like):
            raise CacheMissError(
                f"load: {site} must fit {tuple(like.shape)} {like.dtype} on {like.device}, got "
                f"{tuple(buffer.shape)} {buffer.dtype} on {buffer.device}; reset the cache before "
                "sampling with another batch, size or dtype"
            )
        return buffer


def _fits(buffer: Tensor, value: Tensor) -> bool:
    return (
        buffer.shape == value.shape
        and buffer.dtype == value.dtype
        and buffer.device == value.device
    )
