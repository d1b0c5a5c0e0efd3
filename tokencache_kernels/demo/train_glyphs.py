"""Train a second small model on images that are harder than digits: coloured letters.

``python -m tokencache_kernels.demo.train_glyphs`` renders capital letters in fonts that matplotlib
ships, in two colours, 64 x 64 pixels (1,024 tokens), trains a transformer on them by flow matching,
and writes the weights with the record of how they were made. The first ``--half-steps`` steps see
images of half the size, whose tokens take every second position of the grid: a quarter of the
tokens teach the shapes, and the rest of the run their edges. A run can be stopped and started
again: the state is kept in ``--state``.
"""

import argparse
import copy
import json
import string
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..learn.training import TrainingSettings, train_module
from .model import save_weights
from .train import LABEL_DROPOUT, rate_factor, update_average

CHARACTERS = string.ascii_uppercase
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Italic")
NULL_CLASS = len(CHARACTERS)
# of the image's side; the largest glyphs still fit in
_GLYPH_SHARE = 0.7
# how far from the middle a glyph may lie, of the image's side
_JITTER = 1 / 16


def make_shape(size: int) -> dict[str, Any]:
    """The model's shape for images of ``size`` pixels a side: (size / 2)^2 tokens."""
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "in_channels": 3,
        "out_channels": 3,
        "num_layers": 6,
        "sample_size": size,
        "patch_size": 2,
        "num_embeds_ada_norm": len(CHARACTERS),
        "norm_num_groups": 1,
    }


def build_glyph_model(size: int = 64) -> Any:
    """Build the untrained ``DiTTransformer2DModel``."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(**make_shape(size))
    for block in model.transformer_blocks:
        # training drops labels itself, once an image
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return model


def draw_glyphs(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw random characters in random fonts, places and colours.

    Args:
        count: B.
        size: pixels a side.
        generator: draws all that is random.

    Returns:
        images (B, 3, size, size) float32 in [-1, 1], and labels (B,) int64 into ``CHARACTERS``.
    """

    def choose(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    jitter = round(size * _JITTER)
    labels = torch.randint(len(CHARACTERS), (count,), generator=generator)
    images = torch.empty(count, 3, size, size)
    for image, label in zip(images, labels.tolist(), strict=True):
        mask = _render(FONTS[choose(len(FONTS))], CHARACTERS[label], size)
        height, width = mask.shape
        top, left = (
            min(max(room // 2 - jitter + choose(2 * jitter + 1), 0), room)
            for room in (size - height, size - width)
        )
        ink, paper = torch.rand(2, 3, 1, 1, generator=generator) * 2 - 1
        # ink that is hardly seen teaches nothing
        if (ink - paper).abs().max() < 0.8:
            ink = -torch.sign(paper + 1e-6) * (0.5 + 0.5 * ink.abs())
        image[:] = paper
        spot = image[:, top : top + height, left : left + width]
        spot += mask * (ink - paper)
    return images, labels


@cache
def _render(font: str, character: str, size: int) -> Tensor:
    """The coverage of a glyph's pixels, in [0, 1], trimmed to it."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    face = FT2Font(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"))
    face.set_size(size * _GLYPH_SHARE, 72)
    face.set_text(character)
    face.draw_glyphs_to_bitmap()
    return torch.tensor(face.get_image()[:size, :size]).float() / 255


def flow_loss(model: Any, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """The mean squared error of the velocity at random times; drops some labels.

    At time ``t`` in (0, 1) the model is given ``(1 - t) * image + t * noise`` and ``1000 t``, and
    is to answer ``noise - image``.
    """
    B = len(images)
    noise = torch.randn(images.shape, generator=generator).to(images)
    # more often in the middle, where the image is decided
    times = torch.randn(B, generator=generator).sigmoid().to(images)
    dropped = (torch.rand(B, generator=generator) < LABEL_DROPOUT).to(labels.device)
    labels = torch.where(dropped, NULL_CLASS, labels)
    mixed = torch.lerp(images, noise, times[:, None, None, None])
    with torch.autocast(images.device.type, torch.bfloat16):
        velocity = model(mixed, timestep=1000 * times, class_labels=labels).sample
    return (velocity.float() - (noise - images)).square().mean()


@torch.no_grad()
def sample_glyphs(
    model: Any, labels: Sequence[int], seeds: Sequence[int], *, steps: int, guidance: float = 2.0
) -> Tensor:
    """Draw one image for each label by Euler's method, both halves of guidance in one batch.

    Args:
        model: the transformer, hooked or not.
        labels: B numbers into ``CHARACTERS``.
        seeds: B seeds of the noise.
        steps: evenly spaced from time 1 to 0.
        guidance: 1 is the conditional velocity alone.

    Returns:
        (B, 3, size, size) float32 on the CPU, about in [-1, 1].
    """
    if len(labels) != len(seeds):
        raise ValueError(f"sample_glyphs: seeds must be {len(labels)}, got {len(seeds)}")
    device, size = next(model.parameters()).device, model.config.sample_size
    generator = torch.Generator()
    images = torch.stack(
        [torch.randn(3, size, size, generator=generator.manual_seed(seed)) for seed in seeds]
    ).to(device)
    classes = torch.tensor([*labels, *[NULL_CLASS] * len(labels)], device=device)
    for index in range(steps):
        time = torch.full((len(classes),), 1000 * (1 - index / steps), device=device)
        velocity = model(torch.cat([images] * 2), timestep=time, class_labels=classes).sample
        conditional, unconditional = velocity.chunk(2)
        images = images - (unconditional + guidance * (conditional - unconditional)) / steps
    return images.cpu()


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train, write the averaged weights, and return the record."""
    torch.manual_seed(0)
    model = build_glyph_model(options.size).to(options.device).train()
    average = copy.deepcopy(model).requires_grad_(False)

    def compute_loss(step: int, generator: torch.Generator) -> tuple[Tensor, Mapping[str, float]]:
        is_half = step < options.half_steps
        batch, size = (
            (2 * options.batch, options.size // 2) if is_half else (options.batch, options.size)
        )
        images, labels = draw_glyphs(batch, size, generator)
        images, labels = images.to(options.device), labels.to(options.device)
        return flow_loss(model, images, labels, generator), {}

    history = train_module(
        nn.ModuleDict({"model": model, "average": average}),
        compute_loss,
        TrainingSettings(
            num_steps=options.steps,
            learning_rate=options.learning_rate,
            weight_decay=0.01,
            max_grad_norm=1.0,
            save_every=min(250, options.steps),
        ),
        options.state,
        facts={
            "what": "glyphs",
            "size": str(options.size),
            "batch": str(options.batch),
            "half_steps": str(options.half_steps),
        },
        rate_factor=lambda step: rate_factor(step, options.steps),
        after_step=lambda step: update_average(average, model, step),
    )
    save_weights(average, options.out)
    return {
        "model": make_shape(options.size),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": options.steps,
        "half_steps": options.half_steps,
        "batch": options.batch,
        "learning_rate": options.learning_rate,
        "seconds": round(history[-1]["seconds"], 1),
        "device": options.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "loss_by_step": [[row["step"], round(row["loss"], 5)] for row in history],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, train, and write the record beside the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--half-steps", type=int, default=1800, help="with twice the batch")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--size", type=int, default=64, help="pixels a side, a multiple of 4")
    parser.add_argument("--out", type=Path, default=Path("glyphs_dit.safetensors"))
    parser.add_argument("--state", type=Path, default=Path("glyphs_dit_state.safetensors"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    record = train(options)
    options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
