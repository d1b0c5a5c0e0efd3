"""The command ``tokencache``, also ``python -m tokencache_kernels``: one table of subcommands.

A subcommand is a module with ``add_arguments(parser)`` and ``run(options) -> int``; it is imported
only when it is asked for.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from ..errors import TokenCacheError
from ..version import __version__

COMMANDS = {
    "demo": ("demo.show", "draw digits with the shipped model, dense and cached, side by side"),
    "compare": ("demo.compare", "measure the quality and time of all policies on the same seeds"),
    "calibrate": ("demo.calibrate", "find which steps to run for a budget, on the demo's model"),
    "info": ("commands.info", "say what can run here, what cannot, and why"),
    "models": ("commands.models", "list the described models, and how their blocks run"),
    "plan": (
        "commands.plan",
        "show the work of a policy step by step, and the FLOPs it saves",
    ),
    "train": ("demo.train_policy", "train a router or a predictor on the demo's model and digits"),
    "compile-report": (
        "commands.compile_report",
        "compile every Triton kernel for given GPUs, without having one",
    ),
    "tune": ("commands.tune", "find the fastest launch settings on this GPU"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status.

    An error that the user can mend is told in a line.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options = parse_arguments(arguments)
        status: int = options.run(options)
    except ModuleNotFoundError as error:
        reason = f"it needs {error.name}, which is not installed"
    except (TokenCacheError, ValueError, OSError) as error:
        reason = str(error)
    else:
        return status
    print(f"tokencache {arguments[0]}: {reason}", file=sys.stderr)
    return 1


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; ``run`` in the result is the subcommand's function."""
    parser = argparse.ArgumentParser(
        prog="tokencache", description="Token-wise feature caching for diffusion transformers."
    )
    parser.add_argument("--version", action="version", version=f"tokencache_kernels {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if arguments[:1] == [name]:
            module = importlib.import_module(f"..{module_name}", __package__)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser.parse_args(arguments)
