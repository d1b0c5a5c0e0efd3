"""Steps that carry the output of a whole model, whatever the model is: a step table applied."""

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import CacheMissError, UnsupportedInputError
from ..ops._checks import fail
from ..policies import StepTable

# names that models give to the latents, where these are no positional argument
_LATENTS = ("hidden_states", "sample", "x", "latents")


class Rule(Protocol):
    """Says which steps run the model, and how every step's output is made of those kept."""

    num_inference_steps: int
    history: int

    def is_full(self, index: int) -> bool:
        """Tell whether step ``index`` runs the model."""

    def weigh(
        self, index: int, outputs: Sequence[Tensor], latents: Tensor
    ) -> tuple[Sequence[float], float]:
        """Give the weights of the kept outputs, oldest first, and of the latents."""


class TableRule:
    """The weights of a step table."""

    def __init__(self, table: StepTable) -> None:
        self.table = table
        self.num_inference_steps = table.num_inference_steps
        self.history = table.history
        self._full = frozenset(table.full_steps)

    def is_full(self, index: int) -> bool:
        """Tell whether step ``index`` runs the model."""
        return index in self._full

    def weigh(
        self, index: int, outputs: Sequence[Tensor], latents: Tensor
    ) -> tuple[Sequence[float], float]:
        """The table's row."""
        return self.table.weights[index], self.table.input_weights[index]


class CarriedForward:
    """The forward of a model under a rule; it stands in the model's ``forward``.

    Attributes:
        rule: decides.
        original: the forward that it replaced.
    """

    def __init__(self, original: Any, rule: Rule, calls_per_step: int) -> None:
        self.original = original
        self.rule = rule
        self._calls_per_step = calls_per_step
        self.reset()

    def reset(self) -> None:
        """Begin a new run, and free the buffers of the last one."""
        self._calls = 0
        self._kept: list[list[Tensor]] = [[] for _ in range(self._calls_per_step)]
        self._last: list[Any] = [None] * self._calls_per_step

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # a bound method of the model: the copy of a model with a table has none
        return copy.deepcopy(self.original, memo)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Run the model or not, and return an output of the kind that the model returns."""
        slot = self._calls % self._calls_per_step
        index = self._calls // self._calls_per_step % self.rule.num_inference_steps
        if index == 0:
            self._kept[slot].clear()
        kept, latents = self._kept[slot], _find_latents(arguments, named)
        if self.rule.is_full(index):
            answer = self.original(*arguments, **named)
            output = _find_output(answer)
            if kept and kept[-1].shape != output.shape:
                self._refuse(index, kept[-1], output)
            kept.append(output.detach().clone())
            del kept[: -self.rule.history]
            self._last[slot] = answer
        elif not kept:
            raise CacheMissError("token cache: no output is kept; the first step must be full")
        elif kept[-1].shape[0] != latents.shape[0]:
            self._refuse(index, kept[-1], latents)
        weights, input_weight = self.rule.weigh(index, kept, latents)
        self._calls += 1
        output = _combine(kept, weights, latents, input_weight)
        if self._calls == self._calls_per_step * self.rule.num_inference_steps:
            answer = _replace_output(self._last[slot], output)
            self.reset()
            return answer
        return _replace_output(self._last[slot], output)

    def _refuse(self, index: int, kept: Tensor, now: Tensor) -> None:
        raise CacheMissError(
            f"token cache: the batch or size changed at step {index} (was {tuple(kept.shape)}, now "
            f"{tuple(now.shape)}); call reset_step_table first"
        )


def apply_step_table(model: nn.Module, table: StepTable, *, calls_per_step: int = 1) -> None:
    """Make a model follow a step table from its next call on.

    The model may be any module whose first argument is the latents and that returns a tensor, a
    tuple that begins with one, or one of diffusers' outputs with ``sample``. Steps are counted; a
    new run begins after ``num_inference_steps`` of them.

    Args:
        model: the transformer (not its pipeline), on any device.
        table: see ``StepTable``.
        calls_per_step: how often the sampler calls the model in a step, such as 2 where guidance
            is not one batch; the calls come in the same order in every step.

    Raises:
        ValueError: the model has a table already.
    """
    if calls_per_step < 1:
        fail("apply_step_table", "calls_per_step", "be at least 1", calls_per_step)
    install_rule(model, TableRule(table), calls_per_step)


def install_rule(model: nn.Module, rule: Rule, calls_per_step: int = 1) -> None:
    """Make a model follow a rule; see ``apply_step_table``."""
    if has_step_table(model):
        raise ValueError("apply_step_table: the model has a step table; remove_step_table first")
    model.forward = CarriedForward(model.forward, rule, calls_per_step)


def has_step_table(model: nn.Module) -> bool:
    """Tell whether a model follows a step table."""
    return isinstance(vars(model).get("forward"), CarriedForward)


def remove_step_table(model: nn.Module) -> None:
    """Remove the table and free its buffers; without one this does nothing."""
    forward = vars(model).get("forward")
    if not isinstance(forward, CarriedForward):
        return
    if getattr(forward.original, "__func__", None) is type(model).forward:
        del model.forward
    else:
        model.forward = forward.original


def reset_step_table(model: nn.Module) -> None:
    """Begin a new run with the next call; needed only after a run that was broken off."""
    forward = vars(model).get("forward")
    if isinstance(forward, CarriedForward):
        forward.reset()


def _combine(
    outputs: Sequence[Tensor], weights: Sequence[float], latents: Tensor, input_weight: float
) -> Tensor:
    """Sum in float32, or in float64 of float64, and round once."""
    newest = outputs[-1]
    if input_weight == 0 and weights[-1] == 1 and not any(weights[:-1]):
        return newest.clone()
    dtype = torch.promote_types(newest.dtype, torch.float32)
    total = newest.to(dtype) * weights[-1]
    for output, weight in zip(outputs[:-1], weights[:-1], strict=True):
        total.add_(output.to(dtype), alpha=weight)
    if input_weight != 0:
        if latents.shape != newest.shape:
            raise UnsupportedInputError(
                f"token cache: the table weighs latents, whose shape must be the output's "
                f"{tuple(newest.shape)}, got {tuple(latents.shape)}"
            )
        total.add_(latents.to(dtype), alpha=input_weight)
    return total.to(newest.dtype)


def _find_latents(arguments: Sequence[Any], named: dict[str, Any]) -> Tensor:
    found = arguments[0] if arguments else next((named[n] for n in _LATENTS if n in named), None)
    if not isinstance(found, Tensor):
        raise UnsupportedInputError(
            "token cache: the model's first argument must be a tensor of latents, got "
            f"{type(found).__name__}"
        )
    return found


def _find_output(answer: Any) -> Tensor:
    found = answer
    if isinstance(answer, tuple):
        found = answer[0]
    elif hasattr(answer, "sample"):
        found = answer.sample
    if not isinstance(found, Tensor):
        raise UnsupportedInputError(
            f"token cache: the model must return a tensor, got {type(answer).__name__}"
        )
    return found


def _replace_output(answer: Any, output: Tensor) -> Any:
    if isinstance(answer, Tensor):
        return output
    if isinstance(answer, tuple):
        return (output, *answer[1:])
    return type(answer)(sample=output)
