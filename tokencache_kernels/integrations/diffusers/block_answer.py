"""The answers of the cache to the calls of a transformer's blocks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...models import spec
from ...models.spec import Stack
from ...policies import Step
from .arguments import ModuleCall
from .fused import (
    Composer,
    described_arguments,
    read_sources,
)
from .interception import (
    Original,
    eager,
    transparent,
)
from .prediction import predict_scores
from .session import Call, Pass, Session


class BlockAnswer:
    """Runs one block as the policy decides."""

    def __init__(self, session: Session, stack: Stack, layer: int) -> None:
        self.session = session
        self._stack = stack
        self._layer = layer
        binding = session.binding
        self._parts = binding.parts[stack.path][layer]
        self._sites = binding.sites(stack, layer)
        first, last = binding.spec.stacks[0], binding.spec.stacks[-1]
        self._is_first = stack is first and layer == 0
        self._is_last = stack is last and layer == binding.depth(last) - 1
        self._ends_stack = layer == binding.depth(stack) - 1
        self._described = described_arguments(stack)

    @transparent
    def call(self, module: Any, original: Original, *arguments: Any, **named: Any) -> Any:
        """Full blocks run their own code; others are composed, or run with cached modules."""
        call = self.session.call
        if call is None or call.is_ended:
            return original(*arguments, **named)
        made = ModuleCall(module, original, arguments, named)
        given = made.given
        answer = self._begin(module, call, given)
        if answer is not None:
            return answer
        # its own code, which a compiler may see
        output = made.run_with(given)
        return self._end(call, output)

    @eager
    def _begin(self, block: Any, call: Call, given: dict[str, Any]) -> Any:
        """Answer a call without the block's own code; None if that has to run."""
        session, run = self.session, call.run
        hidden_states = given[self._stack.streams[0]]
        if self._is_first:
            self._begin_step(block, call, given)
        runner = run.runner
        if runner.skips_blocks:
            return self._skip(call, given)
        is_full = runner.is_full(self._sites)
        device = hidden_states.device.type
        if (
            not is_full
            and session.fuses(self._stack, self._layer, block)
            and self._is_described(given)
            and not (device != "meta" and torch.is_autocast_enabled(device))
        ):
            sources = read_sources(self._stack, block, given)
            if sources is not None:
                self._compose(block, call, given, sources)
                return self._leave(call, given)
        self._leave_streams(run, given)
        call.mode = "own" if is_full else "as_is"
        return None

    def _is_described(self, given: dict[str, Any]) -> bool:
        """Tell whether the block is given no arguments beside those of its description."""
        return all(
            name in self._described or value is None or value == {} for name, value in given.items()
        )

    def _begin_step(self, block: Any, call: Call, given: dict[str, Any]) -> None:
        session, run = self.session, call.run
        hidden_states = given[self._stack.streams[0]]
        batch = len(hidden_states)
        tokens = {}
        for name in self._stack.streams:
            rows = given[name]
            if len(rows) == 1 and batch > 1:
                # the model would repeat one prompt for all images as it goes
                given[name] = rows = rows.expand(batch, *rows.shape[1:])
            tokens[name] = rows.shape[1]
        grid = _read_grid(session.binding.spec, session.transformer, call.given)
        key = (*tokens.items(), grid)
        if key not in run.groups:
            run.groups[key] = session.binding.groups(tokens, grid, session.takes_entropy)
        predictor = session.policy.predictor

        def predict(step: Step) -> Tensor:
            assert predictor is not None, "policies that predict are refused without a predictor"
            return predict_scores(predictor, session.binding.spec, block, given, step)

        run.runner.begin_step(
            run.groups[key], batch, hidden_states.device, predict, run.is_guidance_pair
        )

    def _skip(self, call: Call, given: dict[str, Any]) -> Any:
        streams = {name: given[name] for name in self._stack.streams}
        if self._is_last:
            image = self._stack.streams[0]
            streams[image] = call.run.runner.load_output(like=streams[image]).clone()
            self._end_call(call, None)
        return self._returned(streams)

    def _compose(self, block: Any, call: Call, given: dict[str, Any], sources: Any) -> None:
        session, run, stack = self.session, call.run, self._stack
        backend = session.options.backend
        if stack.joins:
            streams = {stack.streams[0]: run.joint_stream(stack, given, backend)}
        else:
            streams = {name: run.stream(name, given[name], backend) for name in stack.streams}
        scored = session.binding.scored_sites(stack, self._layer, stack.streams[0])
        call.mode = "fused"
        Composer(
            stack, self._layer, self._parts, block, given, sources, run.runner, streams,
            run.key_lengths, session.takes_entropy,
            next(filter(run.runner.is_selected, scored), None),
        ).run()  # fmt: skip
        call.mode = "off"

    def _leave(self, call: Call, given: dict[str, Any]) -> Any:
        """Return the result of a composed block; streams go on behind it, up to the end of the
        stack.
        """
        run, stack = call.run, self._stack
        ends = self._ends_stack or stack.is_seen
        if stack.joins:
            text_tokens = given[stack.streams[1]].shape[1]
            streams = run.show_joint_stream(stack, text_tokens, ends)
        elif ends:
            streams = {name: run.leave_stream(name, run.streams[name].hidden_states)
                       for name in stack.streams}  # fmt: skip
        else:
            streams = {name: run.streams[name].hidden_states for name in stack.streams}
        if self._is_last:
            self._end_call(call, streams[stack.streams[0]])
        return self._returned(streams)

    def _leave_streams(self, run: Pass, given: dict[str, Any]) -> None:
        """Add everything that is pending before a block runs its own code."""
        stack = self._stack
        if stack.joins:
            given.update(run.leave_joint_stream(stack, given))
            return
        for name in stack.streams:
            given[name] = run.leave_stream(name, given[name])

    @eager
    def _end(self, call: Call, output: Any) -> Any:
        call.mode = "off"
        call.run.loans.settle()
        if self._is_last:
            returned = output if isinstance(output, tuple) else (output,)
            image = returned[self._stack.returns.index(self._stack.streams[0])]
            self._end_call(call, image)
        return output

    def _end_call(self, call: Call, output: Tensor | None) -> None:
        if output is not None:
            call.run.runner.remember_output(output)
        call.run.runner.end_step()
        call.is_ended = True

    def _returned(self, streams: dict[str, Tensor]) -> Any:
        if len(self._stack.returns) == 1:
            return streams[self._stack.returns[0]]
        return tuple(streams[name] for name in self._stack.returns)


def _read_grid(
    model: spec.ModelSpec, transformer: Any, given: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Return the layout of the image's tokens; the frames of a video lie below each other."""
    if model.grid is None:
        return None
    latents = given.get(model.latents)
    if not isinstance(latents, Tensor) or latents.dim() != (5 if model.grid.is_video else 4):
        return None
    patch = model.grid.patch
    if isinstance(patch, str):
        patch = getattr(transformer.config, patch)
    sizes = patch if isinstance(patch, (tuple, list)) else (1, patch, patch)
    height, width = latents.shape[-2] // sizes[-2], latents.shape[-1] // sizes[-1]
    frames = latents.shape[2] // sizes[0] if model.grid.is_video else 1
    return frames * height, width
