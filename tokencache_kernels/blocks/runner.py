"""Asks the policy what each layer does in each step, and makes the step's index lists."""

import torch
from torch import Tensor

from ..cache import FeatureCache, TokenState
from ..policies import Action, Decision, Policy, Site, Step


class Runner:
    """One sampling run of one cache context: where it is, what it remembers, what it decides.

    Attributes:
        features: the cached outputs of all sub-layers.
    """

    def __init__(self, policy: Policy, sites: list[Site], backend: str = "auto") -> None:
        self.features = FeatureCache()
        self._policy = policy
        self._sites = sites  # the sub-layer that is recomputed in part, for each layer
        self._backend = backend
        self._step_index = 0

    def begin_step(self, hidden_states: Tensor, grid: tuple[int, int]) -> None:
        """Select the fresh tokens of all layers, in one launch.

        Args:
            hidden_states: (B, N, D), the input of the first block.
            grid: (H, W) with H * W = N.
        """
        B, N, _ = hidden_states.shape
        if self._step_index == 0:
            self._begin_run(B, N, hidden_states.device)
        if all(decision.action is Action.FULL for decision in self._decisions):
            return
        # staleness grows in every layer, also where no token is selected
        self._indices, self._positions = self._policy.selector.select_(
            self._tokens.scores, self._tokens.staleness, self._num_fresh[self._step_index],
            max(decision.num_fresh for decision in self._partial_decisions()),
            sites=self._sites, step=Step(self._step_index, self._policy.num_inference_steps),
            grid=grid, backend=self._backend,
        )  # fmt: skip

    def _begin_run(self, batch: int, num_tokens: int, device: torch.device) -> None:
        """Decide all steps at once, so that no later step waits for a copy to the device."""
        total = self._policy.num_inference_steps
        self._run = [
            [self._policy.decide(site, Step(index, total), num_tokens) for site in self._sites]
            for index in range(total)
        ]
        counts = [
            [0 if decision.action is Action.FULL else decision.num_fresh for decision in decisions]
            for decisions in self._run
        ]
        self._num_fresh = torch.tensor(counts, dtype=torch.int32, device=device)
        self._tokens = TokenState(len(self._sites), batch, num_tokens, device)

    @property
    def _decisions(self) -> list[Decision]:
        return self._run[self._step_index]

    def _partial_decisions(self) -> list[Decision]:
        return [decision for decision in self._decisions if decision.action is not Action.FULL]

    def action(self, layer: int) -> Action:
        """What the layer does in this step."""
        return self._decisions[layer].action

    def selection(self, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's indices (B, S), S its own number of fresh tokens, and positions (B, N)."""
        count = self._decisions[layer].num_fresh
        return self._indices[layer, :, :count], self._positions[layer]

    def is_remembered(self, layer: int) -> bool:
        """Whether the layer is computed in full now and reused by the next step."""
        following = self._run[self._step_index + 1 : self._step_index + 2]
        return self.action(layer) is Action.FULL and any(
            decisions[layer].action is not Action.FULL for decisions in following
        )

    def store_scores(self, layer: int, scores: Tensor) -> None:
        """Keep the scores (B, N) that a full step gave the layer."""
        self._tokens.store_scores(layer, scores)

    def finish_full(self, layer: int) -> None:
        """The layer has computed all its tokens."""
        self._tokens.mark_fresh(layer)

    def end_step(self) -> None:
        """Go on to the next step; after the last one a new run begins."""
        self._step_index = (self._step_index + 1) % self._policy.num_inference_steps
