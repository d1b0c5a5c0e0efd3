"""``DiTTransformer2DModel``: translate its blocks' names to ours, and back."""

import math
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager
from torch import Tensor, nn

from ... import ops
from ...blocks import (
    DiTModulation,
    Mlp,
    ResidualStream,
    Runner,
    partial_dit_block,
    reuse_dit_block,
)
from ...blocks.dit import attention_site, mlp_site
from ...errors import UnsupportedInputError
from ...policies import Action, Policy, Site

HOOK_NAME = "tokencache_kernels"
_ACTIVATIONS = {"none": "gelu", "tanh": "gelu_tanh"}
_BASE_SCORES = ("attention_received", "none")
_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")


class _ContextState(BaseState):  # type: ignore[misc]
    """What one cache context holds: its run, and the residual stream of the step under way."""

    def __init__(self, policy: Policy, sites: list[Site], backend: str) -> None:
        self._arguments = (policy, sites, backend)
        self.reset()

    def reset(self) -> None:
        self.runner = Runner(*self._arguments)
        self.stream: ResidualStream | None = None
        self.projections: dict[str, Tensor] = {}


class _Contexts(StateManager):  # type: ignore[misc]
    """States by cache context; a call outside any context belongs to one called ``default``."""

    @property
    def context(self) -> CacheContext:
        return self._context or CacheContext("default")


class _BlockHook(ModelHook):  # type: ignore[misc]
    """Runs one block as the policy decides."""

    _is_stateful = True

    def __init__(self, contexts: _Contexts, layer: int, is_last: bool, backend: str) -> None:
        super().__init__()
        self._contexts = contexts
        self._layer = layer
        self._is_last = is_last
        self._backend = backend

    def new_forward(
        self, block: Any, hidden_states: Tensor, *arguments: Any, **named: Any
    ) -> Tensor:
        state = self._contexts.get_state()
        runner = state.runner
        if self._layer == 0:
            side = math.isqrt(hidden_states.shape[1])
            runner.begin_step(hidden_states, (side, side))
            state.stream = None
        if runner.action(self._layer) is Action.FULL:
            if state.stream is not None:
                hidden_states = state.stream.flush()
                state.stream = None
            hidden_states = self.fn_ref.original_forward(hidden_states, *arguments, **named)
            runner.finish_full(self._layer)
        else:
            if state.stream is None:
                state.stream = ResidualStream(hidden_states, self._backend)
            self._run_cached(block, runner, state.stream, **named)
            hidden_states = state.stream.hidden_states
        if self._is_last:
            if state.stream is not None:
                hidden_states = state.stream.flush()
                state.stream = None
            runner.end_step()
        return hidden_states

    def _run_cached(
        self,
        block: Any,
        runner: Runner,
        stream: ResidualStream,
        timestep: Tensor,
        class_labels: Tensor,
        **_: Any,
    ) -> None:
        modulation = _modulation(block, timestep, class_labels, stream.hidden_states)
        if runner.action(self._layer) is Action.REUSE:
            reuse_dit_block(stream, runner.features, self._layer, modulation)
            return
        indices, positions = runner.selection(self._layer)
        partial_dit_block(
            stream, runner.features, self._layer, modulation, _mlp(block.ff),
            block.norm3.eps, indices, positions, self._backend,
        )  # fmt: skip

    def reset_state(self, module: nn.Module) -> nn.Module:
        self._contexts.reset()
        return module


class _FeatureHook(ModelHook):  # type: ignore[misc]
    """Copies the output of a sub-layer into the cache where a later step will reuse it."""

    def __init__(self, contexts: _Contexts, site: Site) -> None:
        super().__init__()
        self._contexts = contexts
        self._site = site

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        runner = self._contexts.get_state().runner
        if runner.is_remembered(self._site.layer):
            runner.features.store(self._site, output)
        return output


class _ProjectionHook(ModelHook):  # type: ignore[misc]
    """Lends the attention's own query or key to ``_AttentionHook``."""

    def __init__(self, contexts: _Contexts, name: str) -> None:
        super().__init__()
        self._contexts = contexts
        self._name = name

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        self._contexts.get_state().projections[self._name] = output
        return output


