"""``DiTTransformer2DModel``: translate its blocks' names to ours, and back."""

from typing import Any

from torch import Tensor

from ...blocks import Lane, MlpLayer, Modulation, SubLayer, WholeLayer
from ...errors import UnsupportedInputError
from ...policies import Policy, Site
from .hooks import (
    BlockHook,
    Contexts,
    ContextState,
    FeatureHook,
    GridHook,
    ScoreHook,
    expect_part,
    main_site,
    mlp_of,
    modulation_of,
    register,
    register_score_hook,
)

_BASE_SCORES = ("attention_received", "none")
_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")


class _BlockHook(BlockHook):
    """Runs one block as the policy decides."""

    modules = ("attn", "mlp")

    def make_lane(self, sites: tuple[Site, ...], num_tokens: int) -> Lane:
        """Tokens are selected for the MLP alone."""
        return Lane(sites, num_tokens, self.state.grid, is_whole=sites[0].module == "attn")

    def make_sub_layers(
        self, block: Any, hidden_states: Tensor, **named: Any
    ) -> tuple[SubLayer, ...]:
        """Self-attention and MLP."""
        norm = block.norm1
        embedding = norm.emb(
            named["timestep"], named["class_labels"], hidden_dtype=hidden_states.dtype
        )
        shift_attention, scale_attention, gate_attention, shift, scale, gate_mlp = norm.linear(
            norm.silu(embedding)
        ).chunk(6, dim=1)
        return (
            WholeLayer(
                main_site(self._layer, "attn"),
                gate_attention,
                Modulation(shift_attention, scale_attention, norm.norm.eps),
                block.attn1,
            ),
            MlpLayer(
                main_site(self._layer, "mlp"),
                gate_mlp,
                modulation_of(block.norm3, shift, scale),
                mlp_of(block.ff),
                self._backend,
            ),
        )


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
        attention, mlp = main_site(layer, "attn"), main_site(layer, "mlp")
        register(block, _BlockHook(contexts, layer, len(blocks), backend))
        register(block.ff, FeatureHook(contexts, mlp))
        if base_score == "attention_received":
            hook = ScoreHook(contexts, attention, [mlp], backend)
            register_score_hook(block.attn1, contexts, hook)
        else:
            register(block.attn1, FeatureHook(contexts, attention))


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
