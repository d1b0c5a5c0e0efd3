"""The number of known finite differences of a cached feature when it is stored."""

from typing import NamedTuple


class Trend(NamedTuple):
    """Orders of finite differences that a step which stores a site's features makes known.

    Attributes:
        known: the highest order.
        gap: the steps since the features were stored last.
    """

    known: int = 0
    gap: int = 0


# nothing but the features themselves
NO_TREND = Trend()
