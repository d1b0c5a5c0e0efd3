"""Capture the calls of a transformer as CUDA graphs, by kind of step, and replay them."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers.hooks import HookRegistry
from torch import Tensor, nn

from ...blocks import (
    Capture,
    GraphCounts,
    StaticInputs,
    StepGraphs,
    describe_arguments,
    refuse,
)
from ...ops._checks import fail
from .hooks import HOOK_NAME, Contexts, StatefulHook

GRAPH_HOOK_NAME = f"{HOOK_NAME}_graphs"
_CONSTANTS = frozenset({bool, int, float, str, type(None)})


class ModelState:
    """What a graph takes for granted of the modules that it runs.

    Attributes:
        settings: the addresses of all parameters, and whatever else the modules hold, by module.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        modules = [module for model in models for module in model.modules()]
        self.settings = [_freeze(vars(module)) for module in modules]
        # no modules: what they hold is not theirs alone
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
        """Whether no module, parameter or buffer has been replaced; quick enough for every step."""
        return self._read_ids() == self._ids

    def _read_ids(self) -> list[int]:
        return [id(part) for parts in self._parts for part in parts.values()]


@dataclass(frozen=True)
class _Captured:
    """The graphs of one cache context, and what they take for granted."""

    steps: StepGraphs
    inputs: StaticInputs
    arguments: Mapping[str, str]
    models: ModelState


class GraphHook(StatefulHook):
    """Runs a transformer's call, or replays one of its kind.

    Attributes:
        counts: of the calls since the policy was applied.
    """

    def __init__(self, contexts: Contexts, models: Sequence[nn.Module], capture: Capture) -> None:
        super().__init__(contexts)
        self.counts = GraphCounts()
        self._models = models
        self._signature = inspect.signature(type(models[0]).forward)
        self._capture = capture
        self._captured: dict[str, _Captured] = {}

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Forget every context, and its graphs."""
        self._captured.clear()
        return super().reset_state(module)

    def new_forward(self, transformer: Any, *arguments: Any, **named: Any) -> Any:
        """The transformer's output, with the same bits as without graphs."""
        device = next(transformer.parameters()).device
        self._check_call(device)
        given = self._signature.bind(transformer, *arguments, **named).arguments
        del given["self"]
        described = describe_arguments(given, device)
        if self.state.runner.step.index == 0:
            captured = self._begin_run(device, given, described)
        else:
            captured = self._go_on(described)
        filled = captured.inputs.fill_(given)
        launch = partial(self.fn_ref.original_forward, **filled)
        return captured.steps.run(self.state.runner, launch)

    def _check_call(self, device: torch.device) -> None:
        """Refuse what no call can be captured under."""
        refusal = self._capture.refusal(device)
        if refusal is not None:
            refuse("transformer", "be on a CUDA device", refusal)
        if torch.is_grad_enabled():
            refuse("a call", "be under torch.no_grad()", "one that records gradients")
        if torch.is_autocast_enabled(device.type):
            refuse("a call", "be without autocast", "one that casts weights by itself")

    def _begin_run(
        self, device: torch.device, given: Mapping[str, Any], described: Mapping[str, str]
    ) -> _Captured:
        """Keep the graphs if nothing that they take for granted has changed since the last run."""
        transformer, *others = self._models
        check_transformer(transformer)
        for model in others:
            model.to(device)
        name = self._contexts.context.name
        models = ModelState(self._models)
        captured = self._captured.get(name)
        if (
            captured is None
            or captured.arguments != described
            or captured.models.settings != models.settings
        ):
            steps = StepGraphs(self._capture, device, self.counts)
            captured = _Captured(steps, StaticInputs(given), described, models)
            self._captured[name] = captured
        return captured

    def _go_on(self, described: Mapping[str, str]) -> _Captured:
        """Refuse changes in the middle of a run."""
        captured = self._captured[self._contexts.context.name]
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
        if hasattr(module, "_hf_hook"):
            got = f"{type(module._hf_hook).__name__} {where}"
            refuse("transformer", "keep its weights in place, with no hook that moves them", got)
        registry = getattr(module, "_diffusers_hook", None)
        for hook in registry.hooks if registry is not None else ():
            if not hook.startswith(HOOK_NAME):
                refuse("transformer", "have no hook that is not ours", f"{hook} {where}")
        if module._compiled_call_impl is not None:
            refuse("transformer", "not be compiled", f"torch.compile {where}")


def attach_graphs(
    transformer: nn.Module, contexts: Contexts, models: Sequence[nn.Module], capture: Capture
) -> None:
    """Hook the transformer, inside of what we hooked it with before.

    What that does for each call, such as counting the tokens of a mask, needs the host.
    """
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    outer = registry.get_hook(HOOK_NAME)
    registry.remove_hook(HOOK_NAME, recurse=False)
    registry.register_hook(GraphHook(contexts, models, capture), GRAPH_HOOK_NAME)
    if outer is not None:
        registry.register_hook(outer, HOOK_NAME)


def count_graph_steps(transformer: nn.Module) -> GraphCounts:
    """How the calls of a transformer ran since ``apply_token_cache(..., cuda_graphs=True)``.

    The difference over one call says whether that one was replayed.
    """
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    hook = registry.get_hook(GRAPH_HOOK_NAME)
    if hook is None:
        wanted = "have a token cache with cuda_graphs=True"
        fail("count_graph_steps", "transformer", wanted, "one without")
    counts: GraphCounts = replace(hook.counts)
    return counts


def _freeze(value: Any) -> Any:
    """What a module holds, so that it can be compared with what it holds later."""
    if type(value) in _CONSTANTS:
        return value
    if isinstance(value, dict):
        return [(key, _freeze(held)) for key, held in value.items()] if value else ()
    if isinstance(value, (list, tuple)):
        return [_freeze(held) for held in value]
    if isinstance(value, Tensor):
        return value.data_ptr(), value.shape, value.dtype, value.device
    return value
