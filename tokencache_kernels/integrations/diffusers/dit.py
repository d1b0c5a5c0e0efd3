"""``DiTTransformer2DModel``: translate its blocks' names to ours, and back."""

from typing import Any

from torch import Tensor

from ... import ops
from ...blocks import Lane, MlpLayer, Modulation, SubLayer, WholeLayer, run_sub_layer
from ...errors import UnsupportedInputError
from ...policies import Policy, Site
from .hooks import (
    Contexts,
    ContextState,
    FeatureHook,
    GridHook,
    StatefulHook,
    TapHook,
    expect_part,
    mlp_of,
    register,
)

_BASE_SCORES = ("attention_received", "none")
_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")


class _BlockHook(StatefulHook):
    """Runs one block as the policy decides."""

    def __init__(self, contexts: Contexts, layer: int, num_layers: int, backend: str) -> None:
        super().__init__(contexts)
        self._layer = layer
        self._num_layers = num_layers
        self._backend = backend

    def new_forward(
        self, block: Any, hidden_states: Tensor, *arguments: Any, **named: Any
    ) -> Tensor:
        """Full blocks run their own code; others are composed of sub-layers."""
        state = self.state
        runner = state.runner
        if self._layer == 0:
            state.streams.clear()
            B, N, _ = hidden_states.shape
            runner.begin_step(_lanes(self._num_layers, N, state.grid), B, hidden_states.device)
        if runner.is_full((attention_site(self._layer), mlp_site(self._layer))):
            hidden_states = state.leave_stream("main", hidden_states)
            with state.own_code():
                hidden_states = self.fn_ref.original_forward(hidden_states, *arguments, **named)
        else:
            stream = state.stream("main", hidden_states)
            for sub_layer in self._sub_layers(block, hidden_states, **named):
                run_sub_layer(stream, runner, sub_layer)
            hidden_states = stream.hidden_states
        if self._layer == self._num_layers - 1:
            hidden_states = state.leave_stream("main", hidden_states)
            runner.end_step()
        return hidden_states

    def _sub_layers(
        self, block: Any, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, **_: Any
    ) -> tuple[SubLayer, ...]:
        norm = block.norm1
        embedding = norm.emb(timestep, class_labels, hidden_dtype=hidden_states.dtype)
        shift_attention, scale_attention, gate_attention, shift, scale, gate_mlp = norm.linear(
            norm.silu(embedding)
        ).chunk(6, dim=1)
        if block.norm3.weight is not None:
            # (w * y + b) * (1 + scale) + shift, with y the plain layer norm
            gain = 1 + scale
            shift = shift if block.norm3.bias is None else block.norm3.bias * gain + shift
            scale = block.norm3.weight * gain - 1
        return (
            WholeLayer(
                attention_site(self._layer),
                gate_attention,
                Modulation(shift_attention, scale_attention, norm.norm.eps),
                block.attn1,
            ),
            MlpLayer(
                mlp_site(self._layer),
                gate_mlp,
                Modulation(shift, scale, block.norm3.eps),
                mlp_of(block.ff),
                self._backend,
            ),
        )


class _AttentionHook(FeatureHook):
    """Also takes the attention that each token receives; the model keeps its fused attention."""

    def __init__(self, contexts: Contexts, layer: int, backend: str) -> None:
        super().__init__(contexts, attention_site(layer))
        self._layer = layer
        self._backend = backend

    def post_forward(self, attention: Any, output: Tensor) -> Tensor:
        """Score the layer's tokens where a later step will select among them."""
        state = self.state
        if state.is_own_code:
            query, key = state.taps.pop("query"), state.taps.pop("key")
            if state.runner.is_remembered(mlp_site(self._layer)):
                received = ops.attention_received(
                    query.unflatten(-1, (attention.heads, -1)),
                    key.unflatten(-1, (attention.heads, -1)),
                    softmax_scale=attention.scale,
                    backend=self._backend,
                )
                state.runner.store_scores(mlp_site(self._layer), received.float().mean(dim=1))
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
    contexts = Contexts(ContextState, (policy, backend))
    register(transformer, GridHook(contexts, transformer.config.patch_size))
    for layer, block in enumerate(blocks):
        register(block, _BlockHook(contexts, layer, len(blocks), backend))
        register(block.ff, FeatureHook(contexts, mlp_site(layer)))
        if base_score == "attention_received":
            register(block.attn1, _AttentionHook(contexts, layer, backend))
            register(block.attn1.to_q, TapHook(contexts, "query"))
            register(block.attn1.to_k, TapHook(contexts, "key"))
        else:
            register(block.attn1, FeatureHook(contexts, attention_site(layer)))


def attention_site(layer: int) -> Site:
    """Where the block's attention output is cached."""
    return Site("main", layer, "attn")


def mlp_site(layer: int) -> Site:
    """Where the block's MLP output is cached."""
    return Site("main", layer, "mlp")


def _lanes(num_layers: int, num_tokens: int, grid: tuple[int, int] | None) -> tuple[Lane, ...]:
    return tuple(
        Lane(tuple(site(layer) for layer in range(num_layers)), num_tokens, grid, is_whole=is_whole)
        for site, is_whole in ((attention_site, True), (mlp_site, False))
    )


def _check_block(block: Any) -> None:
    """Refuse what a partial step would get wrong."""
    attention = block.attn1
    processor = type(attention.processor).__name__
    expect_part(
        "norm_type 'ada_norm_zero'", repr(block.norm_type), block.norm_type == "ada_norm_zero"
    )
    expect_part("no cross-attention", "attn2", block.attn2 is None)
    expect_part(f"an attention processor of {_PROCESSORS}", processor, processor in _PROCESSORS)
    expect_part("unfused query, key and value", "to_qkv", not attention.fused_projections)
    expect_part("no QK-norm", "norm_q", attention.norm_q is None)
    expect_part("no positional embedding of its own", "pos_embed", block.pos_embed is None)
