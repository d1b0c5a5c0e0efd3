"""``DiTTransformer2DModel``: translate its blocks' names to ours, and back."""

from typing import Any

from torch import Tensor

from ...blocks import (
    Lane,
    MlpLayer,
    Modulation,
    SelfAttention,
    SelfAttentionLayer,
    SubLayer,
    key_sites,
)
from ...errors import UnsupportedInputError
from ...policies import Policy, Predictor, Site, Step, TokenCacheConfig
from .hooks import (
    SELF_ATTENTION_HOOKS,
    BlockHook,
    Contexts,
    ContextState,
    FeatureHook,
    GridHook,
    KeyHook,
    check_attention,
    expect_part,
    is_plain,
    main_site,
    mlp_of,
    modulation_of,
    register,
    register_score_hook,
)
from .modulation import read_modulation
from .predict import read_conditioning


class _BlockHook(BlockHook):
    """Runs one block as the policy decides."""

    modules = ("attn", "mlp")

    def __init__(
        self,
        contexts: Contexts,
        layer: int,
        num_layers: int,
        predictor: Predictor | None,
        backend: str,
    ) -> None:
        super().__init__(contexts, layer, num_layers, backend)
        self._predictor = predictor

    def make_lane(self, sites: tuple[Site, ...], num_tokens: int) -> Lane:
        """Attention and MLP share their scores."""
        return Lane(sites, num_tokens, self.state.grid, shares_scores=sites[0].module == "mlp")

    def predict_scores(self, block: Any, hidden_states: Tensor, step: Step, **named: Any) -> Tensor:
        """Ask the policy's predictor; see ``BlockHook``."""
        assert self._predictor is not None, "attach refuses scores that nothing gives"
        conditioning = read_conditioning(
            block, hidden_states, named["timestep"], named["class_labels"]
        )
        # it may have been loaded before the model was moved
        predictor = self._predictor.to(hidden_states.device)
        scores: Tensor = predictor(hidden_states, conditioning, step.index)
        return scores

    def make_sub_layers(
        self, block: Any, hidden_states: Tensor, **named: Any
    ) -> tuple[SubLayer, ...]:
        """Self-attention and MLP."""
        norm = block.norm1
        vectors = read_modulation(norm)
        if vectors is None:
            embedding = norm.emb(
                named["timestep"], named["class_labels"], hidden_dtype=hidden_states.dtype
            )
            vectors = norm.linear(norm.silu(embedding)).chunk(6, dim=1)
        shift_attention, scale_attention, gate_attention, shift, scale, gate_mlp = vectors
        return (
            SelfAttentionLayer(
                main_site(self._layer, "attn"),
                gate_attention,
                Modulation(shift_attention, scale_attention, norm.norm.eps),
                block.attn1,
                _self_attention_of(block.attn1, self._backend),
                self.state.runner,
            ),
            MlpLayer(
                main_site(self._layer, "mlp"),
                gate_mlp,
                modulation_of(block.norm3, shift, scale),
                mlp_of(block.ff),
                self._backend,
            ),
        )


def attach(transformer: Any, policy: Policy, backend: str) -> Contexts:
    """Hook every block of the transformer, and the sub-layers whose outputs are cached."""
    blocks = transformer.transformer_blocks
    for block in blocks:
        _check_block(block)
    predictor = policy.predictor if isinstance(policy, TokenCacheConfig) else None
    base_score = policy.selector.base_score
    known = (*SELF_ATTENTION_HOOKS, "none") if predictor is None else ("predicted",)
    if base_score not in known:
        raise UnsupportedInputError(
            f"apply_token_cache: the selector's base_score must be one of {', '.join(known)} on a "
            f"model without cross-attention, got {base_score!r}"
        )
    contexts = Contexts(ContextState, (policy, backend))
    register(transformer, GridHook(contexts, transformer.config.patch_size))
    for layer, block in enumerate(blocks):
        attention, mlp = main_site(layer, "attn"), main_site(layer, "mlp")
        register(block, _BlockHook(contexts, layer, len(blocks), predictor, backend))
        register(block.ff, FeatureHook(contexts, mlp))
        if base_score in SELF_ATTENTION_HOOKS:
            hook = SELF_ATTENTION_HOOKS[base_score](contexts, attention, [attention, mlp], backend)
            register_score_hook(block.attn1, contexts, hook)
        else:
            register(block.attn1, FeatureHook(contexts, attention))
            key, value = key_sites(attention)
            register(block.attn1.to_k, KeyHook(contexts, attention, key))
            register(block.attn1.to_v, KeyHook(contexts, attention, value))
    return contexts


def _self_attention_of(attention: Any, backend: str) -> SelfAttention:
    qkv = (attention.to_q, attention.to_k, attention.to_v)
    out = attention.to_out[0]
    return SelfAttention(
        qkv,
        out,
        is_fused=all(map(is_plain, (*qkv, out))),
        num_heads=attention.heads,
        head_dim=attention.to_q.out_features // attention.heads,
        softmax_scale=attention.scale,
        backend=backend,
    )


def _check_block(block: Any) -> None:
    """Refuse what a partial step would get wrong."""
    expect_part(
        "norm_type 'ada_norm_zero'", repr(block.norm_type), block.norm_type == "ada_norm_zero"
    )
    expect_part("no cross-attention", "attn2", block.attn2 is None)
    expect_part("no positional embedding of its own", "pos_embed", block.pos_embed is None)
    check_attention(block.attn1)
