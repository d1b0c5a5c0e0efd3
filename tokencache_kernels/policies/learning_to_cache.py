"""Learning-to-Cache: every second step skips sub-layers that a trained router names.

The papers leave some things open; ``docs/adr/0022-learning-to-cache.md`` has the choices.
"""

import argparse
import hashlib
import json
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import fail
from .carriers import REUSE, Carrier, describe_carrier, make_carrier
from .decisions import Action, Decision, Site, Step
from .files import load_safetensors, replace_file
from .selectors import ScoreSelector

FORMAT = "tokencache_kernels router 1"
MAX_LOGIT = 5.0
_MODULES = ("attn", "mlp")


@dataclass(frozen=True)
class LearningToCacheConfig:
    """Skip the same sub-layers for all tokens, samples and prompts, in every second step.

    With ``s`` the step as the published code counts it, a step is full if ``s`` is odd, or if it is
    the first; in the others a sub-layer is computed where ``sigmoid(logit) > threshold``, and its
    cached output is gated anew where not. U-ViT's solver evaluates the network twice in an outer
    step: the second evaluation is full, and the next outer step's first one lives on it. That is
    the same rule with ``s`` counting up over evaluations. Guidance in two calls has two caches:
    name the calls with ``token_cache_context``.

    Attributes:
        logits: (T, 2L), by ``s``; entry 2l is the attention of block l, 2l + 1 its MLP.
        threshold: in (0, 1); the higher, the more is skipped.
        counts_down: whether ``s`` counts down to 0, as for DiT, or up from 0, as for U-ViT.
        model: the model that the router was trained for, in words.
        name: how the policy is called in reports.
        last_step_full: whether the last step computes every sub-layer, too; False: as published.
        carrier: gives skipped outputs their value; they are reused as published.
        fingerprint: of the logits.

    Source:
        Learning-to-Cache (arXiv:2406.01733).
    """

    logits: Tensor = field(repr=False, compare=False)
    threshold: float = 0.1
    counts_down: bool = True
    model: str = ""
    name: str = "learning-to-cache"
    last_step_full: bool = False
    carrier: Carrier = REUSE
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        name, logits = type(self).__name__, self.logits
        if logits.dim() != 2 or logits.shape[0] < 1 or logits.shape[1] < 2 or logits.shape[1] % 2:
            fail(name, "logits", "have shape (T, 2L)", tuple(logits.shape))
        if not logits.isfinite().all():
            fail(name, "logits", "be finite", "some that are not")
        if not 0 < self.threshold < 1:
            fail(name, "threshold", "be in (0, 1)", self.threshold)
        own = logits.detach().to("cpu", torch.float32, copy=True).contiguous()
        object.__setattr__(self, "logits", own)
        digest = hashlib.sha256(own.numpy().tobytes()).hexdigest()
        object.__setattr__(self, "fingerprint", digest[:12])

    @property
    def num_inference_steps(self) -> int:
        """The number of the sampler's steps; for U-ViT, evaluations of each cache context."""
        return self.logits.shape[0]

    @property
    def num_layers(self) -> int:
        """L."""
        return self.logits.shape[1] // 2

    @property
    def selector(self) -> ScoreSelector:
        """No token is ever selected."""
        return ScoreSelector("none")

    @cached_property
    def mask(self) -> tuple[tuple[bool, ...], ...]:
        """The computed entries of ``logits``, as a table (T, 2L) on the host."""
        return tuple(map(tuple, (self.logits.sigmoid() > self.threshold).tolist()))

    def is_full(self, step: Step) -> bool:
        """Tell whether every sub-layer is computed in ``step``, whatever the mask says."""
        is_last = self.last_step_full and step.index == step.total - 1
        return is_last or step.index == 0 or step.counter(self.counts_down) % 2 == 1

    @property
    def cached_counters(self) -> list[int]:
        """The counters of the steps that are not full, ascending."""
        return list_cached_counters(self.num_inference_steps, self.counts_down)

    def count_computed(self, module: str) -> int:
        """Count the steps that are not full but compute a module, summed over the blocks."""
        first = _MODULES.index(module)
        return sum(sum(self.mask[counter][first::2]) for counter in self.cached_counters)

    @property
    def skipped_share(self) -> float:
        """The share of the sub-layers of the steps that are not full which is skipped."""
        total = len(self.cached_counters) * 2 * self.num_layers
        return 1 - sum(self.count_computed(module) for module in _MODULES) / max(total, 1)

    @property
    def predictor(self) -> None:
        """None: no network scores tokens."""
        return None

    def decide(self, site: Site, step: Step, num_tokens: int) -> Decision:
        """Decide the work at ``site`` in ``step``; ``num_tokens`` is the length of its sequence."""
        name = type(self).__name__
        if step.total != self.num_inference_steps:
            got = f"one for {self.num_inference_steps}"
            fail(name, "logits", f"be for {step.total} steps", got)
        if site.layer >= self.num_layers:
            got = f"some for {self.num_layers} blocks"
            fail(name, "logits", f"be for a model with a block {site.layer}", got)
        if site.stream != "main" or site.module not in _MODULES:
            fail(name, "site", "be the attention or MLP of a model with one stream", site)
        entry = 2 * site.layer + _MODULES.index(site.module)
        if self.is_full(step) or self.mask[step.counter(self.counts_down)][entry]:
            return Decision(Action.FULL, num_tokens)
        return Decision(Action.REUSE, 0)


