"""``PixArtTransformer2DModel``: translate its blocks' names to ours, and back."""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...blocks import CrossAttentionLayer, Lane, MlpLayer, SubLayer, WholeLayer
from ...cache import FeatureCache
from ...errors import UnsupportedInputError
from ...policies import Policy, Site
from .hooks import (
    SELF_ATTENTION_HOOKS,
    BlockHook,
    Contexts,
    ContextState,
    FeatureHook,
    GridHook,
    StatefulHook,
    TappedScoreHook,
    check_attention,
    expect_part,
    is_plain,
    main_site,
    mlp_of,
    modulation_of,
    register,
    register_score_hook,
)

_BASE_SCORES = ("attention_entropy", *SELF_ATTENTION_HOOKS, "none")
# a mask's -10000 is -9984 in bfloat16
_DISCARDED = -9000


class _TextState(ContextState):
    """Also the text of the run, and what the cross-attentions make of it.

    Attributes:
        key_lengths: (B,) int32, how many text tokens each sample has; None: all.
    """

    def reset(self) -> None:
        """Begin a new run."""
        super().reset()
        self._text: Tensor | None = None
        self._mask: Tensor | None = None
        self._counts = FeatureCache()
        self.key_lengths: Tensor | None = None

    def note_text(self, text: Tensor, mask: Tensor | None) -> None:
        """Forget what was made of another text; one that is written in place counts as the same.

        A new run always begins afresh.
        """
        is_new_run = self.runner.step.index == 0
        if is_new_run or text is not self._text:
            self._text, self.runner.known = text, frozenset()
        if is_new_run or mask is not self._mask:
            self._mask, self.key_lengths = mask, None
            if mask is not None:
                self._counts.store("key_lengths", _count_keys(mask))
                self.key_lengths = self._counts.load("key_lengths")

    def project_text(
        self, layer: int, block: Any, encoder_hidden_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Key and value of the layer, computed where they are first asked for."""
        attention = block.attn2
        key, value = (
            self.runner.once((layer, name), partial(project, encoder_hidden_states))
            for name, project in (("key", attention.to_k), ("value", attention.to_v))
        )
        heads = attention.heads
        return key.unflatten(-1, (heads, -1)), value.unflatten(-1, (heads, -1))


class _InputsHook(GridHook):
    """Also notes the text, before the model has made a bias of its mask."""

    def pre_forward(
        self, module: Any, hidden_states: Tensor, *arguments: Any, **named: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The text is (B, M, C), its mask (B, M), or (B, 1, M) as a bias."""
        signature = inspect.signature(type(module).forward)
        given = signature.bind(module, hidden_states, *arguments, **named).arguments
        text = given.get("encoder_hidden_states")
        if text is None:
            raise UnsupportedInputError(
                "apply_token_cache: encoder_hidden_states must be given, got None"
            )
        _text_state(self).note_text(text, given.get("encoder_attention_mask"))
        return super().pre_forward(module, hidden_states, *arguments, **named)


class _BlockHook(BlockHook):
    """Runs one block as the policy decides."""

    modules = ("attn", "cross", "mlp")

    def __init__(
        self, contexts: Contexts, layer: int, num_layers: int, takes_entropy: bool, backend: str
    ) -> None:
        super().__init__(contexts, layer, num_layers, backend)
        self._takes_entropy = takes_entropy

    def make_lane(self, sites: tuple[Site, ...], num_tokens: int) -> Lane:
        """Cross-attention changes its layer's scores before the MLP's tokens are selected."""
        module = sites[0].module
        return Lane(
            sites, num_tokens, self.state.grid,
            selects_late=self._takes_entropy and module == "mlp", is_whole=module == "attn",
            shares_scores=module == "mlp",
        )  # fmt: skip

    def make_sub_layers(
        self, block: Any, hidden_states: Tensor, **named: Any
    ) -> tuple[SubLayer, ...]:
        """Self-attention, cross-attention and MLP."""
        state = _text_state(self)
        runner = state.runner
        attention, cross, mlp = (main_site(self._layer, module) for module in self.modules)
        timestep = named["timestep"].reshape(len(hidden_states), 6, -1)
        modulation = block.scale_shift_table + timestep
        shift_attention, scale_attention, gate_attention, shift, scale, gate = modulation.unbind(1)
        scored = next(filter(runner.is_selected, (cross, mlp)), None)
        query, out = block.attn2.to_q, block.attn2.to_out[0]
        return (
            WholeLayer(
                attention,
                gate_attention,
                modulation_of(block.norm1, shift_attention, scale_attention),
                partial(block.attn1, attention_mask=named["attention_mask"]),
            ),
            CrossAttentionLayer(
                cross,
                runner,
                scored_site=scored if self._takes_entropy else None,
                query=query,
                out=out,
                is_fused=is_plain(query) and is_plain(out),
                project_text=partial(
                    state.project_text, self._layer, block, named["encoder_hidden_states"]
                ),
                key_lengths=state.key_lengths,
                softmax_scale=block.attn2.scale,
                backend=self._backend,
            ),
            MlpLayer(
                mlp, gate, modulation_of(block.norm2, shift, scale), mlp_of(block.ff), self._backend
            ),
        )


class _EntropyHook(TappedScoreHook):
    """Scores a token by the entropy of its row of the head-averaged cross-attention map."""

    projections = ("to_q", "to_k")

    def compute_scores(self, attention: Any, *projected: Tensor) -> Tensor:
        """(B, N), of query (B, N, H, E) and key (B, M, H, E)."""
        query, key = projected
        return ops.attention_entropy(
            query, key, key_lengths=_text_state(self).key_lengths, softmax_scale=attention.scale,
            backend=self._backend,
        )  # fmt: skip


def attach(transformer: Any, policy: Policy, backend: str) -> Contexts:
    """Hook every block of the transformer, and the sub-layers whose outputs are cached."""
    blocks = transformer.transformer_blocks
    for block in blocks:
        _check_block(block)
    base_score = policy.selector.base_score
    if base_score not in _BASE_SCORES:
        raise UnsupportedInputError(
            f"apply_token_cache: the selector's base_score must be one of "
            f"{', '.join(_BASE_SCORES)} on this model, got {base_score!r}"
        )
    contexts = Contexts(_TextState, (policy, backend))
    takes_entropy = base_score == "attention_entropy"
    register(transformer, _InputsHook(contexts, transformer.config.patch_size))
    for layer, block in enumerate(blocks):
        attention, cross, mlp = (main_site(layer, module) for module in _BlockHook.modules)
        register(block, _BlockHook(contexts, layer, len(blocks), takes_entropy, backend))
        register(block.ff, FeatureHook(contexts, mlp))
        scored = (cross, mlp)
        if takes_entropy:
            entropy_hook = _EntropyHook(contexts, cross, scored, backend)
            register_score_hook(block.attn2, contexts, entropy_hook)
        else:
            register(block.attn2, FeatureHook(contexts, cross))
        if base_score in SELF_ATTENTION_HOOKS:
            hook = SELF_ATTENTION_HOOKS[base_score](contexts, attention, scored, backend)
            register_score_hook(block.attn1, contexts, hook)
        else:
            register(block.attn1, FeatureHook(contexts, attention))
    return contexts


def _text_state(hook: StatefulHook) -> _TextState:
    state = hook.state
    assert isinstance(state, _TextState)
    return state


def _count_keys(mask: Tensor) -> Tensor:
    """How many text tokens each sample has, (B,) int32; one flag is read back to the host."""
    if mask.dim() == 2:
        keeps, discards = mask == 1, mask == 0
    else:
        keeps, discards = mask[:, 0] == 0, mask[:, 0] < _DISCARDED
    counts = keeps.sum(dim=-1, dtype=torch.int32)
    comes_first = torch.arange(mask.shape[-1], device=mask.device) < counts[:, None]
    is_prefix = torch.where(comes_first, keeps, discards).all() & (counts > 0).all()
    if not is_prefix:
        raise UnsupportedInputError(
            "apply_token_cache: encoder_attention_mask must keep the first tokens of each prompt, "
            "at least one, and discard the rest, got one that does not"
        )
    return counts


def _check_block(block: Any) -> None:
    """Refuse what a partial step would get wrong."""
    norm_type = block.norm_type
    expect_part("norm_type 'ada_norm_single'", repr(norm_type), norm_type == "ada_norm_single")
    expect_part("cross-attention", "none", block.attn2 is not None)
    expect_part("self-attention before it", "only_cross_attention", not block.only_cross_attention)
    expect_part("no gated attention", "fuser", not hasattr(block, "fuser"))
    expect_part("no positional embedding of its own", "pos_embed", block.pos_embed is None)
    for attention in (block.attn1, block.attn2):
        check_attention(attention)
