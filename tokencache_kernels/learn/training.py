"""The training loop of routers and predictors, in runs that may be broken off.

A run keeps one checkpoint, a safetensors file that is replaced as a whole: whenever the process
ends, the file is whole, and a run that goes on from it gives the same bits as one never broken off.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import DivergedError, fail
from ..policies.files import load_safetensors, replace_file

FORMAT = "tokencache_kernels training checkpoint 1"


@dataclass(frozen=True)
class TrainingSettings:
    """The length, learning rate and seed of a training, and the interval between checkpoints.

    ``learning_rate`` is AdamW's; gradients longer than ``max_grad_norm`` are shortened to it.
    """

    num_steps: int
    learning_rate: float
    weight_decay: float = 0.0
    max_grad_norm: float = math.inf
    save_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in ("num_steps", "save_every"):
            if getattr(self, field) < 1:
                fail(name, field, "be at least 1", getattr(self, field))
        if not 0 < self.learning_rate < math.inf:
            fail(name, "learning_rate", "be positive and finite", self.learning_rate)
        if not self.max_grad_norm > 0:
            fail(name, "max_grad_norm", "be positive", self.max_grad_norm)
        if not self.weight_decay >= 0:
            fail(name, "weight_decay", "be at least 0", self.weight_decay)


def train_module(
    module: nn.Module,
    compute_loss: Callable[[int, torch.Generator], tuple[Tensor, Mapping[str, float]]],
    settings: TrainingSettings,
    checkpoint: Path,
    *,
    facts: Mapping[str, str],
    rate_factor: Callable[[int], float] = lambda step: 1.0,
    after_step: Callable[[int], None] = lambda step: None,
) -> list[dict[str, float]]:
    """Minimise a loss over the module's parameters with AdamW, from the checkpoint if there is one.

    A run is repeated bit for bit, broken off or not, if ``compute_loss`` depends on nothing but its
    arguments and the module, and computes deterministically.

    Args:
        module: trained in place, as far as it requires a gradient; the rest is kept in the
            checkpoint too.
        compute_loss: takes the step, counting up from 0, and the run's generator on the CPU, from
            which all that is random must come. It gives the loss, and figures for the progress
            line such as ``{"skipped": 0.4}``.
        settings: ``num_steps`` and ``save_every`` may change when a run is taken up again.
        checkpoint: the file that is resumed and, every ``save_every`` steps and after the last
            one, replaced.
        facts: the subject of the training; a checkpoint with other facts is refused.
        rate_factor: the factor of the learning rate in a step.
        after_step: called after each step, for instance to keep the parameters within bounds.

    Returns:
        For each save, of the resumed part too: ``step`` (how many were done), ``seconds`` (spent
        until then), ``loss`` and the other figures, as means over the steps since the save before.

    Raises:
        ValueError: the checkpoint is truncated, foreign, or of another run; it stays as it is.
        DivergedError: the loss, a gradient or a parameter is not finite; the checkpoint is the last
            good one.
    """
    from tqdm import tqdm

    facts = {**facts, **_describe(settings)}
    generator = torch.Generator().manual_seed(settings.seed)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    history: list[dict[str, float]] = []
    if checkpoint.exists():
        history = _resume(checkpoint, module, optimizer, generator, facts)
    first, seconds = (int(history[-1]["step"]), history[-1]["seconds"]) if history else (0, 0.0)
    if first > settings.num_steps:
        fail("train_module", "num_steps", f"be at least {first}, as in {checkpoint}",
             settings.num_steps)  # fmt: skip

    recent: list[dict[str, float]] = []
    started = time.monotonic() - seconds
    with tqdm(total=settings.num_steps, initial=first, unit="step") as progress:
        for step in range(first, settings.num_steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * rate_factor(step)
            optimizer.zero_grad()
            loss, figures = compute_loss(step, generator)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            if not torch.stack((loss.detach(), norm)).isfinite().all():
                got = f"{loss.item()} and {norm.item()}"
                raise _diverged("the loss and its gradient", got, step, checkpoint, history)
            optimizer.step()
            after_step(step)
            recent.append({"loss": loss.item(), **figures})
            shown = {name: f"{value:.4g}" for name, value in recent[-1].items()}
            progress.set_postfix(shown, refresh=False)
            progress.update()
            if (step + 1) % settings.save_every == 0 or step + 1 == settings.num_steps:
                if not all(value.isfinite().all() for value in parameters):
                    got = "some that are not"
                    raise _diverged("the parameters", got, step, checkpoint, history)
                means = {name: sum(row[name] for row in recent) / len(recent) for name in recent[0]}
                spent = time.monotonic() - started
                history.append({"step": step + 1, "seconds": spent, **means})
                recent.clear()
                _save(checkpoint, module, optimizer, generator, facts, history)
    return history


def _diverged(
    what: str, got: str, step: int, checkpoint: Path, history: list[dict[str, float]]
) -> DivergedError:
    good = f"{checkpoint}, of step {int(history[-1]['step'])}" if history else "none"
    return DivergedError(
        f"train_module: {what} must be finite, got {got} in step {step + 1}; the last good "
        f"checkpoint is {good}"
    )


def _describe(settings: TrainingSettings) -> dict[str, str]:
    """The settings that must not change between the parts of one run."""
    names = ("learning_rate", "weight_decay", "max_grad_norm", "seed")
    return {name: str(getattr(settings, name)) for name in names}


def _save(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    facts: Mapping[str, str],
    history: list[dict[str, float]],
) -> None:
    from safetensors.torch import save

    tensors = {f"module/{name}": value for name, value in module.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer/{index}/{name}": value for name, value in state.items()})
    tensors["generator"] = generator.get_state()
    metadata = {
        "format": FORMAT,
        "facts": json.dumps(facts, sort_keys=True),
        "history": json.dumps(history),
    }
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    replace_file(path, save(tensors, metadata))


def _resume(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    facts: Mapping[str, str],
) -> list[dict[str, float]]:
    """Put the run where the checkpoint was saved, once all of it is known to fit."""
    tensors, metadata = load_safetensors(path, "train_module", "checkpoint", FORMAT)
    try:
        saved = json.loads(metadata["facts"])
        history: list[dict[str, float]] = json.loads(metadata["history"])
        # the first save wrote a line
        drawn, _ = tensors["generator"], history[-1]["step"]
    except (KeyError, IndexError, ValueError):
        fail("train_module", "checkpoint", "hold a whole run", path)
    for name in sorted({*saved, *facts}):
        if saved.get(name) != facts.get(name):
            wanted, got = (
                f"with {name} {known[name]}" if name in known else f"without {name}"
                for known in (facts, saved)
            )
            fail("train_module", "checkpoint", f"be of a run {wanted}", f"{path} {got}")
    states: dict[int, dict[str, Tensor]] = {}
    values: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "module":
            values[rest] = tensor
        elif kind == "optimizer":
            index, _, field = rest.partition("/")
            states.setdefault(int(index), {})[field] = tensor
    expected = {name: value.shape for name, value in module.state_dict().items()}
    if {name: value.shape for name, value in values.items()} != expected:
        fail("train_module", "checkpoint", "hold the tensors of the module", path)
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    for place, state in states.items():
        for value in state.values():
            if place >= len(shapes) or value.shape not in ((), shapes[place]):
                fail("train_module", "checkpoint", "hold the optimizer's state of the module", path)
    module.load_state_dict(values)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    generator.set_state(drawn)
    return history
