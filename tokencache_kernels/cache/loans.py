"""Cached outputs in the hands of a model's own code."""

from collections.abc import Hashable

from torch import Tensor

from ..errors import UnsupportedInputError


class Loans:
    """Cached outputs on loan to blocks, which may write into the outputs of their modules.

    A block such as ``out = self.ff(x); out += x`` would change the cache. It gets copies until it
    has been seen to leave one as it was; from then on it gets the buffer itself, still watched.
    """

    def __init__(self) -> None:
        self._leaves_as_is: dict[Hashable, bool] = {}
        self._lent: list[tuple[Hashable, Tensor, bool]] = []

    def lend(self, key: Hashable, cached: Tensor) -> Tensor:
        """Return the values of ``cached``, a copy or an alias, until ``settle``."""
        # writes under inference mode leave no trace
        is_copy = cached.is_inference() or not self._leaves_as_is.get(key, False)
        # an alias that counts its writes from 0, apart from ours into the cache
        lent = cached.clone() if is_copy else cached.data
        self._lent.append((key, lent, is_copy))
        return lent

    def settle(self) -> None:
        """Check whether a loan has been written into.

        Raises:
            UnsupportedInputError: the cache itself was, by a block that did not do so before.
        """
        lent, self._lent = self._lent, []
        for key, tensor, is_copy in lent:
            is_written = tensor.is_inference() or tensor._version > 0
            self._leaves_as_is[key] = not is_written
            if is_written and not is_copy:
                # the other blocks may do so too
                self._leaves_as_is.clear()
                raise UnsupportedInputError(
                    f"token cache: the block around {key} wrote into a cached output, which it had "
                    "left as it was in an earlier call; the run is forgotten, begin it again"
                )

    def forget(self) -> None:
        """Forget all loans when a call is broken off."""
        self._lent.clear()
