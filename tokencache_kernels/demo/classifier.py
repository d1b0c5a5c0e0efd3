"""A small classifier of the digits: the judge of the samples, and the Fréchet distance's features.

``python -m tokencache_kernels.demo.classifier`` trains it, and writes the weights and the record of
how they were made.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .data import NUM_CLASSES, NUM_HELD_OUT, load_digits

WEIGHTS = Path(__file__).parent / "weights" / "digits_classifier.safetensors"
NUM_FEATURES = 64


class DigitsClassifier(nn.Module):
    """Three strided convolutions, one layer of features, one of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.ReLU(),
        )
        self.to_features = nn.Linear(64 * 4 * 4, NUM_FEATURES)
        self.to_logits = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, 10) and features (B, 64) of images (B, 1, 32, 32) in [-1, 1]."""
        features = F.relu(self.to_features(self.convolutions(images).flatten(1)))
        return self.to_logits(features), features


def load_classifier(path: Path = WEIGHTS) -> DigitsClassifier:
    """Load the shipped classifier in evaluation mode, in float32."""
    model = DigitsClassifier()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval().requires_grad_(False)


@torch.no_grad()
def classify(classifier: DigitsClassifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely digit of each image, (B,) int64, and its features, (B, 64) float32."""
    logits, features = classifier(images)
    return logits.argmax(dim=1), features


def distort(images: Tensor) -> Tensor:
    """Turn, scale and shift every image a little, each on its own, so that few go further."""
    angle = 0.2 * (2 * torch.rand(len(images)) - 1)
    scale = 1 + 0.12 * (2 * torch.rand(len(images)) - 1)
    shift = 0.15 * (2 * torch.rand(len(images), 2) - 1)
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    rows = [
        torch.stack([cosine, -sine, shift[:, 0]], dim=1),
        torch.stack([sine, cosine, shift[:, 1]], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    # sampled around 0, so that everything outside the image is background
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def train(epochs: int, batch: int, peak: float) -> tuple[DigitsClassifier, dict[str, Any]]:
    """Train on all digits but the held out; return the model as it is shipped, and the record."""
    from tqdm import tqdm

    torch.manual_seed(0)
    images, labels = load_digits()
    num_train = len(images) - NUM_HELD_OUT
    model = DigitsClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.02)
    steps_per_epoch = num_train // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, epochs * steps_per_epoch)
    started = time.monotonic()
    for _ in tqdm(range(epochs), unit="epoch"):
        order = torch.randperm(num_train)[: steps_per_epoch * batch]
        for chosen in order.reshape(-1, batch):
            logits, _ = model(distort(images[chosen]))
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    seconds = time.monotonic() - started
    # the shipped weights are float16, so those are judged
    model = model.half().float().eval().requires_grad_(False)
    predicted, _ = classify(model, images[num_train:])
    return model, {
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": epochs,
        "batch": batch,
        "peak_learning_rate": peak,
        "trained_on": num_train,
        "held_out": NUM_HELD_OUT,
        "held_out_accuracy": (predicted == labels[num_train:]).float().mean().item(),
        "seconds": round(seconds, 1),
        "device": f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    """Parse the command line, train, and write the weights and the record beside them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    options = parser.parse_args()
    model, record = train(options.epochs, options.batch, options.learning_rate)
    record["command"] = (
        f"python -m tokencache_kernels.demo.classifier --epochs {options.epochs}"
        f" --batch {options.batch} --learning-rate {options.learning_rate}"
    )
    WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: p.half().contiguous() for name, p in model.state_dict().items()}, WEIGHTS)
    WEIGHTS.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"held-out accuracy {record['held_out_accuracy']:.3f}, written to {WEIGHTS}")


if __name__ == "__main__":
    main()
