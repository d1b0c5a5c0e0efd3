"""What a policy will do to a model, step by step, and what that costs; nothing is run."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from .decisions import Action, Decision, Policy, Site, Step, list_remembered
from .shapes import ModelShape
from .tokencache import TokenCacheConfig


@dataclass(frozen=True)
class StepPlan:
    """The decisions of one step, and its FLOPs for the whole batch."""

    decisions: Mapping[Site, Decision]
    flops: int

    @property
    def is_full(self) -> bool:
        """Whether every site is computed in full."""
        return all(decision.action is Action.FULL for decision in self.decisions.values())

    @property
    def is_skipped(self) -> bool:
        """Whether no block runs."""
        return all(decision.action is Action.SKIP for decision in self.decisions.values())

    def full_layers(self, stream: str, module: str) -> tuple[int, ...]:
        """The layers in which a module is computed in full."""
        return tuple(
            site.layer
            for site, decision in self.decisions.items()
            if (site.stream, site.module) == (stream, module) and decision.action is Action.FULL
        )

    def num_fresh(self, stream: str, module: str) -> tuple[int, ...]:
        """How many tokens of each sample are computed, layer by layer."""
        return tuple(
            decision.num_fresh
            for site, decision in self.decisions.items()
            if (site.stream, site.module) == (stream, module)
        )


@dataclass(frozen=True)
class Plan:
    """A whole sampling run under a policy.

    ``is_predicted``: a predictor scores blocks, and one selection is for all modules of a block.
    """

    steps: tuple[StepPlan, ...]
    dense_flops: int
    is_predicted: bool = False
    forecast_order: int = 0

    @property
    def flops(self) -> int:
        """The FLOPs of all steps."""
        return sum(step.flops for step in self.steps)

    @property
    def flops_ratio(self) -> float:
        """How many times fewer FLOPs than without any cache."""
        return self.dense_flops / self.flops

    @property
    def full_steps(self) -> tuple[int, ...]:
        """The steps in which every site is computed in full."""
        return tuple(index for index, step in enumerate(self.steps) if step.is_full)

    def actions(self, site: Site) -> list[Action]:
        """What the site does in each step."""
        return [step.decisions[site].action for step in self.steps]


def make_plan(policy: Policy, shape: ModelShape) -> Plan:
    """Ask ``policy`` for every site and step of a model of this shape, and count."""
    total = policy.num_inference_steps
    steps = tuple(_plan_step(policy, shape, Step(index, total)) for index in range(total))
    is_predicted = policy.selector.base_score == "predicted"
    return Plan(steps, total * shape.dense_flops, is_predicted, policy.forecast_order)


def _plan_step(policy: Policy, shape: ModelShape, step: Step) -> StepPlan:
    decisions: dict[Site, Decision] = {}
    flops = 0
    for stack in shape.stacks:
        for layer in range(stack.num_layers):
            for module in stack.modules:
                site = Site(stack.stream, layer, module.name)
                decisions[site] = policy.decide(site, step, module.num_tokens)
                flops += module.flops(decisions[site])
    if isinstance(policy, TokenCacheConfig) and _has_partial(decisions.values()):
        flops += policy.predictor.flops
    return StepPlan(decisions, shape.batch * flops)


def _has_partial(decisions: Iterable[Decision]) -> bool:
    return any(decision.action is Action.PARTIAL for decision in decisions)


def cache_bytes(plan: Plan, shape: ModelShape, element_size: int) -> dict[str, int]:
    """How many bytes the cache of a run takes for one batch, by what it holds.

    ``features``: the output of every site that a later step reads, ``element_size`` bytes an
    element, and keys and values as large as that where fresh queries see cached ones; ``text``: the
    prompt's keys and values, where cross-attention is computed in part; ``staleness`` and
    ``scores``: an int32 and a float32 for every token and layer of the modules that are computed in
    part in some step; an MLP shares the scores of what is selected before it in its block, and
    where a predictor gives them the whole selection. ``differences``, where it forecasts: for every
    order as much as the features that are forecast; ``output``, where steps skip the blocks: the
    last one's.
    """
    sizes = dict.fromkeys(("features", "staleness", "scores"), 0)
    differences = text = 0
    token_bytes = shape.batch * shape.hidden * element_size
    for stack in shape.stacks:
        is_selected = False
        for module in stack.modules:
            sites = [Site(stack.stream, layer, module.name) for layer in range(stack.num_layers)]
            runs = [[step.decisions[site] for step in plan.steps] for site in sites]
            buffer = module.num_tokens * token_bytes
            for site, run in zip(sites, runs, strict=True):
                reader, order = None, plan.forecast_order
                if module.read_by is not None:
                    reader, order = plan.actions(replace(site, module=module.read_by)), 0
                times = len(list_remembered(plan.actions(site), order, reader))
                tensors = 3 if module.name == "attn" and _sees_cached_keys(run) else 1
                sizes["features"] += buffer * min(times, 1) * tensors
                differences += buffer * min(max(times - 1, 0), order)
                if module.name == "cross" and _has_partial(run):
                    text += 2 * module.num_keys * token_bytes
            if not any(map(_has_partial, runs)):
                continue
            selected = 4 * stack.num_layers * shape.batch * module.num_tokens
            is_shared = is_selected and module.name == "mlp"
            is_selected = True
            sizes["scores"] += 0 if is_shared else selected
            sizes["staleness"] += 0 if is_shared and plan.is_predicted else selected
    if text:
        sizes["text"] = text
    if plan.forecast_order:
        sizes["differences"] = differences
    if any(step.is_skipped for step in plan.steps):
        sizes["output"] = shape.output_tokens * token_bytes
    return sizes


def _sees_cached_keys(run: Iterable[Decision]) -> bool:
    return any(one.action is Action.PARTIAL and one.attention == "kv_cache" for one in run)
