"""What the adapters of all models share: states by cache context, and taps on sub-layers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager
from torch import Tensor, nn

from ... import ops
from ...blocks import Lane, Mlp, Modulation, ResidualStream, Runner, SubLayer, run_sub_layer
from ...errors import UnsupportedInputError
from ...policies import Policy, Site, Step

HOOK_NAME = "tokencache_kernels"
_ACTIVATIONS = {"none": "gelu", "tanh": "gelu_tanh"}
_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")
_UNKNOWN_PARTS = (
    "norm_q", "norm_k", "norm_cross", "group_norm", "spatial_norm", "added_kv_proj_dim",
    "residual_connection",
)  # fmt: skip


class ContextState(BaseState):  # type: ignore[misc]
    """What one cache context holds: its run, and what the step under way has left so far.

    Attributes:
        runner: decides and remembers.
        grid: (H, W), the tokens of the image under way, or None.
        streams: the residual streams of the step under way, by name.
        is_own_code: whether a block's own code is running, for which modules are tapped.
        taps: what one module lends to another within a layer, by name.
    """

    def __init__(self, policy: Policy, backend: str) -> None:
        self._arguments = (policy, backend)
        self.reset()

    def reset(self) -> None:
        """Begin a new run."""
        self.runner = Runner(*self._arguments)
        self.grid: tuple[int, int] | None = None
        self.streams: dict[str, ResidualStream] = {}
        self.taps: dict[str, Tensor] = {}
        self.is_own_code = False

    @contextmanager
    def own_code(self) -> Iterator[None]:
        """A block runs its own code inside: all its sites are full, and its modules are tapped."""
        self.is_own_code = True
        try:
            yield
        finally:
            self.is_own_code = False

    def stream(self, name: str, hidden_states: Tensor) -> ResidualStream:
        """The stream under way, which ``hidden_states`` go on with, or a new one."""
        if name in self.streams:
            self.streams[name].follow(hidden_states)
        else:
            self.streams[name] = ResidualStream(hidden_states, self._arguments[1])
        return self.streams[name]

    def leave_stream(self, name: str, hidden_states: Tensor) -> Tensor:
        """End the stream under way, if there is one, and return the hidden states."""
        if name not in self.streams:
            return hidden_states
        hidden_states = self.stream(name, hidden_states).flush()
        del self.streams[name]
        return hidden_states


class Contexts(StateManager):  # type: ignore[misc]
    """States by cache context; a call outside any context belongs to one called ``default``."""

    @property
    def context(self) -> CacheContext:
        """The context of the call under way."""
        return self._context or CacheContext("default")


class StatefulHook(ModelHook):  # type: ignore[misc]
    """A hook that works on the state of the cache context under way."""

    _is_stateful = True

    def __init__(self, contexts: Contexts) -> None:
        super().__init__()
        self._contexts = contexts

    @property
    def state(self) -> ContextState:
        """The state of the cache context under way."""
        state: ContextState = self._contexts.get_state()
        return state

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Forget every context."""
        self._contexts.reset()
        return module


class BlockHook(StatefulHook):
    """Runs one block of a model with one stream as the policy decides.

    An adapter names the modules whose outputs are cached, in the order in which they run, and
    composes a block of them.
    """

    modules: tuple[str, ...]

    def __init__(self, contexts: Contexts, layer: int, num_layers: int, backend: str) -> None:
        super().__init__(contexts)
        self._layer = layer
        self._num_layers = num_layers
        self._backend = backend

    def make_lane(self, sites: tuple[Site, ...], num_tokens: int) -> Lane:
        """The lane of one of the modules, given its sites."""
        raise NotImplementedError

    def make_sub_layers(
        self, block: Any, hidden_states: Tensor, **named: Any
    ) -> tuple[SubLayer, ...]:
        """The block's modules in this step, from what the block was called with."""
        raise NotImplementedError

    def predict_scores(self, block: Any, hidden_states: Tensor, step: Step, **named: Any) -> Tensor:
        """What the policy's predictor says of all blocks, (L, B, N), asked at the first one."""
        raise NotImplementedError

    def new_forward(
        self, block: Any, hidden_states: Tensor, *arguments: Any, **named: Any
    ) -> Tensor:
        """Full blocks run their own code; others are composed of sub-layers."""
        state = self.state
        runner = state.runner
        if self._layer == 0:
            state.streams.clear()
            predict = partial(self.predict_scores, block, hidden_states, **named)
            self._begin_step(runner, hidden_states, predict)
        is_last = self._layer == self._num_layers - 1
        if runner.skips_blocks:
            if is_last:
                hidden_states = runner.load_output(like=hidden_states)
                runner.end_step()
            return hidden_states
        if runner.is_full([main_site(self._layer, module) for module in self.modules]):
            hidden_states = state.leave_stream("main", hidden_states)
            with state.own_code():
                hidden_states = self.fn_ref.original_forward(hidden_states, *arguments, **named)
        else:
            stream = state.stream("main", hidden_states)
            for sub_layer in self.make_sub_layers(block, hidden_states, **named):
                run_sub_layer(stream, runner, sub_layer)
            hidden_states = stream.hidden_states
        if is_last:
            hidden_states = state.leave_stream("main", hidden_states)
            runner.remember_output(hidden_states)
            runner.end_step()
        return hidden_states

    def _begin_step(
        self, runner: Runner, hidden_states: Tensor, predict_scores: Callable[[Step], Tensor]
    ) -> None:
        B, N, _ = hidden_states.shape
        layers = range(self._num_layers)
        lanes = [
            self.make_lane(tuple(main_site(layer, module) for layer in layers), N)
            for module in self.modules
        ]
        runner.begin_step(lanes, B, hidden_states.device, predict_scores)


