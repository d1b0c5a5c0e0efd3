"""Some tokens through a whole model: a ``TokenSteps`` policy on a diffusers transformer.

The blocks run the model's own code on the rows of the chosen tokens, with the rotary embedding of
these. The model's code before and behind its blocks sees all tokens.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ... import ops
from ...errors import CacheMissError, UnsupportedInputError, fail
from ...models.spec import JointAttention, Parallel, SelfAttention
from ...policies import TokenSteps
from .arguments import name_arguments
from .binding import Binding, resolve

# a token's neighbours: those it is interpolated from, and those that its variance is taken over
_NUM_NEAREST = 4
_NUM_AROUND = 9
# the meaning of a model's output: the noise, or the velocity from the clean image to the noise
SUPPORTED = {
    "DiTTransformer2DModel": "noise",
    "FluxTransformer2DModel": "velocity",
    "WanTransformer3DModel": "velocity",
}


def apply_token_steps(
    model: nn.Module,
    policy: TokenSteps,
    binding: Binding,
    *,
    scheduler: Any = None,
    calls_per_step: int = 1,
    backend: str = "auto",
) -> None:
    """Make a transformer follow the policy from its next call on; steps are counted.

    Args:
        model: a transformer of a class in ``SUPPORTED``.
        policy: see ``TokenSteps``.
        binding: its description, bound to it.
        scheduler: has ``alphas_cumprod``; needed to interpolate where the model gives noise.
        calls_per_step: how often the sampler calls the model in a step.
        backend: the backend of the ops that move rows.

    Raises:
        UnsupportedInputError: the class is another one, or the scheduler is missing.
    """
    if binding.spec.transformer not in SUPPORTED:
        raise UnsupportedInputError(
            f"apply_token_cache: transformer must be one of {', '.join(SUPPORTED)} under a "
            f"TokenSteps policy, got {binding.spec.transformer}"
        )
    if calls_per_step < 1:
        fail("apply_token_steps", "calls_per_step", "be at least 1", calls_per_step)
    alphas = None
    if policy.fill == "interpolate" and SUPPORTED[binding.spec.transformer] == "noise":
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(alphas, Tensor):
            raise UnsupportedInputError(
                "apply_token_cache: scheduler must have alphas_cumprod to interpolate what "
                f"{binding.spec.transformer} gives, got {type(scheduler).__name__}"
            )
    model.forward = SubsetForward(model, policy, binding, alphas, calls_per_step, backend)


def has_token_steps(model: nn.Module) -> bool:
    """Tell whether a model follows a ``TokenSteps`` policy."""
    return isinstance(vars(model).get("forward"), SubsetForward)


def remove_token_steps(model: nn.Module) -> None:
    """Remove the policy and free its buffers; without one this does nothing."""
    forward = vars(model).get("forward")
    if isinstance(forward, SubsetForward):
        forward.remove()
        model.forward = forward.original
        if getattr(forward.original, "__func__", None) is type(model).forward:
            del model.forward


def reset_token_steps(model: nn.Module) -> None:
    """Begin a new run with the next call; needed only after a run that was broken off."""
    forward = vars(model).get("forward")
    if isinstance(forward, SubsetForward):
        forward.reset()


class _State:
    """One run: its memory of the steps before.

    Attributes:
        velocity: (B, N, C), each token's last output.
        before: the one before that, of the last step with all tokens.
        chosen: the tokens of the last step, (S,) int64 ascending; None: all.
        ranking: all tokens, those first that change most; None: not known yet.
        nearest: for every token, the distances and places of the nearest chosen ones.
        keys: by attention, the keys and values of all tokens, (B, H, L, E) each.
    """

    def __init__(self) -> None:
        self.velocity: Tensor | None = None
        self.before: Tensor | None = None
        self.chosen: Tensor | None = None
        self.ranking: Tensor | None = None
        self.nearest: tuple[Tensor, Tensor] = torch.empty(0), torch.empty(0)
        self.keys: dict[str, tuple[Tensor, Tensor]] = {}


class SubsetForward:
    """The forward of a transformer under a ``TokenSteps`` policy; it stands in its ``forward``."""

    def __init__(
        self,
        model: nn.Module,
        policy: TokenSteps,
        binding: Binding,
        alphas: Tensor | None,
        calls_per_step: int,
        backend: str,
    ) -> None:
        self._alphas = alphas
        self._divisor = binding.spec.timestep_divisor
        self.original = model.forward
        self.policy = policy
        self._config: Any = model.config
        self._type = type(model)
        self._backend = backend
        self._calls_per_step = calls_per_step
        # of the call under way: the tokens that the blocks see, and how many there are
        self._chosen: Tensor | None = None
        self._num_tokens = 0
        self._attention = ""
        self._rotary: dict[int, Any] = {}
        self._hooks: list[Any] = []
        blocks = list(binding.blocks(model))
        for place, (stack, layer, block) in enumerate(blocks):
            self._hooks.append(
                block.register_forward_pre_hook(
                    lambda module, given, named, first=place == 0: self._enter(
                        module, given, named, first
                    ),
                    with_kwargs=True,
                )
            )
            for part in binding.parts[stack.path][layer]:
                if isinstance(part, (SelfAttention, JointAttention, Parallel)):
                    path = part.attention if isinstance(part, Parallel) else part.module
                    self._watch(resolve(block, path), f"{stack.path}.{layer}.{path}")
        stack, _, last = blocks[-1]
        place = stack.returns.index(stack.streams[0])
        self._hooks.append(
            last.register_forward_hook(lambda module, given, output: self._leave(output, place))
        )
        self.reset()

    def reset(self) -> None:
        """Begin a new run, and free the buffers of the last one."""
        self._calls = 0
        self._states = [_State() for _ in range(self._calls_per_step)]

    def remove(self) -> None:
        """Take all hooks off."""
        for hook in self._hooks:
            hook.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise UnsupportedInputError(
            "token cache: a model with a TokenSteps policy must not be copied; "
            "remove_token_cache first"
        )

    @torch.no_grad()
    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Run the model on the step's tokens; return an output for all of them."""
        given = _name_arguments_of(self._type, arguments, named)
        latents = given["hidden_states"]
        patch = self._patch(latents)
        positions = _positions(latents, patch, given)
        N = len(positions)
        state = self._states[self._calls % self._calls_per_step]
        index = self._calls // self._calls_per_step
        if state.velocity is not None and len(state.velocity) != len(latents):
            raise CacheMissError(
                f"token cache: the batch changed at step {index} (was {len(state.velocity)}, now "
                f"{len(latents)}); call reset_token_cache first"
            )
        count = self.policy.count(index, N)
        self._chosen = None if count >= N else self._choose(state, count, positions)
        self._num_tokens = N
        self._rotary = {}
        self._state = state
        try:
            with _Attention(self):
                answer = self.original(*arguments, **named)
        finally:
            chosen, self._chosen = self._chosen, None
        output = answer[0] if isinstance(answer, tuple) else answer.sample
        tokens = _to_tokens(output, patch)
        if chosen is not None and self.policy.fill == "interpolate":
            latent_tokens = _to_tokens(latents[:, : output.shape[1]] if patch else latents, patch)
            level = self._noise_level(given["timestep"]).to(tokens)
            self._lift(state, tokens, latent_tokens, level, chosen, positions)
        self._note(state, tokens, chosen)
        self._calls += 1
        if self._calls == self._calls_per_step * self.policy.num_inference_steps:
            self.reset()
        if chosen is None:
            return answer
        assert state.velocity is not None
        full = _from_tokens(state.velocity, output, patch)
        return (full, *answer[1:]) if isinstance(answer, tuple) else type(answer)(sample=full)

    def _patch(self, latents: Tensor) -> tuple[int, ...]:
        """The patch sizes of the latents' axes; none for latents that are tokens."""
        if latents.dim() == 3:
            return ()
        patch = self._config.patch_size
        sizes = tuple(patch) if isinstance(patch, (tuple, list)) else (patch, patch)
        return sizes[-(latents.dim() - 2) :]

    def _choose(self, state: _State, count: int, positions: Tensor) -> Tensor:
        """The step's tokens, ascending."""
        N, device = len(positions), positions.device
        if self.policy.ranking == "change":
            assert state.ranking is not None, "the policy begins with two steps of all tokens"
            return state.ranking[:count].sort().values
        if state.velocity is None:
            return torch.arange(count, device=device) * N // count
        chosen = torch.arange(N, device=device) if state.chosen is None else state.chosen
        if count == len(chosen):
            return chosen
        around = _nearest(positions, positions, _NUM_AROUND)[1]
        spread = state.velocity[:, around].float().var(dim=2, unbiased=False).sum(-1).mean(0)
        if count > len(chosen):
            spread[chosen] = torch.inf
        return spread.topk(count).indices.sort().values

    def _noise_level(self, timestep: Tensor) -> Tensor:
        """The factor of the noise in the latents, (B, 1, 1) or (1, 1, 1)."""
        if self._alphas is None:
            return timestep.reshape(-1, 1, 1) * (self._divisor / 1000)
        kept = self._alphas.to(timestep.device)[timestep.reshape(-1, 1, 1).long()]
        return (1 - kept).sqrt()

    def _lift(
        self,
        state: _State,
        tokens: Tensor,
        latents: Tensor,
        level: Tensor,
        chosen: Tensor,
        positions: Tensor,
    ) -> None:
        """Give the other tokens the output that leads to an interpolated clean picture.

        ``latents - level * output`` is the clean picture, up to a factor that all tokens share. It
        is interpolated, and not the output, which holds each token's own noise.
        """
        if chosen is not state.chosen:
            state.nearest = _nearest(positions, positions[chosen], _NUM_NEAREST)
        distance, nearest = state.nearest
        weights = 1 / distance.square().clamp_min(1e-12)
        weights = (weights / weights.sum(-1, keepdim=True)).to(tokens)[..., None]
        channels = min(latents.shape[-1], tokens.shape[-1])
        latents = latents[..., :channels]
        clean = (latents - level * tokens[..., :channels])[:, chosen]
        lifted = (latents - (clean[:, nearest] * weights).sum(2)) / level
        # other outputs, such as a variance, have no clean image
        others = (tokens[:, chosen, channels:][:, nearest] * weights).sum(2)
        state.velocity = torch.cat([lifted, others], dim=-1)

    def _note(self, state: _State, tokens: Tensor, chosen: Tensor | None) -> None:
        """Keep the velocities of all tokens, and rank the tokens anew where all were computed."""
        state.chosen = chosen
        if chosen is None:
            if state.before is not None:
                change = (tokens - state.before).float().square().sum(-1).mean(0)
                state.ranking = change.argsort(descending=True, stable=True)
            state.velocity, state.before = tokens.clone(), tokens.clone()
            return
        rows = tokens[:, chosen]
        assert state.velocity is not None
        indices = chosen.to(torch.int32).expand(len(rows), -1)
        ops.scatter_rows_(state.velocity, indices, rows.contiguous(), backend=self._backend)

    def _enter(
        self, block: Any, given: tuple[Any, ...], named: dict[str, Any], is_first: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Give a block the rows of the chosen tokens, and their rotary embedding."""
        if self._chosen is None:
            return None
        arguments = name_arguments(block, given, named)
        if is_first:
            rows = arguments["hidden_states"]
            if rows.shape[1] != self._num_tokens:
                raise UnsupportedInputError(
                    f"token cache: the first block must be given {self._num_tokens} tokens, got "
                    f"{rows.shape[1]}"
                )
            arguments["hidden_states"] = rows[:, self._chosen]
        for name, value in arguments.items():
            if "rotary" in name and value is not None:
                arguments[name] = self._gather_rotary(value)
        return (), arguments

    def _gather_rotary(self, value: Any) -> Any:
        """The rows of the chosen tokens, and of the text's in front of them; once a step."""
        if id(value) not in self._rotary:
            tables = value if isinstance(value, tuple) else (value,)
            gathered = tuple(self._gather_table(table) for table in tables)
            self._rotary[id(value)] = gathered if isinstance(value, tuple) else gathered[0]
        return self._rotary[id(value)]

    def _gather_table(self, table: Tensor) -> Tensor:
        # (L, E), or (1, L, 1, E)
        dim = 0 if table.dim() == 2 else 1
        return table.index_select(dim, self._rows(table.shape[dim]))

    def _rows(self, length: int) -> Tensor:
        """The rows of a sequence of text and image that the step computes."""
        assert self._chosen is not None
        num_text = length - self._num_tokens
        text = torch.arange(num_text, device=self._chosen.device)
        return torch.cat([text, num_text + self._chosen])

    def _leave(self, output: Any, place: int) -> Any:
        """Put the last block's rows in the places of their tokens; the others are zero."""
        if self._chosen is None:
            return None
        rows = output[place] if isinstance(output, tuple) else output
        full = rows.new_zeros(len(rows), self._num_tokens, rows.shape[-1])
        indices = self._chosen.to(torch.int32).expand(len(rows), -1)
        ops.scatter_rows_(full, indices, rows.contiguous(), backend=self._backend)
        if not isinstance(output, tuple):
            return full
        return (*output[:place], full, *output[place + 1 :])

    def _watch(self, attention: nn.Module, path: str) -> None:
        """Know which attention runs."""

        def begin(module: Any, given: Any) -> None:
            self._attention = path

        def end(module: Any, given: Any, output: Any) -> None:
            self._attention = ""

        self._hooks.append(attention.register_forward_pre_hook(begin))
        self._hooks.append(attention.register_forward_hook(end))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Tensor:
        """PyTorch's attention, over the last keys and values of the tokens that are not here."""
        path = self._attention
        if path and self.policy.keeps_keys:
            if named.get("attn_mask") is not None:
                raise UnsupportedInputError(
                    "token cache: keys of other steps must not be masked, got an attn_mask"
                )
            if self._chosen is None:
                self._state.keys[path] = key.clone(), value.clone()
            else:
                keys, values = self._state.keys[path]
                rows = self._rows(keys.shape[2])
                key, value = keys.index_copy_(2, rows, key), values.index_copy_(2, rows, value)
        return F.scaled_dot_product_attention(query, key, value, **named)


class _Attention(TorchFunctionMode):
    """Answers PyTorch's attention inside of a transformer's call."""

    def __init__(self, forward: SubsetForward) -> None:
        super().__init__()
        self._forward = forward

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            return self._forward.attend(*arguments, **(named or {}))
        return function(*arguments, **(named or {}))


def _name_arguments_of(
    kind: type, arguments: tuple[Any, ...], named: dict[str, Any]
) -> dict[str, Any]:
    """Name a call's arguments by a class's own ``forward``."""
    names = list(inspect.signature(kind.forward).parameters)[1:]  # type: ignore[attr-defined]
    return {**dict(zip(names, arguments, strict=False)), **named}


def _positions(latents: Tensor, patch: tuple[int, ...], given: Mapping[str, Any]) -> Tensor:
    """The places of the tokens, (N, axes) float32."""
    if not patch:
        ids = given["img_ids"]
        return (ids[0] if ids.dim() == 3 else ids).to(latents.device, torch.float32)
    axes = [
        torch.arange(size // step, device=latents.device, dtype=torch.float32)
        for size, step in zip(latents.shape[2:], patch, strict=True)
    ]
    return torch.cartesian_prod(*axes)


def _nearest(of: Tensor, among: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The distances and places of the nearest of ``among``, (N, count) each."""
    exact = "donot_use_mm_for_euclid_dist"
    # of equals the first, on every device
    found = torch.cdist(of, among, compute_mode=exact).sort(dim=1, stable=True)
    return found.values[:, :count], found.indices[:, :count]


def _to_tokens(output: Tensor, patch: tuple[int, ...]) -> Tensor:
    """(B, C, *sizes) as (B, N, C * patch); tokens as they are."""
    if not patch:
        return output
    B, C, axes = len(output), output.shape[1], len(patch)
    split = [B, C]
    for size, step in zip(output.shape[2:], patch, strict=True):
        split += [size // step, step]
    order = [0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2)]
    return output.reshape(split).permute(order).flatten(1 + axes).flatten(1, axes)


def _from_tokens(tokens: Tensor, like: Tensor, patch: tuple[int, ...]) -> Tensor:
    """The inverse of ``_to_tokens``."""
    if not patch:
        return tokens.clone()
    axes = len(patch)
    counts = [size // step for size, step in zip(like.shape[2:], patch, strict=True)]
    grid = tokens.reshape(len(tokens), *counts, like.shape[1], *patch)
    order = [0, 1 + axes]
    for axis in range(axes):
        order += [1 + axis, 2 + axes + axis]
    return grid.permute(order).reshape(like.shape)
