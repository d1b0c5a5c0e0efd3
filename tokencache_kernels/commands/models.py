"""``tokencache models``: the described models, and how their blocks run in a partial step."""

import argparse

from ..models import SPECS, UNSUPPORTED, Parallel, find_refusal
from ..models.spec import Part


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take no arguments."""


def run(options: argparse.Namespace) -> int:
    """Print a line for each stack of blocks of each model."""
    for name, spec in sorted(SPECS.items()):
        print(name + (f" ({spec.notes})" if spec.notes else ""))
        for stack in spec.stacks:
            reason = find_refusal(stack)
            tier = "fused" if reason is None else f"as is: {reason}"
            modules = ", ".join(_name(part) for part in stack.parts)
            print(f"  {stack.path}: {modules}; {tier}")
    for name, reason in UNSUPPORTED.items():
        print(f"{name}: not supported, {reason}")
    print("A block that is fused runs as it is where something is put around its modules.")
    return 0


def _name(part: Part) -> str:
    return part.fc2 if isinstance(part, Parallel) else part.module
