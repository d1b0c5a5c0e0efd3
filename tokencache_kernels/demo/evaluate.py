"""``tokencache evaluate``: draw many digits under each policy and measure quality and time.

Samples are kept in chunks in a state folder, so that a run can be stopped and started again, and
every policy is compared with the dense model's samples of the same seeds where they are kept. One
JSON line a policy is appended to the records.
"""

import argparse
import datetime
import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import info, settings
from .classifier import classify, load_classifier
from .data import NUM_CLASSES, load_digits
from .methods import Method, applied, parse_method
from .metrics import frechet_distance, psnr
from .model import WEIGHTS, load_model
from .sampling import GUIDANCE, STEPS, sample


@dataclass(frozen=True)
class Evaluation:
    """What is drawn, besides the policy: the same for all that are to be compared."""

    samples: int
    batch: int
    steps: int
    guidance: float
    device: torch.device
    weights: Path
    state: Path

    def chunks(self) -> list[range]:
        """The samples of each batch; sample i is the digit i mod 10 from the seed i."""
        starts = range(0, self.samples, self.batch)
        return [range(start, min(start + self.batch, self.samples)) for start in starts]

    def folder(self, method: Method) -> Path:
        """Where the method's samples are kept: a place of its own for all that they depend on."""
        facts = hashlib.sha256(self.weights.read_bytes())
        backend = settings.backend()
        facts.update(repr((method.policy, backend, self.device.type, self.batch)).encode())
        return self.state / (
            f"{method.name}-of-{self.steps}-steps-guidance-{self.guidance:g}"
            f"-{facts.hexdigest()[:12]}"
        )

    def path(self, method: Method, chunk: range) -> Path:
        """Where one chunk of the method's samples is kept."""
        return self.folder(method) / f"{chunk.start:06}-{chunk.stop:06}.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to draw, where, and where to write."""
    parser.add_argument(
        "--policy",
        nargs="+",
        default=["dense"],
        metavar="NAME",
        help="dense, fewer-25, fora-3, random-3, toca-3, toca-3-15, ...",
    )
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=25, help="digits a forward, twice the rows")
    parser.add_argument("--steps", type=int, default=STEPS, help="DDIM steps of the dense model")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--threads", type=int, help="torch's threads; default: as torch chooses")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, metavar="FILE")
    parser.add_argument("--state", type=Path, default=Path("tokencache_evaluate"), metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=Path("evaluate.jsonl"), metavar="FILE")


def run(options: argparse.Namespace) -> int:
    """Evaluate each policy in turn; what the state folder holds already is not drawn again."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    evaluation = Evaluation(
        samples=options.samples,
        batch=options.batch,
        steps=options.steps,
        guidance=options.guidance,
        device=torch.device(options.device),
        weights=options.weights,
        state=options.state,
    )
    methods = [parse_method(name, evaluation.steps) for name in options.policy]
    model = load_model(evaluation.weights).to(evaluation.device)
    for method in methods:
        draw(model, method, evaluation)
        record = measure(method, evaluation)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a") as out:
            out.write(json.dumps(record) + "\n")
        print(describe(record))
    print(f"Written to {options.out}; the samples are kept in {options.state}")
    return 0


def draw(model: Any, method: Method, evaluation: Evaluation) -> None:
    """Draw the chunks that are missing, with a progress bar, and keep each when it is done."""
    from tqdm import tqdm

    chunks = evaluation.chunks()
    missing = [chunk for chunk in chunks if not evaluation.path(method, chunk).exists()]
    if not missing:
        return
    evaluation.folder(method).mkdir(parents=True, exist_ok=True)
    total, done = len(chunks) * method.steps, (len(chunks) - len(missing)) * method.steps
    with applied(model, method):
        # the first run pays for threads, libraries and kernels
        sample(model, [0], [0], steps=method.steps, guidance=evaluation.guidance)
        with tqdm(total=total, initial=done, desc=method.name, unit="step") as bar:
            for chunk in missing:
                started = time.perf_counter()
                images = sample(
                    model,
                    [i % NUM_CLASSES for i in chunk],
                    chunk,
                    steps=method.steps,
                    guidance=evaluation.guidance,
                    on_step=bar.update,
                )
                seconds = time.perf_counter() - started
                path = evaluation.path(method, chunk)
                # written under another name first: a file that is there is whole
                partial = path.with_suffix(".partial")
                save_file({"images": images}, partial, metadata={"seconds": repr(seconds)})
                os.replace(partial, path)


def load_samples(method: Method, evaluation: Evaluation) -> tuple[Tensor, float] | None:
    """The kept samples (samples, 1, 32, 32) and their seconds; None if any is missing."""
    images, seconds = [], 0.0
    for chunk in evaluation.chunks():
        path = evaluation.path(method, chunk)
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as kept:
            images.append(kept.get_tensor("images"))
            seconds += float(kept.metadata()["seconds"])
    return torch.cat(images), seconds


def measure(method: Method, evaluation: Evaluation) -> dict[str, Any]:
    """The record of one policy, whose samples are all there."""
    kept = load_samples(method, evaluation)
    assert kept is not None
    images, seconds = kept
    is_dense = method.name == "dense"
    dense = None if is_dense else load_samples(parse_method("dense", evaluation.steps), evaluation)
    classifier = load_classifier()
    predicted, features = classify(classifier, images)
    labels = torch.arange(len(images)) % NUM_CLASSES
    _, real = classify(classifier, load_digits()[0])
    # as near to the real digits as as many real digits are to the rest of them
    num_real = min(len(images), len(real) // 2)
    return {
        "policy": method.name,
        "settings": repr(method.policy),
        "samples": evaluation.samples,
        "batch": evaluation.batch,
        "steps": method.steps,
        "dense_steps": evaluation.steps,
        "guidance": evaluation.guidance,
        "frechet_distance": round(frechet_distance(features, real), 4),
        "frechet_distance_of_real": round(frechet_distance(real[:num_real], real[num_real:]), 4),
        "accuracy": round((predicted == labels).float().mean().item(), 4),
        "psnr_to_dense": dense and round(psnr(images, dense[0]).mean().item(), 3),
        "seconds": round(seconds, 2),
        "speedup": dense and round(dense[1] / seconds, 3),
        "flops_ratio": round(method.flops_ratio, 3),
        "weights_sha256": hashlib.sha256(evaluation.weights.read_bytes()).hexdigest(),
        # without a policy no op of ours runs
        "backend": method.policy and info.chosen_backend("mlp_", evaluation.device),
        "load_average": round(os.getloadavg()[0], 2),
        **info.machine_facts(evaluation.device),
        **info.source_facts(),
        "utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": (
            f"tokencache evaluate --policy {method.name} --samples {evaluation.samples}"
            f" --batch {evaluation.batch} --steps {evaluation.steps}"
            f" --guidance {evaluation.guidance:g} --threads {torch.get_num_threads()}"
            f" --device {evaluation.device}"
        ),
    }


def describe(record: dict[str, Any]) -> str:
    """One line for a reader."""
    fidelity = record["psnr_to_dense"]
    return (
        f"{record['policy']}: Fréchet distance {record['frechet_distance']:.2f} (of real digits "
        f"{record['frechet_distance_of_real']:.2f}), {record['accuracy']:.1%} as labelled, "
        + (f"PSNR to dense {fidelity:.1f} dB, " if fidelity is not None else "")
        + f"{record['seconds']:.1f} s for {record['samples']} digits, "
        f"{record['flops_ratio']:.2f} times fewer FLOPs than dense"
    )
