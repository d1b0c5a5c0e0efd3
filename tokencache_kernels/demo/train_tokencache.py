"""``tokencache train tokencache``: train TokenCache's predictor for the demo's model."""

import argparse
import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from ..learn.superposition import Draw
from ..learn.train_predictor import (
    calibrate_predictor,
    make_content_predictor,
    make_table_predictor,
    train_predictor,
)
from ..policies import save_predictor
from .model import NULL_CLASS, build_scheduler, load_model
from .train_policy import (
    add_training_arguments,
    describe_run,
    draw_digits,
    make_settings,
    state_path,
)

# the predictor that ships with the package, for 50 DDIM steps
PREDICTOR = Path(__file__).parent / "weights" / "digits_predictor.safetensors"
# with guidance, half of the rows of a step have no class
LABEL_DROPOUT = 0.5
LEARNING_RATES = {"table": 0.1, "content": 2e-3}
CALIBRATION_SAMPLES = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the common options, the kind of predictor, and the price of a fresh token."""
    add_training_arguments(
        parser, steps=1000, batch=8, learning_rate=None, out="digits_predictor.safetensors"
    )
    parser.add_argument(
        "--predictor",
        choices=tuple(LEARNING_RATES),
        default="table",
        help="a weight for each position, or a light block that sees the tokens",
    )
    parser.add_argument("--width", type=int, default=32, help="of the light block")
    parser.add_argument(
        "--lambda",
        dest="sparsity",
        type=float,
        default=1e-4,
        metavar="COST",
        help="of the mean score: the more, the lower all scores",
    )


def run(options: argparse.Namespace) -> int:
    """Train, calibrate, write the predictor, and beside it the record of how it was made."""
    if options.learning_rate is None:
        options.learning_rate = LEARNING_RATES[options.predictor]
    model = load_model(options.weights).to(options.device)
    scheduler = build_scheduler()
    scheduler.set_timesteps(options.sampler_steps)
    # a new block's weights are random
    torch.manual_seed(options.seed)
    predictor = (
        make_table_predictor(model, options.sampler_steps)
        if options.predictor == "table"
        else make_content_predictor(model, options.sampler_steps, options.width)
    ).to(options.device)
    digest = hashlib.sha256(options.weights.read_bytes()).hexdigest()
    draw = _drop_labels(draw_digits(options.batch, options.device))
    history = train_predictor(
        model,
        predictor,
        scheduler,
        draw,
        make_settings(options),
        state_path(options),
        sparsity=options.sparsity,
        facts={"model": f"the demo's, weights {digest[:12]}", "batch": str(options.batch)},
    )
    num_batches = -(-CALIBRATION_SAMPLES // options.batch)
    calibrate_predictor(model, predictor, scheduler, draw, num_batches, seed=options.seed + 1)
    importance = [round(value, 4) for value in predictor.step_importance()]
    # float16 is as much as scores need, and half the file
    save_predictor(predictor.half(), options.out)
    record = {
        "method": "tokencache",
        "weights_sha256": digest,
        "predictor": repr(predictor),
        "lambda": options.sparsity,
        "label_dropout": LABEL_DROPOUT,
        "calibration_samples": num_batches * options.batch,
        "importance_by_step": importance,
        **describe_run(options, history),
    }
    options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print("Mean importance of a token, step by step:")
    print(" ".join(f"{value:.2f}" for value in importance))
    print(f"Written to {options.out}, with the record of its training beside it")
    return 0


def _drop_labels(draw: Draw) -> Draw:
    def draw_some_without(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images, labels = draw(generator)
        is_dropped = torch.rand(len(labels), generator=generator) < LABEL_DROPOUT
        return images, torch.where(is_dropped.to(labels.device), NULL_CLASS, labels)

    return draw_some_without
