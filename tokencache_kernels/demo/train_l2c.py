"""``tokencache train l2c``: train Learning-to-Cache's router for the demo's model."""

import argparse
import hashlib
import json
from pathlib import Path

from ..learn.train_router import train_router
from ..policies import save_router
from .model import build_scheduler, load_model
from .train_policy import (
    add_training_arguments,
    describe_run,
    draw_digits,
    make_settings,
    state_path,
)

# the router that ships with the package, for 50 DDIM steps
ROUTER = Path(__file__).parent / "weights" / "digits_router.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the common options, the price of a computed sub-layer, and the threshold."""
    add_training_arguments(
        parser, steps=1200, batch=2, learning_rate=0.2, out="digits_router.safetensors"
    )
    parser.add_argument(
        "--lambda",
        dest="sparsity",
        type=float,
        default=1e-5,
        metavar="COST",
        help="of a computed sub-layer: the more, the more is skipped",
    )
    parser.add_argument("--threshold", type=float, default=0.1, help="computed if above it")


def run(options: argparse.Namespace) -> int:
    """Train, write the router, and beside it the record of how it was made."""
    model = load_model(options.weights).to(options.device)
    scheduler = build_scheduler()
    scheduler.set_timesteps(options.sampler_steps)
    digest = hashlib.sha256(options.weights.read_bytes()).hexdigest()
    router, history = train_router(
        model,
        scheduler,
        draw_digits(options.batch, options.device),
        make_settings(options),
        state_path(options),
        sparsity=options.sparsity,
        threshold=options.threshold,
        facts={"model": f"the demo's, weights {digest[:12]}", "batch": str(options.batch)},
    )
    save_router(router, options.out)
    record = {
        "method": "learning-to-cache",
        "weights_sha256": digest,
        "lambda": options.sparsity,
        "threshold": options.threshold,
        "skipped_share": round(router.skipped_share, 4),
        "computed_by_step": {
            counter: "".join("-x"[on] for on in router.mask[counter])
            for counter in reversed(router.cached_counters)
        },
        **describe_run(options, history),
    }
    options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print("Sub-layers computed in the steps that are not full (attention and MLP, block by block):")
    for counter, entries in record["computed_by_step"].items():
        print(f"{counter:4}  {entries}")
    print(
        f"The router skips {router.skipped_share:.1%} of them; written to {options.out}, with the "
        f"record of its training beside it"
    )
    return 0
