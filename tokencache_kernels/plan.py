"""``tokencache plan``: what a policy computes in each step, and the arithmetic that it saves."""

import argparse

from .policies import SHAPES, Plan, ToCaConfig, cache_bytes, make_plan
from .policies.toca import PUBLISHED_LAYERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The policy and the model."""
    parser.add_argument("preset", help="a published setting, such as dit-xl-ddim50")
    parser.add_argument("shape", choices=SHAPES, help="the model and its number of tokens")
    parser.add_argument("--num-layers", type=int, default=PUBLISHED_LAYERS)
    parser.add_argument("--steps", type=int, help="default: as published")
    parser.add_argument("--refresh-interval", type=int, help="default: as published")
    parser.add_argument("--fresh-ratio", type=float, help="default: as published")


def run(options: argparse.Namespace) -> int:
    """Print one line a step, then the totals."""
    shape = SHAPES[options.shape]
    policy = ToCaConfig.preset(
        options.preset,
        num_inference_steps=options.steps,
        num_layers=options.num_layers,
        refresh_interval=options.refresh_interval,
        fresh_ratio=options.fresh_ratio,
    )
    plan = make_plan(policy, shape)
    for line in describe_steps(plan):
        print(line)
    print(
        f"\n{plan.flops / 1e12:.2f} TFLOP of {plan.dense_flops / 1e12:.2f}: "
        f"{plan.flops_ratio:.2f} times fewer, in {len(plan.full_steps)} full steps"
    )
    memory = cache_bytes(shape, element_size=2)
    parts = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in memory.items())
    print(f"the cache takes, at 2 bytes an element: {parts}")
    return 0


def describe_steps(plan: Plan) -> list[str]:
    """One line a step: full, or the range over the layers of the fresh tokens of each module."""
    lines = []
    for index, step in enumerate(plan.steps):
        kinds = dict.fromkeys((site.stream, site.module) for site in step.decisions)
        parts = []
        for stream, module in kinds:
            fresh = step.num_fresh(stream, module)
            parts.append(f"{stream} {module} {min(fresh)}-{max(fresh)}")
        what = "full" if step.is_full else "fresh tokens: " + ", ".join(parts)
        lines.append(f"step {index:3}  {what}")
    return lines
