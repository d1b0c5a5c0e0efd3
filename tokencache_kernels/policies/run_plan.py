"""A sampling run decided in advance: the action of every site in every step, and its storage.

The runner executes a plan, graphs key their captures by it, and ``tokencache plan`` prices it, so
that plan and run cannot disagree.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..cache.trend import NO_TREND, Trend
from ..errors import UnsupportedInputError, fail
from .carriers import REUSE, Carrier
from .decisions import Action, Decision, Policy, Site, Step, list_remembered


@dataclass(frozen=True)
class LayerGroup:
    """The same module of all layers of a stack: its sites, and the tokens that it works on.

    Attributes:
        sites: by layer, from 0.
        num_tokens: N, the length of the sequence.
        grid: (H, W) with H * W = N if the tokens lie on one, else None.
        selects_late: whether scores may change within a step, so that tokens are selected layer by
            layer; otherwise one launch selects for all layers.
        is_whole: whether the module computes all tokens or none.
        shares_scores: whether its scores are those of the group before it.
        read_by: the module that reads its outputs, if no residual stream does.
    """

    sites: tuple[Site, ...]
    num_tokens: int
    grid: tuple[int, int] | None = None
    selects_late: bool = False
    is_whole: bool = False
    shares_scores: bool = False
    read_by: str | None = None


@dataclass(frozen=True)
class Selection:
    """Token lists of one group of layers, or of all groups together if a predictor scores blocks.

    Attributes:
        group: the group whose sizes they have.
        shares_scores: whether the scores are stored with those of the selection before.
    """

    group: LayerGroup
    shares_scores: bool


@dataclass(frozen=True)
class SiteStorage:
    """Buffers that a site needs, each of the size of its output.

    Attributes:
        features: 1 if some step reads a cached output, else 0.
        differences: finite differences kept for the forecast.
        keys: 2 if fresh queries see cached keys and values, else 0.
    """

    features: int
    differences: int
    keys: int


class RunPlan:
    """Every decision of a run of ``total`` steps that begins at step ``first``.

    The first step computes every site in full, whatever the policy says: nothing is cached yet.

    Attributes:
        policy: the policy that decides.
        groups: the model's cached modules.
        total: the steps of the sampler.
        first: the step at which the run begins (above 0 in image-to-image pipelines).
        decisions: by step from 0 to ``total``, then by site; empty before ``first``.
        selections: the token lists that the run makes.
    """

    def __init__(
        self,
        policy: Policy,
        groups: Sequence[LayerGroup],
        total: int | None = None,
        first: int = 0,
    ) -> None:
        """Ask the policy for every step and site.

        Raises:
            UnsupportedInputError: the policy wants some tokens of a module that is whole, or skips
                some sites of a step and not all.
        """
        self.policy = policy
        self.groups = tuple(groups)
        self.total = policy.num_inference_steps if total is None else total
        self.first = first
        self.decisions = [self._decide(index) for index in range(self.total)]
        self._skips = [_skips_blocks(step) for step in self.decisions]
        self._remembered: dict[Site, list[int]] = {}
        self._carriers: dict[Site, Carrier] = {}
        for group in self.groups:
            for site in group.sites:
                reader = None
                if group.read_by is not None:
                    reader = self.actions(replace(site, module=group.read_by))
                # an output that goes into another module is not forecast
                carrier = self._carriers[site] = REUSE if reader else policy.carrier
                stored = list_remembered(self.actions(site), carrier.order, reader)
                self._remembered[site] = [first + index for index in stored]
        self._selections: list[Selection] = []
        self._selection_of: dict[Site, int] = {}
        self._plan_selections()
        self._described: dict[int, Hashable] = {}

    def _decide(self, index: int) -> dict[Site, Decision]:
        if index < self.first:
            return {}
        step = Step(index, self.total)
        return {
            site: Decision(Action.FULL, group.num_tokens)
            if index == self.first
            else self.policy.decide(site, step, group.num_tokens)
            for group in self.groups
            for site in group.sites
        }

    def _plan_selections(self) -> None:
        for group in self.groups:
            partial = [
                site
                for step in self.decisions[self.first :]
                for site in group.sites
                if step[site].action is Action.PARTIAL
            ]
            if not partial:
                continue
            if group.is_whole:
                raise UnsupportedInputError(
                    "token cache: the policy must compute all tokens or none of a module that this "
                    f"model does not split, got some of {partial[0]}"
                )
            if not (self.is_predicted and self._selections):
                shares = (
                    group.shares_scores
                    and bool(self._selections)
                    and self._selections[-1].group.sites[0].stream == group.sites[0].stream
                    and not self.policy.selector.draws_on_host
                )
                self._selections.append(Selection(group, shares))
            self._selection_of.update(dict.fromkeys(group.sites, len(self._selections) - 1))

    @property
    def selections(self) -> tuple[Selection, ...]:
        """The token lists that the run makes, in the order of the groups."""
        return tuple(self._selections)

    @property
    def is_predicted(self) -> bool:
        """Tell whether a predictor scores blocks, so that modules of a block share a selection."""
        return self.policy.selector.base_score == "predicted"

    def decision(self, index: int, site: Site) -> Decision:
        """The action at ``site`` in step ``index``, and the number of its fresh tokens."""
        return self.decisions[index][site]

    def actions(self, site: Site) -> list[Action]:
        """The action at ``site`` in each step of the run, from ``first``."""
        return [step[site].action for step in self.decisions[self.first :]]

    def skips(self, index: int) -> bool:
        """Tell whether no block runs in step ``index``, which repeats the output of the step
        before.
        """
        return self._skips[index]

    def selects(self, index: int) -> bool:
        """Tell whether some site computes some of its tokens in step ``index``."""
        return any(one.action is Action.PARTIAL for one in self.decisions[index].values())

    def selection_of(self, site: Site) -> int | None:
        """The index of the site's selection in ``selections``; None if nothing is selected."""
        return self._selection_of.get(site)

    def stores(self, index: int, site: Site) -> bool:
        """Tell whether a site is computed in full in step ``index`` for a later step to read."""
        return index in self._remembered[site]

    def stores_keys(self, index: int, site: Site) -> bool:
        """Tell whether step ``index`` must also keep the keys and values of a self-attention."""
        return self.stores(index, site) and self._sees_cached_keys(site)

    def _sees_cached_keys(self, site: Site) -> bool:
        return site.module == "attn" and any(
            step[site].action is Action.PARTIAL and step[site].attention == "kv_cache"
            for step in self.decisions[self.first :]
        )

    def stores_output(self, index: int) -> bool:
        """Tell whether step ``index`` must keep the last block's output for a skipped step."""
        return not self._skips[index] and any(self._skips[index + 1 : index + 2])

    def trend(self, index: int, site: Site) -> Trend:
        """The finite differences of the site's output that step ``index`` makes known by storing.

        ``NO_TREND`` where it does not store.
        """
        stored = self._stored(index, site)
        known = min(len(stored) - 1, self._carriers[site].order)
        if known < 1 or stored[-1] != index:
            return NO_TREND
        return Trend(known, stored[-1] - stored[-2])

    def factors(self, index: int, site: Site) -> tuple[float, ...]:
        """The carrier's factors of the site's differences in step ``index``, from order 0.

        Empty where the step computes the site in full, or has nothing to read.

        Raises:
            ValueError: the carrier does not keep a constant as it is.
        """
        stored, carrier = self._stored(index, site), self._carriers[site]
        if not stored or self.decisions[index][site].action in (Action.FULL, Action.SKIP):
            return ()
        factors = carrier.factors(stored, index)
        # fresh tokens have no differences, and must keep the value that they were given
        if factors[0] != 1:
            fail(type(carrier).__name__, "factors", "begin with 1 inside a model", factors)
        return factors

    def _stored(self, index: int, site: Site) -> list[int]:
        return [one for one in self._remembered[site] if one <= index]

    def describe_step(self, index: int) -> Hashable:
        """Everything that determines the launches of step ``index``: steps alike share a graph."""
        if index not in self._described:
            step, selector = self.decisions[index], self.policy.selector
            goes_by_step = self.selects(index) and not selector.is_timeless
            self._described[index] = (
                tuple(step.items()),
                tuple(self.stores(index, site) for site in step),
                tuple(self.trend(index, site) for site in step),
                tuple(self.factors(index, site) for site in step),
                self.stores_output(index),
                index if goes_by_step else None,
            )
        return self._described[index]

    def storage(self, site: Site) -> SiteStorage:
        """The buffers that the site needs in the whole run."""
        times = len(self._remembered[site])
        return SiteStorage(
            features=min(times, 1),
            differences=min(max(times - 1, 0), self._carriers[site].order),
            keys=2 if times and self._sees_cached_keys(site) else 0,
        )

    @cached_property
    def has_skips(self) -> bool:
        """Tell whether some step runs no block."""
        return any(self._skips)


def _skips_blocks(decisions: dict[Site, Decision]) -> bool:
    skipping = [decision.action is Action.SKIP for decision in decisions.values()]
    if any(skipping) and not all(skipping):
        raise UnsupportedInputError(
            "token cache: the policy must skip all sites of a step or none, got "
            f"{sum(skipping)} of {len(skipping)}"
        )
    return any(skipping)
