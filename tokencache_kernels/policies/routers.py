"""Routers: the fraction of tokens that each site recomputes in a partial step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ..errors import fail
from .decisions import Site, Step


class Router(Protocol):
    """Distributes the work of a partial step over the sites."""

    def fresh_ratio(self, site: Site, step: Step) -> float:
        """The share of tokens to recompute at ``site``, in [0, 1]."""


@dataclass(frozen=True)
class FactorRouter:
    """Scale one base ratio by depth, by time, by kind of module and by stream.

    ``ratio = base * depth * time * module_weight[module] * stream_weight[stream]``, clipped to
    [0, 1], with ``depth = 1 + depth_slope * (1 - 2 * layer / (num_layers - 1))`` and ``time = 1 +
    time_slope * (1 - 2 * s / total)``, where ``s`` is the step as the published code counts it. A
    weight that is not given is 1; layers past ``num_layers`` continue the line.
    """

    base: float
    num_layers: int = 1
    depth_slope: float = 0.0
    time_slope: float = 0.0
    counts_down: bool = False
    module_weight: Mapping[str, float] = field(default_factory=dict)
    stream_weight: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.base <= 1:
            fail(type(self).__name__, "base", "be in [0, 1]", self.base)
        if self.num_layers < 1:
            fail(type(self).__name__, "num_layers", "be at least 1", self.num_layers)

    def fresh_ratio(self, site: Site, step: Step) -> float:
        """The share of tokens to recompute at ``site``, in [0, 1]."""
        depth = 1 + self.depth_slope * (1 - 2 * site.layer / max(self.num_layers - 1, 1))
        time = 1 + self.time_slope * (1 - 2 * step.counter(self.counts_down) / step.total)
        weight = self.module_weight.get(site.module, 1.0) * self.stream_weight.get(site.stream, 1.0)
        return min(max(self.base * depth * time * weight, 0.0), 1.0)