class GridHook(StatefulHook):
    """Notes how the tokens of the image lie, from the latents that the transformer is given."""

    def __init__(self, contexts: Contexts, patch_size: int) -> None:
        super().__init__(contexts)
        self._patch_size = patch_size

    def pre_forward(
        self, module: nn.Module, hidden_states: Tensor, *arguments: Any, **named: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The latents are (B, C, H, W)."""
        height, width = hidden_states.shape[-2:]
        self.state.grid = (height // self._patch_size, width // self._patch_size)
        return (hidden_states, *arguments), named


class FeatureHook(StatefulHook):
    """Copies the output of a sub-layer into the cache where a later step will reuse it."""

    def __init__(self, contexts: Contexts, site: Site) -> None:
        super().__init__(contexts)
        self._site = site

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        """Keep what the block's own code computed."""
        if self.state.is_own_code:
            self.state.runner.remember(self._site, output)
        return output


class KeyHook(StatefulHook):
    """Copies the keys or values of a self-attention into the cache where fresh queries see them."""

    def __init__(self, contexts: Contexts, site: Site, key_site: Site) -> None:
        super().__init__(contexts)
        self._site = site
        self._key_site = key_site

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        """Keep what the block's own code computed."""
        runner = self.state.runner
        if self.state.is_own_code and runner.keeps_keys(self._site):
            runner.features.store(self._key_site, output)
        return output


class TapHook(StatefulHook):
    """Lends a module's output to a hook that runs later in the layer."""

    def __init__(self, contexts: Contexts, name: str) -> None:
        super().__init__(contexts)
        self._name = name

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        """Keep it until it is popped."""
        if self.state.is_own_code:
            self.state.taps[self._name] = output
        return output


class ScoreHook(FeatureHook):
    """Also scores the layer's tokens where a later step will select among them by that."""

    # whose outputs are tapped, for the hook to score by
    projections: tuple[str, ...] = ()

    def __init__(
        self, contexts: Contexts, site: Site, scored_sites: Sequence[Site], backend: str
    ) -> None:
        super().__init__(contexts, site)
        self._scored_sites = scored_sites
        self._backend = backend

    def find_scored(self) -> Site | None:
        """The site to store the scores for, now; the sites share them."""
        state = self.state
        if not (state.is_own_code and state.runner.is_remembered(self._site)):
            return None
        return next(filter(state.runner.is_selected, self._scored_sites), None)


class ReceivedHook(ScoreHook):
    """Scores a token by the attention that it receives.

    That takes the log-sum-exp of the attention, which the model's own processor keeps to itself: in
    the steps that score, the model's projections run around ``ops.attention``.
    """

    def new_forward(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **named: Any,
    ) -> Tensor:
        """The model's own attention, or ours where it is scored."""
        scored = self.find_scored()
        output: Tensor
        if scored is None:
            output = self.fn_ref.original_forward(
                hidden_states, encoder_hidden_states, attention_mask, **named
            )
            return output
        if attention_mask is not None:
            raise UnsupportedInputError(
                "apply_token_cache: attention_mask must be None where tokens are scored by the "
                "attention that they receive, got a mask"
            )
        # the processor may be another one than when the policy was applied
        check_attention(attention)
        query, key, value = (
            project(hidden_states).unflatten(-1, (attention.heads, -1))
            for project in (attention.to_q, attention.to_k, attention.to_v)
        )
        scale, backend = attention.scale, self._backend
        out, lse = ops.attention(query, key, value, softmax_scale=scale, backend=backend)
        received = ops.attention_received(query, key, lse=lse, softmax_scale=scale, backend=backend)
        self.state.runner.store_scores(scored, received.mean(dim=1))
        project, dropout = attention.to_out
        output = dropout(project(out.flatten(2)))
        return output


class TappedScoreHook(ScoreHook):
    """Scores tokens by outputs of the projections; the model runs its own attention."""

    def compute_scores(self, attention: Any, *projected: Tensor) -> Tensor:
        """(B, N), of the outputs of the projections, (B, N, H, E) each."""
        raise NotImplementedError

    def post_forward(self, attention: Any, output: Tensor) -> Tensor:
        """Keep the scores, and the output."""
        state = self.state
        if state.is_own_code:
            # the processor may be another one than when the policy was applied
            check_attention(attention)
            projected = [
                state.taps.pop(name).unflatten(-1, (attention.heads, -1))
                for name in self.projections
            ]
            scored = self.find_scored()
            if scored is not None:
                state.runner.store_scores(scored, self.compute_scores(attention, *projected))
        return super().post_forward(attention, output)


class ValueNormHook(TappedScoreHook):
    """Scores a token by how small its value in self-attention is."""

    projections = ("to_v",)

    def compute_scores(self, attention: Any, *projected: Tensor) -> Tensor:
        """``1 - mean_h |v[b, n, h]|``, up to the factor H what is summed over the heads."""
        (value,) = projected
        return 1 - ops.head_norms(value, backend=self._backend)


# by base score, what scores the tokens of a self-attention
SELF_ATTENTION_HOOKS = {"attention_received": ReceivedHook, "value_norm": ValueNormHook}


def main_site(layer: int, module: str) -> Site:
    """Where the output of a block's module is cached, in a model with one stream."""
    return Site("main", layer, module)


def register(module: nn.Module, hook: ModelHook, name: str = HOOK_NAME) -> None:
    """Put our hook into the module's registry."""
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)


