"""DuCa (arXiv:2412.18911): between full steps, partial and aggressive steps take turns."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import fail
from .carriers import Carrier
from .decisions import Action, Decision, Site, Step
from .routers import FactorRouter
from .selectors import ScoreSelector, Selector
from .toca import ToCaConfig


@dataclass(frozen=True)
class DuCaConfig:
    """ToCa, but every second step of a cycle is aggressive: it runs no block at all.

    In an aggressive step the last block's output of the step before goes into the final layer,
    which alone sees the step. A step that is not full is aggressive if its place in the cycle is
    even, or if ``skips_odd``, odd; see ``CyclicSchedule.place``.

    Attributes:
        toca: the policy of the other steps; its schedule must be cyclic.
        skips_odd: which places are aggressive.
    """

    toca: ToCaConfig
    skips_odd: bool = False

    def __post_init__(self) -> None:
        if not hasattr(self.toca.schedule, "place"):
            got = type(self.toca.schedule).__name__
            fail("DuCaConfig", "toca", "have a schedule of cycles", got)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "DuCaConfig":
        """Build the published setting of a model, or a variation of it.

        Args:
            name: ``"dit-xl-ddim50"``, ``"pixart-alpha"``, ``"opensora"`` or ``"flux-1-dev"``.
            changes: as for ``ToCaConfig.preset``; with a ``seed`` the tokens are drawn at random,
                as in DuCa's second version.
        """
        if name not in _PRESETS:
            fail("DuCaConfig.preset", "name", f"be one of {', '.join(_PRESETS)}", repr(name))
        row = _PRESETS[name]
        if changes.get("fresh_ratio") is None:
            changes["fresh_ratio"] = row.fresh_ratio
        toca = ToCaConfig.preset(name, **changes)
        if isinstance(toca.selector, ScoreSelector):
            toca = replace(toca, selector=replace(toca.selector, **row.selector))
        if row.ignores_time and isinstance(toca.router, FactorRouter):
            toca = replace(toca, router=replace(toca.router, time_slope=0.0))
        return cls(toca, row.skips_odd)

    @property
    def num_inference_steps(self) -> int:
        """The number of the sampler's steps."""
        return self.toca.num_inference_steps

    @property
    def selector(self) -> Selector:
        """The selector of the fresh tokens of a partial step."""
        return self.toca.selector

    @property
    def carrier(self) -> Carrier:
        """The carrier of partial steps; aggressive steps carry nothing on."""
        return self.toca.carrier

    @property
    def num_layers(self) -> int | None:
        """None: the policy fits any depth."""
        return None

    @property
    def predictor(self) -> None:
        """None: no network scores tokens."""
        return None

    def decide(self, site: Site, step: Step, num_tokens: int) -> Decision:
        """Decide the work at ``site`` in ``step``; ``num_tokens`` is the length of its sequence."""
        decision = self.toca.decide(site, step, num_tokens)
        if decision.action is not Action.FULL and self._is_aggressive(step):
            return Decision(Action.SKIP, 0)
        return decision

    def _is_aggressive(self, step: Step) -> bool:
        schedule: Any = self.toca.schedule
        place: int = schedule.place(step)
        return place > 0 and place % 2 == self.skips_odd


@dataclass(frozen=True)
class _Preset:
    """Changes of a model's published setting to ToCa's."""

    fresh_ratio: float
    skips_odd: bool = False
    ignores_time: bool = False
    selector: Mapping[str, Any] = field(default_factory=dict)


_PRESETS = {
    "dit-xl-ddim50": _Preset(0.05, selector={"bonus": 0.8}),
    "pixart-alpha": _Preset(0.75, ignores_time=True),
    "opensora": _Preset(0.10, selector={"base_score": "value_norm"}),
    # the published totals say which places are aggressive
    "flux-1-dev": _Preset(0.10, skips_odd=True),
}