def list_cached_counters(num_steps: int, counts_down: bool) -> list[int]:
    """The counters of the steps that a router decides on: the even ones but the first step's."""
    first = num_steps - 1 if counts_down else 0
    return [counter for counter in range(0, num_steps, 2) if counter != first]


class CacheRouter(nn.Module):
    """The logits of a router in training, a parameter for each step: one not used does not move.

    They begin as normal values.
    """

    def __init__(self, num_layers: int, num_steps: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.logits = nn.ParameterList(
            torch.randn(2 * num_layers, generator=generator) for _ in range(num_steps)
        )

    def forward(self, counter: int) -> Tensor:
        """The weights (2L,) of a step's fresh sub-layers in the blend, in (0, 1)."""
        weights: Tensor = self.logits[counter].sigmoid()
        return weights

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep every logit within reach of a change of mind."""
        for logits in self.logits:
            logits.clamp_(-MAX_LOGIT, MAX_LOGIT)

    def stack(self) -> Tensor:
        """All logits, (T, 2L), without a gradient."""
        return torch.stack([logits.detach() for logits in self.logits])


def save_router(router: LearningToCacheConfig, path: Path) -> None:
    """Write a router as safetensors; the file is there as a whole or not."""
    from safetensors.torch import save

    names = ("threshold", "counts_down", "model", "name", "last_step_full")
    facts: dict[str, Any] = {name: getattr(router, name) for name in names}
    facts["carrier"] = describe_carrier(router.carrier)
    facts.update(num_layers=router.num_layers, num_inference_steps=router.num_inference_steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": FORMAT, "facts": json.dumps(facts, sort_keys=True)}
    replace_file(path, save({"logits": router.logits}, metadata))


def load_router(
    path: str | Path, *, num_layers: int | None = None, num_inference_steps: int | None = None
) -> LearningToCacheConfig:
    """Load a file written by ``save_router``.

    Args:
        path: the file.
        num_layers: the depth of the model that it is for; None: whatever it is.
        num_inference_steps: the steps of the sampler that it is for; None: whatever they are.

    Raises:
        ValueError: the file is truncated, no router of ours, or for another depth or step count.
        FileNotFoundError: there is no such file.
    """
    tensors, metadata = load_safetensors(path, "load_router", "path", FORMAT)
    try:
        facts = json.loads(metadata["facts"])
        sizes = {name: facts.pop(name) for name in ("num_layers", "num_inference_steps")}
        if "carrier" in facts:
            facts["carrier"] = make_carrier(facts["carrier"])
        router = LearningToCacheConfig(tensors["logits"], **facts)
        if sizes != {name: getattr(router, name) for name in sizes}:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        fail("load_router", "path", "hold the router that its metadata describes", path)
    for name, wanted in (("num_layers", num_layers), ("num_inference_steps", num_inference_steps)):
        if wanted is not None and wanted != sizes[name]:
            got = f"{path} with {sizes[name]}"
            fail("load_router", "path", f"hold a router with {name} = {wanted}", got)
    return router


@dataclass(frozen=True)
class RouterPreset:
    """The model and sampler of a published router, and its threshold."""

    num_inference_steps: int
    num_layers: int
    threshold: float
    counts_down: bool = True


ROUTER_PRESETS = {
    "dit-xl-ddim50": RouterPreset(50, 28, 0.1),
    "dit-xl-ddim20": RouterPreset(20, 28, 0.1),
    "dit-xl-ddim10": RouterPreset(10, 28, 0.1),
    "dit-xl-512px-ddim50": RouterPreset(50, 28, 0.9),
    "dit-l-ddim50": RouterPreset(50, 24, 0.1),
    "dit-l-ddim20": RouterPreset(20, 24, 0.1),
    "uvit-h-dpm50": RouterPreset(50, 29, 0.9, counts_down=False),
    "uvit-h-dpm20": RouterPreset(20, 29, 0.9, counts_down=False),
}


def import_router(path: str | Path, preset: str | RouterPreset) -> LearningToCacheConfig:
    """Read a router from a checkpoint of PyTorch's, such as the published ones.

    The logits may be one tensor (T, 2L), or one of 2L elements for each step, in a list or a
    dictionary, with other things around them. Where there are only as many as steps that are not
    full, they belong to these. Nothing in a file is ever executed: it is read with
    ``weights_only``, and command-line arguments stored with it are passed over.

    Args:
        path: the checkpoint.
        preset: a name in ``ROUTER_PRESETS``, or the setting that the router was trained for.

    Raises:
        ValueError: the file is truncated or foreign, or holds no router of this size.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if isinstance(preset, str):
        if preset not in ROUTER_PRESETS:
            known = ", ".join(ROUTER_PRESETS)
            fail("import_router", "preset", f"be one of {known}", repr(preset))
        model, preset = preset, ROUTER_PRESETS[preset]
    else:
        model = path.stem
    if not path.exists():
        raise FileNotFoundError(f"import_router: path must be a file, got {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    # torch.load raises anything on a file that is no checkpoint
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, pickle.UnpicklingError):
            # PyTorch would advise to execute the file
            reason = "it holds something else"
        raise ValueError(
            f"import_router: path must be a whole checkpoint of tensors, got {path} ({reason})"
        ) from error
    logits = _find_logits(path, content, preset)
    return LearningToCacheConfig(logits, preset.threshold, preset.counts_down, model)


def _find_logits(path: Path, content: object, preset: RouterPreset) -> Tensor:
    """The one table (T, 2L) in a checkpoint."""
    T, width = preset.num_inference_steps, 2 * preset.num_layers
    cached = list_cached_counters(T, preset.counts_down)
    # tensors whose names differ in numbers alone belong together, in the order of these
    families: dict[str, list[tuple[list[int], Tensor]]] = {}
    for name, tensor in _list_tensors(content):
        is_stored = tensor.layout is torch.strided and not tensor.is_meta
        if is_stored and tensor.is_floating_point() and not name.startswith("opt"):
            numbers = [int(number) for number in re.findall(r"\d+", name)]
            families.setdefault(re.sub(r"\d+", "#", name), []).append((numbers, tensor.float()))
    tables, sizes = [], []
    for family in families.values():
        ordered = [tensor for _, tensor in sorted(family, key=lambda item: item[0])]
        if len({tensor.numel() for tensor in ordered}) > 1:
            continue
        table = ordered[0] if len(ordered) == 1 else torch.stack([t.flatten() for t in ordered])
        if table.dim() != 2:
            continue
        sizes.append(f"{tuple(table.shape)}")
        if table.shape == (T, width):
            tables.append(table)
        elif table.shape == (len(cached), width):
            # the rows of full steps say nothing
            tables.append(torch.zeros(T, width).index_copy(0, torch.tensor(cached), table))
    if len(tables) != 1:
        wanted = f"hold one router of {T} steps and {width} sub-layers"
        got = f"{path} with {len(tables)} (tables: {', '.join(sizes) or 'none'})"
        fail("import_router", "path", wanted, got)
    return tables[0]


def _list_tensors(content: object) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dictionaries and lists, by its keys joined with dots."""
    found: list[tuple[str, Any]] = [("", content)]
    seen: set[int] = set()
    # grows on the way; a list may hold itself, or one other many times
    for name, value in found:
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            found += ((f"{name}.{key}" if name else str(key), item) for key, item in items)
