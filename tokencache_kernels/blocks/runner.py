"""The state of a sampling run: its current step, cached features, and lists of fresh tokens."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import ops
from ..cache import FeatureCache, TokenState, Trend
from ..errors import CacheMissError
from ..policies import Action, Decision, LayerGroup, Policy, RunPlan, Selector, Site, Step
from ..policies.selectors import DRAWN

# plans kept for runs of other lengths
_MAX_PLANS = 4


@dataclass(frozen=True)
class Place:
    """The position of a step in its run.

    Attributes:
        index: from 0.
        total: the steps of the sampler.
        begins: whether a new run begins with this step.
    """

    index: int
    total: int
    begins: bool


@dataclass(frozen=True)
class _Inputs:
    """Everything about a step's inputs that must not change within a run."""

    groups: tuple[LayerGroup, ...]
    batch: int
    device: torch.device
    is_guidance_pair: bool


class Runner:
    """One sampling run of one cache context.

    The launches of a step follow from ``kind``, decided before the run, and from tensors at fixed
    addresses. A step that is replayed from a captured graph is ``prepare_step``, the replay, and
    ``finish_step``; it leaves the runner like a step that was run.

    Attributes:
        features: the cached outputs of all sites.
        backend: the backend of all ops.
        known: the names of everything that the run has computed ``once`` so far.
        plan: the decisions of the run; None before the first step.
    """

    def __init__(self, policy: Policy, backend: str = "auto") -> None:
        self.features = FeatureCache()
        self.backend = backend
        self.known: frozenset[Hashable] = frozenset()
        self.plan: RunPlan | None = None
        self._policy = policy
        self._outputs = FeatureCache()
        self._once = FeatureCache()
        self._place: Place | None = None
        self._last_index: int | None = None
        self._began_with: _Inputs | None = None
        self._prepared: _Inputs | None = None
        self._plans: dict[Hashable, tuple[RunPlan, list[_GroupSelection]]] = {}
        self._tokens: dict[Hashable, TokenState] = {}
        self._selections: list[_GroupSelection] = []
        self._kinds: dict[Hashable, int] = {}
        self._kind: Hashable = None

    def place(self, index: int, total: int, begins: bool) -> None:
        """Say where the next step lies in its run; without this, steps are counted."""
        self._place = Place(index, total, begins)

    def forget_run(self) -> None:
        """Let the next step begin a new run; buffers and plans stay."""
        self._last_index = self._place = None

    def begin_step(
        self,
        groups: Sequence[LayerGroup],
        batch: int,
        device: torch.device,
        predict_scores: Callable[[Step], Tensor] | None = None,
        is_guidance_pair: bool = True,
    ) -> None:
        """Select the fresh tokens of all layers, in one launch for each group of layers.

        A predictor scores blocks: under its policy all groups share one selection.

        Args:
            groups: the model's cached modules; the same ones in every step of a run.
            batch: B.
            device: the device of the hidden states.
            predict_scores: gives the scores (L, B, N) of the current step; called in steps that
                select some token, if the policy's selector goes by predicted scores.
            is_guidance_pair: whether the halves of the batch are the two passes of guidance.

        Raises:
            CacheMissError: the batch or the sizes are not those that the run began with.
            UnsupportedInputError: the policy wants some tokens of a module that is whole, or skips
                some sites of a step and not all.
        """
        inputs = _Inputs(tuple(groups), batch, device, is_guidance_pair)
        if inputs != self._prepared:
            self._prepare(inputs)
        self._prepared = None
        index, plan = self._index, self._run
        self._kind = (self._kind_of(index), self.known)
        if plan.skips(index):
            return
        if plan.is_predicted and plan.selects(index):
            assert predict_scores is not None, "policies that predict are refused without scores"
            self._selections[0].tokens.scores.copy_(predict_scores(self.step))
        for selection in self._selections:
            selection.begin_step(index)

    def prepare_step(self) -> Hashable:
        """Run the host's part of ``begin_step`` early, with the inputs of the step before.

        Returns:
            The step's ``kind``; None before the first step of all.
        """
        if self._began_with is None:
            return None
        self._prepare(self._began_with)
        self._prepared = self._began_with
        self._kind = (self._kind_of(self._index), self.known)
        return self._kind

    def _prepare(self, inputs: _Inputs) -> None:
        """Begin a run where it is time, and draw random scores on the host."""
        self._place = place = self._place or self._count_step()
        if place.begins or self._began_with is None:
            self._begin_run(inputs, place)
        elif inputs != self._began_with:
            raise CacheMissError(
                f"token cache: batch or size changed at step {place.index} of a run (was "
                f"{_describe(self._began_with)}, now {_describe(inputs)}); call reset_token_cache "
                "first"
            )
        if not self._run.skips(place.index):
            for selection in self._selections:
                selection.prepare_step(place.index)

    def _count_step(self) -> Place:
        total = self._policy.num_inference_steps
        index = 0 if self._last_index is None else (self._last_index + 1) % total
        return Place(index, total, begins=index == 0)

    def _begin_run(self, inputs: _Inputs, place: Place) -> None:
        """Forget the run before; plans and buffers of the same sizes stay."""
        self.known = frozenset()
        # until the plan is made: it may be refused
        began_with, self._began_with = self._began_with, None
        if began_with is not None and inputs != began_with:
            self._plans.clear()
            self._tokens.clear()
        key = place.total, place.index
        if key not in self._plans:
            plan = RunPlan(self._policy, inputs.groups, place.total, place.index)
            while len(self._plans) >= _MAX_PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = plan, self._make_selections(plan, inputs)
        self.plan, self._selections = self._plans[key]
        for selection in self._selections:
            selection.tokens.reset()
        self._began_with = inputs

    def _make_selections(self, plan: RunPlan, inputs: _Inputs) -> "list[_GroupSelection]":
        """Copy the counts of the run to the device; token states are shared by all plans."""
        selector: Selector = self._policy.selector
        if selector.shares_guidance and not inputs.is_guidance_pair:
            selector = replace(selector, shares_guidance=False)  # type: ignore[type-var]
        selections: list[_GroupSelection] = []
        for planned in plan.selections:
            group = planned.group
            tokens = self._tokens.get(group)
            if tokens is None:
                tokens = TokenState(len(group.sites), inputs.batch, group.num_tokens, inputs.device)
                if planned.shares_scores:
                    tokens.scores = selections[-1].tokens.scores
                self._tokens[group] = tokens
            selections.append(_GroupSelection(plan, group, selector, tokens, self.backend))
        return selections

    @property
    def _run(self) -> RunPlan:
        assert self.plan is not None, "a step begins before anything is asked of it"
        return self.plan

    @property
    def _index(self) -> int:
        assert self._place is not None, "a step begins before anything is asked of it"
        return self._place.index

    def _kind_of(self, index: int) -> int:
        """A number for the launches of a step, the same in all plans of the same groups."""
        plan = self._run
        return self._kinds.setdefault(plan.describe_step(index), len(self._kinds))

    @property
    def batch(self) -> int:
        """The samples of the run under way."""
        assert self._began_with is not None, "a step begins before anything is asked of it"
        return self._began_with.batch

    @property
    def step(self) -> Step:
        """The current step."""
        return Step(self._index, self._run.total)

    @property
    def kind(self) -> Hashable:
        """A key of the launches of the current step; steps of equal kinds share a graph."""
        return self._kind

    @property
    def is_at_end(self) -> bool:
        """Tell whether the last step of the run has ended, or no run has begun."""
        return self._last_index is None or self._last_index + 1 >= self._run.total

    @property
    def last_index(self) -> int | None:
        """The index of the last step that ended; None if no run is under way."""
        return self._last_index

    @property
    def begins(self) -> bool:
        """Tell whether a run begins with the step that has been placed."""
        return self._place is not None and self._place.begins

    @property
    def skips_blocks(self) -> bool:
        """Tell whether no block runs in this step, which repeats the output of the step before."""
        return self._run.skips(self._index)

    def decision(self, site: Site) -> Decision:
        """The action at the site in this step, and the number of its fresh tokens."""
        return self._run.decision(self._index, site)

    def action(self, site: Site) -> Action:
        """The action at the site in this step."""
        return self.decision(site).action

    def is_full(self, sites: Sequence[Site]) -> bool:
        """Tell whether all of them compute every token in this step."""
        return all(self.action(site) is Action.FULL for site in sites)

    def is_remembered(self, site: Site) -> bool:
        """Tell whether the site is computed in full now for a later step to read."""
        return self._run.stores(self._index, site)

    def keeps_keys(self, site: Site) -> bool:
        """Tell whether the site's keys and values must be kept now, for fresh queries of later
        steps.
        """
        return self._run.stores_keys(self._index, site)

    def is_selected(self, site: Site) -> bool:
        """Tell whether some of the site's tokens are selected in some step of the run."""
        return self._run.selection_of(site) is not None

    def trend(self, site: Site) -> Trend:
        """The finite differences of the site's output that this step makes known by storing."""
        return self._run.trend(self._index, site)

    def differences(self, site: Site, feature: Site | None = None) -> list[tuple[Tensor, float]]:
        """The differences of a cached output, and their factors in this step.

        ``feature`` names one of several outputs of a site; see ``remember``.
        """
        factors = self._run.factors(self._index, site)
        return self.features.differences(feature or site, factors)

    def remember(self, site: Site, output: Tensor, feature: Site | None = None) -> None:
        """Store the output of a full computation, if a later step reads it.

        A site with several outputs stores each as a ``feature`` of its own.
        """
        if self.is_remembered(site):
            self.features.store(feature or site, output, self.trend(site))
        selection = self._find_selection(site)
        if selection is not None:
            selection.tokens.mark_fresh(selection.row(site))

    def once(self, name: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """Return a tensor that is the same in all steps of a run, computed on first use."""
        if name not in self.known:
            self._once.store(name, compute())
            self.known |= {name}
        return self._once.load(name)

    def selection(self, site: Site) -> tuple[Tensor, Tensor]:
        """The site's indices (B, S), S its own number of fresh tokens, and positions (B, N)."""
        selection = self._find_selection(site)
        assert selection is not None, "only sites with partial steps are selected"
        return selection.select(selection.row(site), self._index)

    def store_scores(self, site: Site, scores: Tensor) -> None:
        """Keep the scores (B, N) that a full step gave the site, if its tokens are selected."""
        selection = self._find_selection(site)
        if selection is not None:
            selection.tokens.store_scores(selection.row(site), scores)

    def refresh_scores(self, site: Site, indices: Tensor, scores: Tensor) -> None:
        """Replace the scores of the tokens at ``indices`` (B, S) by ``scores`` (B, S)."""
        selection = self._find_selection(site)
        if selection is not None:
            kept = selection.tokens.scores[selection.row(site)]
            rows = scores[..., None].to(kept.dtype)
            ops.scatter_rows_(kept[..., None], indices, rows, backend=self.backend)

    def token_state(self, site: Site) -> TokenState | None:
        """Scores and staleness of the site's group of layers; None if nothing is selected."""
        selection = self._find_selection(site)
        return None if selection is None else selection.tokens

    def token_row(self, site: Site) -> int:
        """The row of the site's layer in its ``token_state``."""
        selection = self._find_selection(site)
        assert selection is not None, "only sites with partial steps have token states"
        return selection.row(site)

    def _find_selection(self, site: Site) -> "_GroupSelection | None":
        place = self._run.selection_of(site)
        return None if place is None else self._selections[place]

    def remember_output(self, output: Tensor) -> None:
        """Store the last block's output, if the next step skips the blocks."""
        if self._run.stores_output(self._index):
            self._outputs.store("output", output)

    def load_output(self, like: Tensor) -> Tensor:
        """The last block's output of the last step that ran the blocks."""
        return self._outputs.load("output", like)

    def finish_step(self, known: frozenset[Hashable]) -> None:
        """End a step that was prepared and replayed, and left ``known`` when it was captured."""
        self.known = known
        self._prepared = None
        self.end_step()

    def end_step(self) -> None:
        """Go on to the next step; behind the last one a new run begins."""
        self._last_index = self._index
        self._place = None

    def count_bytes(self) -> dict[str, int]:
        """The bytes of all buffers, by their use."""
        states = [selection.tokens for selection in self._selections]
        scores = {state.scores.data_ptr(): state.scores.nbytes for state in states}
        return {
            "features": self.features.count_bytes(),
            "output": self._outputs.count_bytes(),
            "text": self._once.count_bytes(),
            "scores": sum(scores.values()),
            "staleness": sum(state.staleness.nbytes for state in states),
        }


class _GroupSelection:
    """The token lists of one group of layers under one plan."""

    def __init__(
        self,
        plan: RunPlan,
        group: LayerGroup,
        selector: Selector,
        tokens: TokenState,
        backend: str,
    ) -> None:
        self.tokens = tokens
        self._group = group
        self._selector = DRAWN if selector.draws_on_host else selector
        # on the host, hence before the step: from then on they are scores like others
        self._draw = selector.draw_scores if selector.draws_on_host else None
        self._late: dict[int, tuple[Tensor, Tensor]] = {}
        self._row = {site.layer: row for row, site in enumerate(group.sites)}
        self._total = plan.total
        self._backend = backend
        decisions = [
            [step[site] for site in group.sites] if step else [] for step in plan.decisions
        ]
        self._all_full = [all(one.action is Action.FULL for one in step) for step in decisions]
        # a full layer selects nothing
        self._counts = [
            [0 if one.action is Action.FULL else one.num_fresh for one in step]
            or [0] * len(group.sites)
            for step in decisions
        ]
        device = tokens.scores.device
        with torch.inference_mode(False):
            self._num_fresh = torch.tensor(self._counts, dtype=torch.int32, device=device)

    def row(self, site: Site) -> int:
        """The place of the site's layer among those of the group."""
        return self._row[site.layer]

    def prepare_step(self, step_index: int) -> None:
        """Draw the scores of all layers, if they are drawn."""
        if self._draw is not None and not self._all_full[step_index]:
            step = Step(step_index, self._total)
            self.tokens.scores.copy_(self._draw(self._group.sites, step, self.tokens.staleness))

    def begin_step(self, step_index: int) -> None:
        """Select for all layers, or leave it to each of them."""
        self._late.clear()
        if self._all_full[step_index]:
            return
        if not self._group.selects_late:
            self._indices, self._positions = self._select(step_index, 0, len(self._group.sites))
            return
        # layers that select nothing are not reached again, and their tokens wait all the same
        is_waiting = self._num_fresh[step_index] == 0
        self.tokens.staleness.add_(is_waiting[:, None, None])

    def select(self, layer: int, step_index: int) -> tuple[Tensor, Tensor]:
        """The layer's indices and positions."""
        if self._group.selects_late:
            # once a step: staleness grows with it
            if layer not in self._late:
                indices, positions = self._select(step_index, layer, layer + 1)
                self._late[layer] = indices[0], positions[0]
            return self._late[layer]
        count = self._counts[step_index][layer]
        return self._indices[layer, :, :count], self._positions[layer]

    def _select(self, step_index: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Select for the layers in [first, last); staleness grows also where nothing is taken."""
        return self._selector.select_(
            self.tokens.scores[first:last], self.tokens.staleness[first:last],
            self._num_fresh[step_index, first:last], max(self._counts[step_index][first:last]),
            sites=self._group.sites[first:last],
            step=Step(step_index, self._total), grid=self._group.grid, backend=self._backend,
        )  # fmt: skip


def _describe(inputs: _Inputs) -> str:
    tokens = ", ".join(str(group.num_tokens) for group in inputs.groups)
    return f"a batch of {inputs.batch} with {tokens} tokens on {inputs.device}"