class _AttentionHook(_FeatureHook):
    """Also takes the attention that each token receives; the model keeps its fused attention."""

    def __init__(self, contexts: _Contexts, site: Site, backend: str) -> None:
        super().__init__(contexts, site)
        self._backend = backend

    def post_forward(self, attention: Any, output: Tensor) -> Tensor:
        state = self._contexts.get_state()
        query, key = state.projections.pop("query"), state.projections.pop("key")
        if state.runner.is_remembered(self._site.layer):
            received = ops.attention_received(
                query.unflatten(-1, (attention.heads, -1)),
                key.unflatten(-1, (attention.heads, -1)),
                softmax_scale=attention.scale,
                backend=self._backend,
            )
            scores = received.float().mean(dim=1)
            state.runner.store_scores(self._site.layer, scores)
        return super().post_forward(attention, output)


def attach(transformer: Any, policy: Policy, backend: str) -> None:
    """Hook every block of the transformer, and the sub-layers whose outputs are cached."""
    blocks = transformer.transformer_blocks
    for block in blocks:
        _check_block(block)
    base_score = policy.selector.base_score
    if base_score not in _BASE_SCORES:
        raise UnsupportedInputError(
            f"apply_token_cache: the selector's base_score must be one of "
            f"{', '.join(_BASE_SCORES)} on a model without cross-attention, got {base_score!r}"
        )
    contexts = _Contexts(
        _ContextState, (policy, [mlp_site(layer) for layer in range(len(blocks))], backend)
    )
    for layer, block in enumerate(blocks):
        _register(block, _BlockHook(contexts, layer, layer == len(blocks) - 1, backend))
        _register(block.ff, _FeatureHook(contexts, mlp_site(layer)))
        if base_score == "attention_received":
            _register(block.attn1, _AttentionHook(contexts, attention_site(layer), backend))
            _register(block.attn1.to_q, _ProjectionHook(contexts, "query"))
            _register(block.attn1.to_k, _ProjectionHook(contexts, "key"))
        else:
            _register(block.attn1, _FeatureHook(contexts, attention_site(layer)))


def _register(module: nn.Module, hook: ModelHook) -> None:
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK_NAME)


def _check_block(block: Any) -> None:
    """Refuse what a partial step would get wrong."""
    processor = type(block.attn1.processor).__name__
    for wanted, got, is_fine in (
        ("norm_type 'ada_norm_zero'", repr(block.norm_type), block.norm_type == "ada_norm_zero"),
        ("no cross-attention", "attn2", block.attn2 is None),
        (f"an attention processor of {_PROCESSORS}", processor, processor in _PROCESSORS),
        ("unfused query, key and value", "to_qkv", not block.attn1.fused_projections),
        ("no QK-norm", "norm_q", block.attn1.norm_q is None),
        ("no positional embedding of its own", "pos_embed", block.pos_embed is None),
    ):
        if not is_fine:
            raise UnsupportedInputError(
                f"apply_token_cache: transformer blocks must have {wanted}, got {got}"
            )


def _modulation(
    block: Any, timestep: Tensor, class_labels: Tensor, hidden_states: Tensor
) -> DiTModulation:
    """The block's adaLN vectors, with the affine part of its second norm folded in."""
    norm = block.norm1
    embedding = norm.emb(timestep, class_labels, hidden_dtype=hidden_states.dtype)
    _, _, gate_attention, shift, scale, gate_mlp = norm.linear(norm.silu(embedding)).chunk(6, dim=1)
    if block.norm3.weight is not None:
        # (w * y + b) * (1 + scale) + shift, with y the plain layer norm
        gain = 1 + scale
        shift = shift if block.norm3.bias is None else block.norm3.bias * gain + shift
        scale = block.norm3.weight * gain - 1
    return DiTModulation(gate_attention, shift, scale, gate_mlp)


def _mlp(feed_forward: Any) -> Mlp:
    """Take the fused path where the MLP is two plain linear layers around a GELU."""
    first, *_, last = feed_forward.net
    layers = (getattr(first, "proj", None), last)
    is_plain = type(first).__name__ == "GELU" and all(
        type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks
        for layer in layers
    )
    if not is_plain or feed_forward.training:
        return Mlp(feed_forward)
    return Mlp(feed_forward, first.proj, last, _ACTIVATIONS[first.approximate])
