"""``tokencache demo``: the same digits, dense and under several policies; time against error."""

import argparse
import functools
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..commands import info
from .classifier import classify, load_classifier
from .data import NUM_CLASSES
from .methods import Method, applied, parse_those_trained
from .metrics import psnr
from .model import WEIGHTS, load_model
from .sampling import GUIDANCE, STEPS, sample

# the others are compared with the first one; half the steps come on top
METHODS = ("dense", "fora-3", "random-3", "toca-3", "tokencache", "l2c", "taylor1-3")


@dataclass(frozen=True)
class Result:
    """The digits of one method, and their cost."""

    method: Method
    images: Tensor
    seconds: float
    speedup: float
    flops_ratio: float
    psnr: float
    accuracy: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options: the number of digits, and the files to write."""
    parser.add_argument("--digits", type=int, default=20, help="how many to draw with each method")
    parser.add_argument("--steps", type=int, default=STEPS, help="DDIM steps")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, metavar="FILE")
    parser.add_argument("--out", type=Path, default=Path("tokencache_demo.png"), metavar="FILE")


def run(options: argparse.Namespace) -> int:
    """Draw, print the table, write the image."""
    names = (*METHODS, f"fewer-{options.steps // 2}")
    methods = parse_those_trained(names, options.steps)
    device = torch.device(options.device)
    print(
        f"Drawing {options.digits} digits in {len(methods)} ways: with {options.steps} dense "
        "steps, with fewer, and with cached tokens.\nThis takes one to three minutes on two CPU "
        f"cores. Here: {info.describe_device(device)}.\n"
        f"The cached ways run on the {info.chosen_backend('mlp_', device)!r} backend."
    )
    load = os.getloadavg()[0]
    if load > (os.cpu_count() or 1) / 2:
        print(f"Other programs kept it busy in the last minute (load {load:.1f}): mind the times.")
    model = load_model(options.weights).to(device)
    labels = [i % NUM_CLASSES for i in range(options.digits)]
    drawn = [draw(model, method, labels, options.guidance) for method in methods]
    results = compare(methods, drawn, labels)
    print_table(results)
    print_verdict(results)
    write_picture(results, options.out)
    print(f"The digits, and error against time, are drawn in {options.out}")
    return 0


def draw(model: Any, method: Method, labels: list[int], guidance: float) -> tuple[Tensor, float]:
    """The images and the seconds of one method, after a first small run that warms it up."""
    from tqdm import tqdm

    draw_some = functools.partial(sample, model, steps=method.steps, guidance=guidance)
    with applied(model, method):
        draw_some(labels[:1], [0])
        with tqdm(total=method.steps, desc=f"{method.title:24}", unit="step") as bar:
            started = time.perf_counter()
            images = draw_some(labels, range(len(labels)), on_step=bar.update)
            return images, time.perf_counter() - started


def compare(
    methods: list[Method], drawn: list[tuple[Tensor, float]], labels: list[int]
) -> list[Result]:
    """Judge every method's images by the dense model's, which come first, and by the classifier."""
    dense_images, dense_seconds = drawn[0]
    classifier = load_classifier()
    results = []
    for method, (images, seconds) in zip(methods, drawn, strict=True):
        predicted, _ = classify(classifier, images)
        results.append(
            Result(
                method=method,
                images=images,
                seconds=seconds,
                speedup=dense_seconds / seconds,
                flops_ratio=method.flops_ratio,
                psnr=psnr(images, dense_images).mean().item(),
                accuracy=(predicted == torch.tensor(labels)).float().mean().item(),
            )
        )
    return results


def print_table(results: list[Result]) -> None:
    """One line a method."""
    columns = ("seconds", "speed-up", "fewer FLOPs", "PSNR to dense", "as labelled")
    print(f"\n{'':24}" + "".join(f"{column:>15}" for column in columns))
    for place, result in enumerate(results):
        cells = (
            f"{result.seconds:.2f}",
            f"{result.speedup:.2f}x",
            f"{result.flops_ratio:.2f}x",
            f"{result.psnr:.1f} dB" if place else "-",
            f"{result.accuracy:.0%}",
        )
        print(f"{result.method.title:24}" + "".join(f"{cell:>15}" for cell in cells))
    print()


def print_verdict(results: list[Result]) -> None:
    """Say in words where caching loses, and how to read the rest."""
    for result in results:
        if result.speedup < 1:
            print(
                f"{result.method.title} was slower than dense here: {result.flops_ratio:.2f} times "
                f"less arithmetic took {1 / result.speedup:.2f} times as long."
            )
    for fewer in results[1:]:
        beaten = [
            result.method.title
            for result in results
            if result.method.policy is not None
            and result.seconds > fewer.seconds
            and result.psnr < fewer.psnr
        ]
        if fewer.method.policy is None and beaten:
            print(
                f"{fewer.method.title} came nearer to dense in less time than "
                f"{'; '.join(beaten)}: digits this small forgive long steps."
            )
    print(
        "PSNR tells how near a digit is to the dense one from the same noise, not how good it is."
    )


def write_picture(results: list[Result], path: Path) -> None:
    """One row of digits a method above, error against time below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.6 * len(results) + 3.5), layout="constrained")
    rows, plot = figure.subplots(2, 1, height_ratios=[0.6 * len(results), 3])

    strip = torch.cat([torch.cat(list(result.images[:, 0]), dim=1) for result in results])
    rows.imshow(strip.numpy(), cmap="gray_r", vmin=-1, vmax=1)
    size = results[0].images.shape[-1]
    rows.set_yticks(
        [size * (row + 0.5) for row in range(len(results))],
        [f"{result.method.title}\n{result.speedup:.2f}x" for result in results],
    )
    rows.set_xticks([])
    rows.tick_params(length=0)
    for side in rows.spines.values():
        side.set_visible(False)

    dense = results[0].images
    for result in results:
        error = (result.images - dense).square().mean().sqrt().item()
        plot.plot(result.seconds, error, "o", label=result.method.title)
    plot.legend()
    plot.margins(0.1)
    plot.set_xlim(left=0)
    plot.set_ylim(bottom=0)
    plot.set_xlabel(f"seconds for {len(dense)} digits")
    plot.set_ylabel("RMS difference from dense, of a range of 2")
    figure.savefig(path, dpi=120)