def announce_hooks(transformer: nn.Module) -> None:
    """Let cache contexts reach hooks on parts of a transformer that has run in contexts before.

    diffusers lists the hooked parts when a context is first entered, and keeps the list.
    """
    HookRegistry.check_if_exists_or_initialize(transformer)._child_registries_cache = None


def register_score_hook(attention: Any, contexts: Contexts, hook: ScoreHook) -> None:
    """Put the hook on an attention, and taps on what it scores by."""
    register(attention, hook)
    for name in hook.projections:
        register(getattr(attention, name), TapHook(contexts, name))


def expect_part(wanted: str, got: object, is_fine: bool) -> None:
    """Refuse a block with a part that a partial step would get wrong."""
    if not is_fine:
        raise UnsupportedInputError(
            f"apply_token_cache: transformer blocks must have {wanted}, got {got}"
        )


def check_processor(attention: Any, known: tuple[str, ...]) -> None:
    """Refuse an attention processor that we do not know, by name."""
    processor = type(attention.processor).__name__
    expect_part(f"the attention processor {' or '.join(known)}", processor, processor in known)


def check_attention(attention: Any) -> None:
    """Refuse an attention with parts that fresh queries would not pass through."""
    check_processor(attention, _PROCESSORS)
    expect_part("unfused query, key and value", "to_qkv", not attention.fused_projections)
    for part in _UNKNOWN_PARTS:
        expect_part(f"no {part} in attention", part, not getattr(attention, part))


def mlp_of(feed_forward: Any) -> Mlp:
    """Take the fused path where the MLP is two plain linear layers around a GELU."""
    first, *_, last = feed_forward.net
    is_fused = type(first).__name__ == "GELU" and is_plain(first.proj) and is_plain(last)
    if not is_fused or feed_forward.training:
        return Mlp(feed_forward)
    return Mlp(feed_forward, first.proj, last, _ACTIVATIONS[first.approximate])


def is_plain(layer: nn.Module) -> bool:
    """Whether a call of the layer is a product with its weight and nothing else.

    LoRA and quantised layers are other classes; what moves weights around (offloading) wraps the
    call, as our own hooks do.
    """
    registry = getattr(layer, "_diffusers_hook", None)
    is_ours = (
        registry is not None
        and registry.hooks.keys() <= {HOOK_NAME}
        and not hasattr(layer, "_hf_hook")
    )
    is_wrapped = "forward" in vars(layer) and not is_ours
    return type(layer) is nn.Linear and not (
        is_wrapped or layer._forward_hooks or layer._forward_pre_hooks
    )


def modulation_of(norm: nn.LayerNorm, shift: Tensor, scale: Tensor) -> Modulation:
    """Fold the norm's own weights into shift and scale, both (B, D)."""
    if norm.weight is not None:
        # (w * y + b) * (1 + scale) + shift, with y the plain layer norm
        gain = 1 + scale
        shift = shift if norm.bias is None else norm.bias * gain + shift
        scale = norm.weight * gain - 1
    return Modulation(shift, scale, norm.eps)
