"""The price of a run plan: FLOPs step by step, and bytes; nothing is run."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..models import PublishedCode
from .decisions import Action, Decision, Policy, Site
from .run_plan import LayerGroup, RunPlan
from .shapes import ModelShape


@dataclass(frozen=True)
class StepPlan:
    """The decisions of one step, and its FLOPs for the whole batch."""

    decisions: Mapping[Site, Decision]
    flops: int

    @property
    def is_full(self) -> bool:
        """Tell whether every site is computed in full."""
        return all(decision.action is Action.FULL for decision in self.decisions.values())

    @property
    def is_skipped(self) -> bool:
        """Tell whether no block runs."""
        return all(decision.action is Action.SKIP for decision in self.decisions.values())

    def full_layers(self, stream: str, module: str) -> tuple[int, ...]:
        """The layers in which a module is computed in full."""
        return tuple(
            site.layer
            for site, decision in self.decisions.items()
            if (site.stream, site.module) == (stream, module) and decision.action is Action.FULL
        )

    def num_fresh(self, stream: str, module: str) -> tuple[int, ...]:
        """The number of computed tokens of each sample, layer by layer."""
        return tuple(
            decision.num_fresh
            for site, decision in self.decisions.items()
            if (site.stream, site.module) == (stream, module)
        )


@dataclass(frozen=True)
class Plan:
    """A whole sampling run under a policy, with its price."""

    run: RunPlan
    steps: tuple[StepPlan, ...]
    dense_flops: int

    @property
    def flops(self) -> int:
        """The FLOPs of all steps."""
        return sum(step.flops for step in self.steps)

    @property
    def flops_ratio(self) -> float:
        """The FLOP reduction: the FLOPs without a cache over those with it."""
        return self.dense_flops / self.flops

    @property
    def full_steps(self) -> tuple[int, ...]:
        """The steps in which every site is computed in full."""
        return tuple(index for index, step in enumerate(self.steps) if step.is_full)

    def actions(self, site: Site) -> list[Action]:
        """The action at the site in each step."""
        return self.run.actions(site)


def make_plan(policy: Policy, shape: ModelShape) -> Plan:
    """Plan a run of ``policy`` on a model of this shape, and count its FLOPs."""
    run = RunPlan(policy, layer_groups(shape))
    shapes = {
        site: module
        for stack in shape.stacks
        for module in stack.modules
        for site in stack.sites(module)
    }
    steps = []
    for index, decisions in enumerate(run.decisions):
        flops = sum(shapes[site].flops(decision) for site, decision in decisions.items())
        if policy.predictor is not None and run.selects(index):
            flops += policy.predictor.flops
        steps.append(StepPlan(decisions, shape.batch * flops))
    return Plan(run, tuple(steps), run.total * shape.dense_flops)


def layer_groups(shape: ModelShape) -> tuple[LayerGroup, ...]:
    """The cached modules of a model of this shape."""
    return tuple(
        LayerGroup(
            stack.sites(module),
            module.num_tokens,
            is_whole=module.is_whole,
            shares_scores=module.shares_scores,
            read_by=module.read_by,
        )
        for stack in shape.stacks
        for module in stack.modules
    )


def cache_bytes(plan: Plan, shape: ModelShape, element_size: int) -> dict[str, int]:
    """Count the bytes of a run's cache for one batch, by their use.

    ``features``: the output of every site that a later step reads, ``element_size`` bytes an
    element, and keys and values as large as that if fresh queries see cached ones. ``text``: the
    prompt's keys and values, if cross-attention is computed in part. ``staleness`` and
    ``scores``: an int32 and a float32 for every token and layer of the modules that are computed in
    part in some step. An MLP shares the scores of the selection before it in its block, and
    where a predictor gives them the whole selection. ``differences``, where it forecasts: for every
    order as much as the features that are forecast; ``output``, where steps skip the blocks: the
    last one's.
    """
    sizes = dict.fromkeys(("features", "staleness", "scores"), 0)
    run = plan.run
    differences = text = 0
    token_bytes = shape.batch * shape.hidden * element_size
    for stack in shape.stacks:
        for module in stack.modules:
            buffer = module.num_tokens * token_bytes
            for site in stack.sites(module):
                stored = run.storage(site)
                sizes["features"] += buffer * (stored.features + stored.keys)
                differences += buffer * stored.differences
                if module.keeps_text and Action.PARTIAL in run.actions(site):
                    text += 2 * module.num_keys * token_bytes
    for selection in run.selections:
        rows = 4 * len(selection.group.sites) * shape.batch * selection.group.num_tokens
        sizes["staleness"] += rows
        sizes["scores"] += 0 if selection.shares_scores else rows
    if text:
        sizes["text"] = text
    if run.policy.carrier.order:
        sizes["differences"] = differences
    if run.has_skips:
        sizes["output"] = shape.output_tokens * token_bytes
    return sizes


def published_cache_bytes(
    code: PublishedCode, shape: ModelShape, element_size: int
) -> dict[str, int]:
    """Count the bytes that the published code of ToCa takes for one batch, by their use.

    ``features``, ``staleness`` and ``scores`` as in ``cache_bytes``, with the kept means of
    attention maps as scores; ``maps``: the map of one layer while a full step is under way.
    """
    features = staleness = scores = maps = 0
    for stack in shape.stacks:
        # a parallel block keeps the hidden features of its MLP
        is_parallel = any(module.read_by for module in stack.modules)
        for module in stack.modules:
            rows = shape.batch * module.num_tokens
            layers = len(stack.sites(module)) * rows
            is_unread = is_parallel and module.name == "mlp"
            width = shape.hidden + (code.unread_width if is_unread else 0)
            features += layers * width * element_size
            if module.name != "attn":
                staleness += layers * 4
            if module.name in code.mapped:
                keys = module.num_keys * (shape.batch if module.name == "cross" else 1)
                scores += layers * (keys if code.keeps_maps else 1) * element_size
                maps = max(maps, shape.heads * rows * keys * element_size)
    return {"features": features, "staleness": staleness, "scores": scores, "maps": maps}
