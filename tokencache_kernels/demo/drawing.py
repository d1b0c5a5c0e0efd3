"""Many digits under many methods, kept in chunks so that a run can be stopped and go on."""

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from .. import settings
from ..policies import TokenCacheConfig
from ..version import __version__
from .data import NUM_CLASSES
from .methods import Method, applied
from .sampling import sample


@dataclass(frozen=True)
class Drawing:
    """The setting of a drawing besides the method, the same for all methods that are compared.

    Attributes:
        samples: how many digits; the i-th is the digit i mod 10 from the seed ``first_seed + i``.
        first_seed: see there.
        batch: digits a forward, which has twice as many rows.
        steps: the DDIM steps of the dense model.
        guidance: see ``sample``.
        device: where the model is.
        weights: the model's file.
        state: the folder that the digits are kept in.
    """

    samples: int
    first_seed: int
    batch: int
    steps: int
    guidance: float
    device: torch.device
    weights: Path
    state: Path

    def __post_init__(self) -> None:
        for name in ("samples", "batch", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"Drawing: {name} must be at least 1, got {getattr(self, name)}")

    @property
    def labels(self) -> Tensor:
        """The digits that are drawn, (samples,)."""
        return torch.arange(self.samples) % NUM_CLASSES

    def chunks(self) -> list[range]:
        """The samples of each forward."""
        starts = range(0, self.samples, self.batch)
        return [range(start, min(start + self.batch, self.samples)) for start in starts]

    def path(self, method: Method, chunk: range) -> Path:
        """Give the path of one chunk of a method's digits, by everything that it depends on."""
        facts = hashlib.sha256(self.weights.read_bytes())
        way = settings.backend(), self.device.type, self.batch, torch.get_num_threads()
        facts.update(repr((method.policy, *way, __version__, torch.__version__)).encode())
        if isinstance(method.policy, TokenCacheConfig):
            # on whatever device: a run takes the predictor to the model's
            facts.update(save(method.policy.predictor.state_dict()))
        folder = (
            f"{method.name}-of-{self.steps}-steps-guidance-{self.guidance:g}"
            f"-{facts.hexdigest()[:12]}"
        )
        first, last = (self.first_seed + index for index in (chunk.start, chunk.stop))
        return self.state / folder / f"{first:06}-{last:06}.safetensors"


def draw(model: Any, methods: Sequence[Method], drawing: Drawing) -> None:
    """Draw the chunks that are missing, with a progress bar, and keep each when it is done.

    All methods draw a chunk before the next one begins, so that a slow machine slows them alike.
    """
    from tqdm import tqdm

    wanted = [(method, chunk) for chunk in drawing.chunks() for method in methods]
    missing = [(m, chunk) for m, chunk in wanted if not drawing.path(m, chunk).exists()]
    total, left = (sum(m.steps for m, _ in pairs) for pairs in (wanted, missing))
    warm = set()
    with tqdm(total=total, initial=total - left, unit="step") as bar:
        for method, chunk in missing:
            bar.set_description(f"{method.title:28}")
            with applied(model, method):
                if method.name not in warm:
                    # the first run pays for threads, libraries and kernels
                    sample(model, [0], [0], steps=method.steps, guidance=drawing.guidance)
                    warm.add(method.name)
                started = time.perf_counter()
                images = sample(
                    model,
                    [i % NUM_CLASSES for i in chunk],
                    [drawing.first_seed + i for i in chunk],
                    steps=method.steps,
                    guidance=drawing.guidance,
                    on_step=bar.update,
                )
                seconds = time.perf_counter() - started
            path = drawing.path(method, chunk)
            path.parent.mkdir(parents=True, exist_ok=True)
            # written under another name first: a file that is there is whole
            partial = path.with_suffix(".partial")
            save_file({"images": images}, partial, metadata={"seconds": repr(seconds)})
            os.replace(partial, path)


def load_drawn(method: Method, drawing: Drawing) -> tuple[Tensor, Tensor]:
    """The digits of a method that has drawn all, (samples, 1, 32, 32), and each chunk's seconds."""
    images, seconds = [], []
    for chunk in drawing.chunks():
        with safe_open(drawing.path(method, chunk), framework="pt") as kept:
            images.append(kept.get_tensor("images"))
            seconds.append(float(kept.metadata()["seconds"]))
    return torch.cat(images), torch.tensor(seconds, dtype=torch.float64)
