"""The decisions of the last step, read back: fresh tokens, staleness and scores of every site."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ...errors import fail
from ...policies import Action, Site, Step
from .interception import interceptor_of
from .session import Session


@dataclass(frozen=True)
class InspectedSite:
    """One site after a step; its tensors are copies.

    Attributes:
        action: the work of the site in the step.
        is_fresh: (B, N) bool, the tokens that the step computed. None: no step of the run selects
            tokens of the site, and ``action`` says all.
        staleness: (B, N) int32, the partial steps since each token was computed, or None.
        scores: (B, N) float32, the base scores by which tokens are selected, or None.
    """

    action: Action
    is_fresh: Tensor | None = None
    staleness: Tensor | None = None
    scores: Tensor | None = None

    def indices(self, sample: int) -> Tensor:
        """The fresh tokens of one sample, ascending, (S,) int64.

        Raises:
            ValueError: no step of the run selects tokens of the site.
        """
        if self.is_fresh is None:
            fail("InspectedSite.indices", "site", "have selected tokens", self.action)
        return self.is_fresh[sample].nonzero().flatten()


@dataclass(frozen=True)
class InspectedRun:
    """The last step of one run.

    Attributes:
        context: the name of its caller; see ``token_cache_context``.
        step: the step that has ended last.
        sites: every cached module, in the order of its groups of layers.
    """

    context: str
    step: Step
    sites: Mapping[Site, InspectedSite]


def inspect_token_cache(transformer: nn.Module) -> list[InspectedRun]:
    """Read back the last step of all runs under way in this thread.

    Fresh tokens are those without staleness, which is a buffer of fixed address: replayed steps of
    captured graphs are read like others. The copies wait for the device, so this is for looking,
    such as in a pipeline's ``callback_on_step_end``, and not for every step of a fast run.

    Args:
        transformer: with a token cache.

    Returns:
        A run for each pass that has ended a step; none before the first.

    Raises:
        ValueError: the transformer has no token cache.
    """
    interceptor = interceptor_of(transformer)
    if interceptor is None:
        fail("inspect_token_cache", "transformer", "have a token cache", "one without")
    session: Session = interceptor.session
    runs = []
    for context, one in session.passes():
        runner = one.runner
        plan, index = runner.plan, runner.last_index
        if plan is None or index is None:
            continue
        sites = {}
        for group in plan.groups:
            for site in group.sites:
                action = plan.decision(index, site).action
                tokens = runner.token_state(site)
                if tokens is None or action is Action.SKIP:
                    sites[site] = InspectedSite(action)
                    continue
                row = runner.token_row(site)
                staleness = tokens.staleness[row].clone()
                is_fresh = staleness == 0
                scores = tokens.scores[row].clone()
                sites[site] = InspectedSite(action, is_fresh, staleness, scores)
        runs.append(InspectedRun(context, Step(index, plan.total), sites))
    return runs
