"""How far a cached feature lies back, and how many of its finite differences are known."""

from typing import NamedTuple


class Trend(NamedTuple):
    """Known orders of finite differences of a site's features, in the current step.

    Attributes:
        known: the orders of differences, counting the one that the step itself stores.
        distance: the steps since they were stored, or where the step stores, between the last two.
    """

    known: int = 0
    distance: int = 0


# nothing but the features themselves
NO_TREND = Trend()
