"""Capture the calls of a transformer as CUDA graphs, by kind of step, and replay them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...blocks import (
    Capture,
    GraphCounts,
    StaticInputs,
    StepGraphs,
    describe_arguments,
    refuse,
)
from ...errors import fail
from . import compat
from .interception import Original, interceptor_of
from .session import Call, Pass

_CONSTANTS = frozenset({bool, int, float, str, type(None)})


class ModelState:
    """A graph's assumptions on the modules that it runs.

    Attributes:
        settings: the addresses of all parameters, and whatever else the modules hold, by module.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        modules = [module for model in models for module in model.modules()]
        self.settings = [_freeze(vars(module)) for module in modules]
        # no modules: their contents are not theirs alone
        processors = (getattr(module, "processor", None) for module in modules)
        self.settings += [_freeze(vars(one)) for one in processors if one is not None]
        self._parts = [
            parts
            for module in modules
            for parts in (module._modules, module._parameters, module._buffers)
            if parts
        ]
        self._ids = self._read_ids()

    def has_its_parts(self) -> bool:
        """Tell whether no module, parameter or buffer has been replaced; quick enough for every
        step.
        """
        return self._read_ids() == self._ids

    def _read_ids(self) -> list[int]:
        return [id(part) for parts in self._parts for part in parts.values()]


@dataclass(frozen=True)
class _Captured:
    """The graphs of one pass, and their assumptions."""

    steps: StepGraphs
    inputs: StaticInputs
    arguments: Mapping[str, str]
    models: ModelState


class Graphs:
    """Runs a transformer's calls, or replays steps of their kind.

    Attributes:
        counts: of the calls since the policy was applied.
    """

    def __init__(self, models: Sequence[nn.Module], capture: Capture) -> None:
        self.counts = GraphCounts()
        self._models = models
        self._capture = capture
        self._captured: WeakKeyDictionary[Pass, _Captured] = WeakKeyDictionary()

    def clear(self) -> None:
        """Forget all graphs."""
        self._captured.clear()

    def copy_for(self, transformer: nn.Module) -> "Graphs":
        """Make graphs of a copy of the transformer, which has captured nothing yet."""
        return Graphs([transformer, *self._models[1:]], self._capture)

    def run(self, transformer: Any, call: Call, original: Original, given: dict[str, Any]) -> Any:
        """Return the transformer's output, with the same bits as without graphs."""
        device = next(transformer.parameters()).device
        self._check_call(device)
        described = describe_arguments(given, device)
        run = call.run
        if run.runner.begins:
            captured = self._begin_run(transformer, run, device, given, described)
        else:
            captured = self._go_on(run, described)
        filled = captured.inputs.fill_(given)
        output = captured.steps.run(run.runner, partial(original, **filled))
        call.is_ended = True
        return output

    def _check_call(self, device: torch.device) -> None:
        """Refuse the conditions under which no call can be captured."""
        refusal = self._capture.refusal(device)
        if refusal is not None:
            refuse("transformer", "be on a CUDA device", refusal)
        if torch.is_grad_enabled():
            refuse("a call", "be under torch.no_grad()", "one that records gradients")
        if torch.is_autocast_enabled(device.type):
            refuse("a call", "be without autocast", "one that casts weights by itself")

    def _begin_run(
        self,
        transformer: nn.Module,
        run: Pass,
        device: torch.device,
        given: Mapping[str, Any],
        described: Mapping[str, str],
    ) -> _Captured:
        """Keep the graphs if nothing that they take for granted has changed since the last run."""
        check_transformer(transformer)
        others = self._models[1:]
        for model in others:
            model.to(device)
        models = ModelState([transformer, *others])
        captured = self._captured.get(run)
        if (
            captured is None
            or captured.arguments != described
            or captured.models.settings != models.settings
        ):
            steps = StepGraphs(self._capture, device, self.counts)
            captured = _Captured(steps, StaticInputs(given), described, models)
            self._captured[run] = captured
        return captured

    def _go_on(self, run: Pass, described: Mapping[str, str]) -> _Captured:
        """Refuse changes in the middle of a run."""
        captured = self._captured[run]
        for name in {**captured.arguments, **described}:
            began, now = (of.get(name, "none") for of in (captured.arguments, described))
            if now != began:
                refuse(name, f"be {began} in all steps of a run", f"{now}; reset the cache first")
        if not captured.models.has_its_parts():
            got = "others; reset the cache first"
            refuse("transformer", "keep its modules and parameters during a run", got)
        return captured


def check_transformer(transformer: nn.Module) -> None:
    """Refuse a model that does more in a call than its own launches, or whose weights move."""
    for name, module in transformer.named_modules():
        where = f"on {name or 'the transformer itself'}"
        if module.training:
            refuse("transformer", "be in evaluation mode", f"training mode {where}")
        hook = compat.accelerate_hook_of(module)
        if hook is not None:
            got = f"{type(hook).__name__} {where}"
            refuse("transformer", "keep its weights in place, with no hook that moves them", got)
        for foreign in compat.hooks_of(module):
            if foreign != compat.MODULATION_HOOK:
                refuse("transformer", "have no hook that is not ours", f"{foreign} {where}")
        if compat.is_compiled(module):
            refuse("transformer", "not be compiled", f"torch.compile {where}")


def count_graph_steps(transformer: nn.Module) -> GraphCounts:
    """Count the calls of a transformer since ``apply_token_cache(..., cuda_graphs=True)``.

    The difference over one call says whether that one was replayed.
    """
    interceptor = interceptor_of(transformer)
    if interceptor is None or interceptor.session.graphs is None:
        wanted = "have a token cache with cuda_graphs=True"
        fail("count_graph_steps", "transformer", wanted, "one without")
    counts: GraphCounts = replace(interceptor.session.graphs.counts)
    return counts


def _freeze(value: Any) -> Any:
    """A snapshot of a module's contents, for a later comparison."""
    if type(value) in _CONSTANTS:
        return value
    if isinstance(value, dict):
        return [(key, _freeze(held)) for key, held in value.items()] if value else ()
    if isinstance(value, (list, tuple)):
        return [_freeze(held) for held in value]
    if isinstance(value, Tensor):
        return value.data_ptr(), value.shape, value.dtype, value.device
    return value
