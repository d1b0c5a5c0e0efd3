"""Asks the policy what every site does in each step, and makes the step's index lists."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import ops
from ..cache import NO_TREND, FeatureCache, TokenState, Trend
from ..errors import CacheMissError, UnsupportedInputError
from ..policies import (
    Action,
    Decision,
    Policy,
    RandomSelector,
    ScoreSelector,
    Selector,
    Site,
    Step,
    list_remembered,
)
from ..policies.selectors import DRAWN

# of the first step of every run; see ``Runner.kind``
FIRST_KIND: Hashable = (0, frozenset())


@dataclass(frozen=True)
class Lane:
    """One kind of sub-layer, a site for each layer, and the sequence of tokens it works on.

    Attributes:
        sites: by layer, from 0.
        num_tokens: N, the length of the sequence.
        grid: (H, W) with H * W = N where the tokens lie on one, else None.
        selects_late: whether a layer's scores may still change within the step, so that its tokens
            are selected when it is reached; otherwise one launch selects for all layers at once.
        is_whole: whether its sub-layers compute all tokens or none.
        shares_scores: whether its tokens are scored together with those of the lane before it:
            what is stored for a site of one of them is stored for both.
        read_by: the module that its outputs go into, where they go into no stream.
    """

    sites: tuple[Site, ...]
    num_tokens: int
    grid: tuple[int, int] | None = None
    selects_late: bool = False
    is_whole: bool = False
    shares_scores: bool = False
    read_by: str | None = None


_Beginning = tuple[tuple[Lane, ...], int, torch.device]


class Runner:
    """One sampling run of one cache context: where it is, what it remembers, what it decides.

    All that a step launches follows from its ``kind``, decided before a run, and from tensors at
    fixed addresses: a step that is replayed from a captured graph is ``prepare_step``, the replay,
    ``finish_step``, and leaves the runner as one that was run.

    Attributes:
        features: the cached outputs of all sub-layers.
        backend: the backend of all ops.
        known: what the run has computed ``once`` so far.
    """

    def __init__(self, policy: Policy, backend: str = "auto") -> None:
        self.features = FeatureCache()
        self.backend = backend
        self.known: frozenset[Hashable] = frozenset()
        self._policy = policy
        self._outputs = FeatureCache()
        self._once = FeatureCache()
        self._step_index = 0
        self._began_with: _Beginning | None = None
        self._prepared: _Beginning | None = None

    def begin_step(
        self,
        lanes: Sequence[Lane],
        batch: int,
        device: torch.device,
        predict_scores: Callable[[Step], Tensor] | None = None,
    ) -> None:
        """Select the fresh tokens of all layers, in one launch for each lane.

        A predictor scores blocks: under its policy all lanes share one selection.

        Args:
            lanes: the model's sub-layers; the same ones in every step of a run.
            batch: B.
            device: where the hidden states are.
            predict_scores: gives the scores (L, B, N) of the step under way; called in steps that
                select some token, if the policy's selector goes by predicted scores.

        Raises:
            CacheMissError: the batch or the lanes are not those that the run began with.
            UnsupportedInputError: the policy wants some tokens of a sub-layer that is whole, or
                skips some sites of a step and not all.
        """
        beginning = tuple(lanes), batch, device
        if beginning != self._prepared:
            self._prepare(*beginning)
        self._prepared = None
        if self.skips_blocks:
            return
        if self._is_predicted and self._selects_at(self._step_index):
            assert predict_scores is not None, "adapters refuse scores that they cannot give"
            self._selections[0].tokens.scores.copy_(predict_scores(self.step))
        for selection in self._selections:
            selection.begin_step(self._step_index)

    def prepare_step(self) -> None:
        """Do ahead what ``begin_step`` does on the host, with the lanes of the step before."""
        assert self._began_with is not None, "a first step says what the lanes are"
        self._prepare(*self._began_with)
        self._prepared = self._began_with

    def _prepare(self, lanes: tuple[Lane, ...], batch: int, device: torch.device) -> None:
        """Begin a run where it is time, and draw what is drawn on the host."""
        if self._step_index == 0:
            self._begin_run(lanes, batch, device)
        elif self._began_with is not None and (lanes, batch) != self._began_with[:2]:
            began, now = _describe(*self._began_with[:2]), _describe(lanes, batch)
            raise CacheMissError(
                f"begin_step: step {self._step_index} must have {began} as the run began, got "
                f"{now}; reset the cache before sampling with another batch or size"
            )
        if not self.skips_blocks:
            for selection in self._selections:
                selection.prepare_step(self._step_index)

    def _begin_run(self, lanes: tuple[Lane, ...], batch: int, device: torch.device) -> None:
        """Forget the run before; what is planned and allocated for the same lanes stays."""
        self.known = frozenset()
        if (lanes, batch, device) == self._began_with:
            for selection in self._selections:
                selection.tokens.reset()
            return
        # until the plan is made: it may be refused
        self._began_with = None
        self._plan_run(lanes)
        self._make_selections(lanes, batch, device)
        self._began_with = lanes, batch, device

    def _plan_run(self, lanes: Sequence[Lane]) -> None:
        """Decide all steps at once."""
        total, order = self._policy.num_inference_steps, self._policy.forecast_order
        self._run: list[dict[Site, Decision]] = [
            {
                site: self._policy.decide(site, Step(index, total), lane.num_tokens)
                for lane in lanes
                for site in lane.sites
            }
            for index in range(total)
        ]
        self._skips = [_skips_blocks(step) for step in self._run]
        self._remembered: dict[Site, list[int]] = {}
        self._orders: dict[Site, int] = {}
        for lane in lanes:
            for site in lane.sites:
                reader = None
                if lane.read_by is not None:
                    reader = self._actions(replace(site, module=lane.read_by))
                # what goes into another sub-layer is not forecast
                self._orders[site] = 0 if reader else order
                self._remembered[site] = list_remembered(
                    self._actions(site), self._orders[site], reader
                )
        first: dict[Hashable, int] = {}
        self._kinds = [
            first.setdefault(self._describe_step(index), index) for index in range(total)
        ]

    def _make_selections(self, lanes: Sequence[Lane], batch: int, device: torch.device) -> None:
        """Allocate the states of all tokens, and copy the counts of the run to the device."""
        self._selections: list[_LaneSelection] = []
        self._selection_of: dict[Site, _LaneSelection] = {}
        for lane in lanes:
            partial = [
                site
                for step in self._run
                for site in lane.sites
                if step[site].action is Action.PARTIAL
            ]
            if not partial:
                continue
            if lane.is_whole:
                raise UnsupportedInputError(
                    "begin_step: the policy must compute all tokens or none of a sub-layer that "
                    f"this model does not split, got some of {partial[0]}"
                )
            if not (self._is_predicted and self._selections):
                selection = _LaneSelection(
                    self._policy, lane, self._run, batch, device, self.backend
                )
                if lane.shares_scores and self._selections and not selection.is_drawn:
                    selection.tokens.scores = self._selections[-1].tokens.scores
                self._selections.append(selection)
            self._selection_of.update(dict.fromkeys(lane.sites, self._selections[-1]))

    def _describe_step(self, index: int) -> Hashable:
        """All on which it depends what a step launches: equal descriptions, equal launches."""
        step, selector = self._run[index], self._policy.selector
        # a predictor, or a selector that we do not know, may go by the step itself
        is_timeless = isinstance(selector, (ScoreSelector, RandomSelector))
        goes_by_step = self._selects_at(index) and (self._is_predicted or not is_timeless)
        return (
            tuple(step.items()),
            tuple(index in self._remembered[site] for site in step),
            tuple(self._find_trend(site, index) for site in step),
            self._keeps_output(index),
            index if goes_by_step else None,
        )

    def _actions(self, site: Site) -> list[Action]:
        """What the site does in each step of the run."""
        return [step[site].action for step in self._run]

    @property
    def _is_predicted(self) -> bool:
        return self._policy.selector.base_score == "predicted"

    @property
    def step(self) -> Step:
        """The step under way."""
        return Step(self._step_index, self._policy.num_inference_steps)

    @property
    def kind(self) -> Hashable:
        """What the step under way launches, in so far as Python decides it."""
        return self._kinds[self._step_index], self.known

    @property
    def skips_blocks(self) -> bool:
        """Whether no block runs in this step: the output of the step before stands."""
        return self._skips[self._step_index]

    def decision(self, site: Site) -> Decision:
        """What the site does in this step, and how."""
        return self._run[self._step_index][site]

    def action(self, site: Site) -> Action:
        """What the site does in this step."""
        return self.decision(site).action

    def _selects_at(self, index: int) -> bool:
        return any(one.action is Action.PARTIAL for one in self._run[index].values())

    def is_full(self, sites: Sequence[Site]) -> bool:
        """Whether all of them compute every token in this step."""
        return all(self.action(site) is Action.FULL for site in sites)

    def is_remembered(self, site: Site) -> bool:
        """Whether the site is computed in full now and a later step draws on that."""
        return self._step_index in self._remembered[site]

    def keeps_keys(self, site: Site) -> bool:
        """Whether the site's keys and values are to be kept now, for the next step's queries."""
        return self.is_remembered(site) and any(
            step[site].action is Action.PARTIAL and step[site].attention == "kv_cache"
            for step in self._run
        )

    def is_selected(self, site: Site) -> bool:
        """Whether some of the site's tokens are selected in some step of the run."""
        return site in self._selection_of

    def trend(self, site: Site) -> Trend:
        """What is known in this step of how the site's output changes."""
        return self._find_trend(site, self._step_index)

    def _find_trend(self, site: Site, index: int) -> Trend:
        if self._orders[site] == 0:
            return NO_TREND
        stored = [one for one in self._remembered[site] if one <= index]
        known = min(len(stored) - 1, self._orders[site])
        is_full = self._run[index][site].action is Action.FULL
        if known < 1 or (is_full and index not in stored):
            return NO_TREND
        return Trend(known, stored[-1] - stored[-2] if is_full else index - stored[-1])

    def remember(self, site: Site, output: Tensor, feature: Site | None = None) -> None:
        """Store what a full computation of the site gave, if a later step draws on it.

        A site with several outputs stores each as a ``feature`` of its own.
        """
        if self.is_remembered(site):
            self.features.store(feature or site, output, self.trend(site))
        if site in self._selection_of:
            self._selection_of[site].mark_fresh(site.layer)

    def once(self, name: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """What is the same in all steps of a run, computed where it is first asked for."""
        if name not in self.known:
            self._once.store(name, compute())
            self.known |= {name}
        return self._once.load(name)

    def selection(self, site: Site) -> tuple[Tensor, Tensor]:
        """The site's indices (B, S), S its own number of fresh tokens, and positions (B, N)."""
        return self._selection_of[site].select(site.layer, self._step_index)

    def store_scores(self, site: Site, scores: Tensor) -> None:
        """Keep the scores (B, N) that a full step gave the site, if its tokens are selected."""
        if site in self._selection_of:
            self._selection_of[site].tokens.store_scores(site.layer, scores)

    def refresh_scores(self, site: Site, indices: Tensor, scores: Tensor) -> None:
        """Replace the scores of the tokens at ``indices`` (B, S) by ``scores`` (B, S)."""
        if site in self._selection_of:
            kept = self._selection_of[site].tokens.scores[site.layer]
            rows = scores[..., None].to(kept.dtype)
            ops.scatter_rows_(kept[..., None], indices, rows, backend=self.backend)

    def remember_output(self, output: Tensor) -> None:
        """Store what the last block gave, if the next step skips the blocks."""
        if self._keeps_output(self._step_index):
            self._outputs.store("output", output)

    def _keeps_output(self, index: int) -> bool:
        return not self._skips[index] and any(self._skips[index + 1 : index + 2])

    def load_output(self, like: Tensor) -> Tensor:
        """What the last block gave when the blocks last ran."""
        return self._outputs.load("output", like)

    def finish_step(self, known: frozenset[Hashable]) -> None:
        """End a step that was prepared and replayed, and left ``known`` when it was captured."""
        self.known = known
        self._prepared = None
        self.end_step()

    def end_step(self) -> None:
        """Go on to the next step; after the last one a new run begins."""
        self._step_index = (self._step_index + 1) % self._policy.num_inference_steps


class _LaneSelection:
    """The index lists of one lane, whose tokens are selected in some step."""

    def __init__(
        self,
        policy: Policy,
        lane: Lane,
        run: list[dict[Site, Decision]],
        batch: int,
        device: torch.device,
        backend: str,
    ) -> None:
        self.lane = lane
        self.tokens = TokenState(len(lane.sites), batch, lane.num_tokens, device)
        self._selector: Selector = policy.selector
        self._draw = None
        if isinstance(self._selector, RandomSelector):
            # on the host, hence before the step: from then on they are scores like others
            self._draw = self._selector.draw_scores
            self._selector = DRAWN
        self._total = policy.num_inference_steps
        self._backend = backend
        decisions = [[step[site] for site in lane.sites] for step in run]
        self._all_full = [all(one.action is Action.FULL for one in step) for step in decisions]
        # a full layer selects nothing
        self._counts = [
            [0 if one.action is Action.FULL else one.num_fresh for one in step]
            for step in decisions
        ]
        self._num_fresh = torch.tensor(self._counts, dtype=torch.int32, device=device)

    @property
    def is_drawn(self) -> bool:
        """Whether tokens are drawn at random."""
        return self._draw is not None

    def prepare_step(self, step_index: int) -> None:
        """Draw the scores of all layers, if they are drawn."""
        if self._draw is not None and not self._all_full[step_index]:
            step = Step(step_index, self._total)
            self.tokens.scores.copy_(self._draw(self.lane.sites, step, self.tokens.staleness))

    def begin_step(self, step_index: int) -> None:
        """Select for all layers, or leave it to each of them."""
        if self._all_full[step_index]:
            return
        if not self.lane.selects_late:
            self._indices, self._positions = self._select(step_index, 0, len(self.lane.sites))
            return
        # layers that select nothing are not reached again, and their tokens wait all the same
        is_waiting = self._num_fresh[step_index] == 0
        self.tokens.staleness.add_(is_waiting[:, None, None])

    def select(self, layer: int, step_index: int) -> tuple[Tensor, Tensor]:
        """The layer's indices and positions."""
        if self.lane.selects_late:
            indices, positions = self._select(step_index, layer, layer + 1)
            return indices[0], positions[0]
        count = self._counts[step_index][layer]
        return self._indices[layer, :, :count], self._positions[layer]

    def _select(self, step_index: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Select for the layers in [first, last); staleness grows also where nothing is taken."""
        return self._selector.select_(
            self.tokens.scores[first:last], self.tokens.staleness[first:last],
            self._num_fresh[step_index, first:last], max(self._counts[step_index][first:last]),
            sites=self.lane.sites[first:last],
            step=Step(step_index, self._total), grid=self.lane.grid, backend=self._backend,
        )  # fmt: skip

    def mark_fresh(self, layer: int) -> None:
        """The layer has computed all its tokens."""
        self.tokens.mark_fresh(layer)


def _skips_blocks(decisions: Mapping[Site, Decision]) -> bool:
    skipping = [decision.action is Action.SKIP for decision in decisions.values()]
    if any(skipping) and not all(skipping):
        raise UnsupportedInputError(
            "begin_step: the policy must skip all sites of a step or none, got "
            f"{sum(skipping)} of {len(skipping)}"
        )
    return any(skipping)


def _describe(lanes: Sequence[Lane], batch: int) -> str:
    tokens = ", ".join(str(lane.num_tokens) for lane in lanes)
    return f"a batch of {batch} with {tokens} tokens"
