"""``FluxTransformer2DModel``: translate its blocks' names to ours, and back."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from ... import ops
from ...blocks import (
    JointAttention,
    Lane,
    MlpLayer,
    Modulation,
    ParallelLayer,
    ResidualStream,
    WholeLayer,
    bring_up_to_date,
    remember_joint_attention,
    run_sub_layer,
)
from ...errors import UnsupportedInputError
from ...policies import Action, Policy, Site
from .hooks import (
    Contexts,
    ContextState,
    FeatureHook,
    StatefulHook,
    check_processor,
    expect_part,
    is_plain,
    mlp_of,
    register,
)
from .modulation import read_modulation

_BASE_SCORES = ("attention_received", "none")
_PROCESSORS = ("FluxAttnProcessor",)
# where the model clips in float16
_FLOAT16_LIMIT = 65504

_Pair = tuple[Tensor, Tensor]


class _FluxState(ContextState):
    """Also the stream of the single blocks, of which the model only sees the two parts."""

    def reset(self) -> None:
        """Begin a new run."""
        super().reset()
        self._shown: tuple[Tensor, ...] = ()

    def joint_stream(self, text: Tensor, image: Tensor) -> ResidualStream:
        """The stream of both, which ``text`` and ``image`` go on with, or a new one."""
        if "joint" in self.streams and text is self._shown[0] and image is self._shown[1]:
            return self.streams["joint"]
        return self.stream("joint", torch.cat([text, image], dim=1))

    def show_joint_stream(self, text_tokens: int) -> _Pair:
        """Its text and image, without what is still pending."""
        joint = self.streams["joint"].hidden_states
        self._shown = text, image = joint[:, :text_tokens], joint[:, text_tokens:]
        return text, image

    def leave_joint_stream(self, text: Tensor, image: Tensor) -> _Pair:
        """End the stream of both, if there is one, and return its text and image."""
        if "joint" not in self.streams:
            return text, image
        joint = self.joint_stream(text, image).flush()
        self.streams.clear()
        self._shown = ()
        return joint[:, : text.shape[1]], joint[:, text.shape[1] :]


class _FluxHook(StatefulHook):
    """A hook that works on the state of FLUX."""

    def __init__(self, contexts: Contexts, backend: str) -> None:
        super().__init__(contexts)
        self._backend = backend

    @property
    def state(self) -> _FluxState:
        """The state of the cache context under way."""
        state: _FluxState = self._contexts.get_state()
        return state


class _DoubleBlockHook(_FluxHook):
    """Runs one block of two streams as the policy decides."""

    def __init__(
        self, contexts: Contexts, layer: int, depths: tuple[int, int], backend: str
    ) -> None:
        super().__init__(contexts, backend)
        self._layer = layer
        self._depths = depths

    def new_forward(
        self,
        block: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: _Pair,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> _Pair:
        """Full blocks run their own code; others are composed of sub-layers."""
        _check_call(joint_attention_kwargs)
        state, text, image = self.state, encoder_hidden_states, hidden_states
        if self._layer == 0:
            state.streams.clear()
            # the model would repeat one prompt for all pictures as it goes
            text = text.expand(len(image), -1, -1)
            lanes = _lanes(self._depths, text.shape[1], image.shape[1])
            state.runner.begin_step(lanes, image.shape[0], image.device)
        if state.runner.skips_blocks:
            return text, image
        if state.runner.is_full(double_sites(self._layer)):
            text, image = self._leave_streams(text, image)
            with state.own_code():
                text, image = self.fn_ref.original_forward(
                    image, text, temb, image_rotary_emb, joint_attention_kwargs
                )
        else:
            text, image = self._compose(block, text, image, temb, image_rotary_emb)
        if self._layer == self._depths[0] - 1:
            text, image = self._leave_streams(text, image)
        return text, image

    def _leave_streams(self, text: Tensor, image: Tensor) -> _Pair:
        return self.state.leave_stream("text", text), self.state.leave_stream("image", image)

    def _compose(
        self, block: Any, text: Tensor, image: Tensor, temb: Tensor, rotary: _Pair
    ) -> _Pair:
        runner = self.state.runner
        text_stream, image_stream = (
            self.state.stream("text", text),
            self.state.stream("image", image),
        )
        attention_site, mlp_site, text_mlp_site = double_sites(self._layer)
        image_norm, image_gate, mlp_norm, mlp_gate = _modulations(block.norm1, block.norm2, temb)
        text_norm, text_gate, text_mlp_norm, text_mlp_gate = _modulations(
            block.norm1_context, block.norm2_context, temb
        )
        attention = JointAttention(
            attention_site,
            (image_gate, text_gate),
            (image_norm, text_norm),
            lambda image, text: block.attn(
                hidden_states=image, encoder_hidden_states=text, image_rotary_emb=rotary
            ),
        )
        mlp = MlpLayer(mlp_site, mlp_gate, mlp_norm, mlp_of(block.ff), self._backend)
        text_mlp = MlpLayer(
            text_mlp_site, text_mlp_gate, text_mlp_norm, mlp_of(block.ff_context), self._backend
        )
        attention.run(image_stream, text_stream, runner)
        run_sub_layer(image_stream, runner, mlp)
        run_sub_layer(text_stream, runner, text_mlp)
        if text.dtype == torch.float16:
            text_stream.clip(_FLOAT16_LIMIT)
        return text_stream.hidden_states, image_stream.hidden_states


class _SingleBlockHook(_FluxHook):
    """Runs one block of a single stream as the policy decides."""

    def __init__(
        self, contexts: Contexts, layer: int, depths: tuple[int, int], backend: str
    ) -> None:
        super().__init__(contexts, backend)
        self._layer = layer
        self._is_last = layer == depths[1] - 1

    def new_forward(
        self,
        block: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: _Pair,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> _Pair:
        """Full blocks run their own code; others are composed of sub-layers."""
        _check_call(joint_attention_kwargs)
        state, text, image = self.state, encoder_hidden_states, hidden_states
        attention_site, mlp_site = single_sites(self._layer)
        if state.runner.skips_blocks:
            if self._is_last:
                image = state.runner.load_output(like=image)
                state.runner.end_step()
            return text, image
        if state.runner.is_full((attention_site, mlp_site)):
            text, image = state.leave_joint_stream(text, image)
            # not a hook of diffusers': LoRA that is loaded later puts itself around proj_out
            tap = block.proj_out.register_forward_hook(
                lambda module, inputs, output: state.runner.remember(mlp_site, output)
            )
            with tap, state.own_code():
                text, image = self.fn_ref.original_forward(
                    image, text, temb, image_rotary_emb, joint_attention_kwargs
                )
        else:
            stream = state.joint_stream(text, image)
            self._compose(block, stream, temb, image_rotary_emb)
            text, image = state.show_joint_stream(text.shape[1])
        if self._is_last:
            text, image = state.leave_joint_stream(text, image)
            # the final layer looks at nothing else
            state.runner.remember_output(image)
            state.runner.end_step()
        return text, image

    def _compose(self, block: Any, stream: ResidualStream, temb: Tensor, rotary: _Pair) -> None:
        runner = self.state.runner
        attention_site, mlp_site = single_sites(self._layer)
        shift, scale, gate = _vectors_of(block.norm, temb, 3)
        modulation = Modulation(shift, scale, block.norm.norm.eps)
        attention = WholeLayer(
            attention_site,
            None,
            modulation,
            lambda rows: block.attn(hidden_states=rows, image_rotary_emb=rotary),
        )

        def attend() -> Tensor:
            return bring_up_to_date(stream, runner, attention)

        if runner.action(mlp_site) is Action.REUSE and runner.is_remembered(attention_site):
            # for a later step: this one does not ask for it
            attend()
        layer = ParallelLayer(
            mlp_site,
            gate,
            modulation,
            attend,
            lambda rows, attended: block.proj_out(
                torch.cat([attended, block.act_mlp(block.proj_mlp(rows))], dim=-1)
            ),
            backend=self._backend,
        )
        if is_plain(block.proj_mlp) and is_plain(block.proj_out):
            layer = replace(layer, fc1=block.proj_mlp, fc2=block.proj_out, activation="gelu_tanh")
        run_sub_layer(stream, runner, layer)
        if stream.hidden_states.dtype == torch.float16:
            stream.clip(_FLOAT16_LIMIT)


class _AttentionHook(_FluxHook):
    """Keeps what attention gives, and the attention that each token receives."""

    def __init__(
        self, contexts: Contexts, site: Site, scored_sites: Sequence[Site], backend: str
    ) -> None:
        super().__init__(contexts, backend)
        self._site = site
        self._scored_sites = scored_sites

    def new_forward(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        image_rotary_emb: _Pair,
    ) -> Tensor | _Pair:
        """The model's own attention, or ours where a later step selects by its statistics."""
        state = self.state
        inputs = (hidden_states, encoder_hidden_states)
        output: Tensor | _Pair
        is_scored = any(state.runner.is_selected(site) for site in self._scored_sites)
        if is_scored and state.runner.is_remembered(self._site):
            output = self._attend_and_score(attention, *inputs, image_rotary_emb)
        else:
            output = self.fn_ref.original_forward(*inputs, image_rotary_emb=image_rotary_emb)
        if state.is_own_code:
            if isinstance(output, Tensor):
                state.runner.remember(self._site, output)
            else:
                remember_joint_attention(state.runner, self._site, *output)
        return output

    def _attend_and_score(
        self, attention: Any, image: Tensor, text: Tensor | None, rotary: _Pair
    ) -> Tensor | _Pair:
        """What ``FluxAttnProcessor`` does, but with the log-sum-exp, which the statistics need."""
        # the processor may be another one than when the policy was applied
        _check_attention(attention)
        query, key, value = _query_key_value(attention, image, text, rotary)
        out, lse = ops.attention(query, key, value, backend=self._backend)
        received = ops.attention_received(query, key, lse=lse, backend=self._backend)
        lengths = [rows.shape[1] for rows in (text, image) if rows is not None]
        scores = received.float().mean(dim=1).split(lengths, dim=1)
        for site, of_site in zip(self._scored_sites, scores, strict=True):
            self.state.runner.store_scores(site, of_site)
        out = out.flatten(2)
        if text is None:
            return out
        text_out, image_out = out.split(lengths, dim=1)
        project, dropout = attention.to_out
        return dropout(project(image_out.contiguous())), attention.to_add_out(text_out.contiguous())


def attach(transformer: Any, policy: Policy, backend: str) -> Contexts:
    """Hook every block of the transformer, and the sub-layers whose outputs are cached."""
    doubles, singles = transformer.transformer_blocks, transformer.single_transformer_blocks
    _check_blocks(doubles, singles)
    base_score = policy.selector.base_score
    if base_score not in _BASE_SCORES:
        raise UnsupportedInputError(
            f"apply_token_cache: the selector's base_score must be one of "
            f"{', '.join(_BASE_SCORES)} on a model without cross-attention, got {base_score!r}"
        )
    is_scored = base_score == "attention_received"
    contexts = Contexts(_FluxState, (policy, backend))
    depths = len(doubles), len(singles)
    for layer, block in enumerate(doubles):
        attention, mlp, text_mlp = double_sites(layer)
        # as the tokens of the attention: text first
        hook = _AttentionHook(contexts, attention, [text_mlp, mlp] if is_scored else [], backend)
        register(block, _DoubleBlockHook(contexts, layer, depths, backend))
        register(block.attn, hook)
        register(block.ff, FeatureHook(contexts, mlp))
        register(block.ff_context, FeatureHook(contexts, text_mlp))
    for layer, block in enumerate(singles):
        attention, mlp = single_sites(layer)
        hook = _AttentionHook(contexts, attention, [mlp] if is_scored else [], backend)
        register(block, _SingleBlockHook(contexts, layer, depths, backend))
        register(block.attn, hook)
    return contexts


def double_sites(layer: int) -> tuple[Site, Site, Site]:
    """Where a double block caches: attention of image and text, and the MLP of each."""
    attention, mlp, text_mlp = (
        Site("double", layer, module) for module in ("attn", "mlp", "text_mlp")
    )
    return attention, mlp, text_mlp


def single_sites(layer: int) -> tuple[Site, Site]:
    """Where a single block caches: its attention, and what it makes of that and of the MLP."""
    return Site("single", layer, "attn"), Site("single", layer, "mlp")


def _lanes(depths: tuple[int, int], text_tokens: int, image_tokens: int) -> tuple[Lane, ...]:
    """The packed latents do not say how the tokens of the image lie: no lane has a grid."""
    doubles = zip(*(double_sites(layer) for layer in range(depths[0])), strict=True)
    singles = zip(*(single_sites(layer) for layer in range(depths[1])), strict=True)
    joint_tokens = text_tokens + image_tokens
    lengths = (joint_tokens, image_tokens, text_tokens, joint_tokens, joint_tokens)
    return tuple(
        Lane(
            sites,
            num_tokens,
            is_whole=sites[0].module == "attn",
            read_by="mlp" if sites[0] == single_sites(0)[0] else None,
        )
        for sites, num_tokens in zip((*doubles, *singles), lengths, strict=True)
    )


def _modulations(norm: Any, norm_mlp: Any, temb: Tensor) -> tuple[Any, ...]:
    """Modulation and gate of the attention, then those of the MLP."""
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = _vectors_of(norm, temb, 6)
    return (
        Modulation(shift, scale, norm.norm.eps),
        gate,
        Modulation(shift_mlp, scale_mlp, norm_mlp.eps),
        gate_mlp,
    )


def _vectors_of(norm: Any, temb: Tensor, count: int) -> tuple[Tensor, ...]:
    """What a norm makes of the embedding, (B, D) each."""
    return read_modulation(norm) or norm.linear(norm.silu(temb)).chunk(count, dim=1)


def _query_key_value(
    attention: Any, hidden_states: Tensor, text: Tensor | None, rotary: _Pair
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, H, E) each, normalised and rotated; the text's tokens come first."""

    def heads(rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (-1, attention.head_dim))

    query = attention.norm_q(heads(attention.to_q(hidden_states)))
    key = attention.norm_k(heads(attention.to_k(hidden_states)))
    value = heads(attention.to_v(hidden_states))
    if text is not None:
        text_query = attention.norm_added_q(heads(attention.add_q_proj(text)))
        text_key = attention.norm_added_k(heads(attention.add_k_proj(text)))
        query = torch.cat([text_query, query], dim=1)
        key = torch.cat([text_key, key], dim=1)
        value = torch.cat([heads(attention.add_v_proj(text)), value], dim=1)
    query, key = (apply_rotary_emb(rows, rotary, sequence_dim=1) for rows in (query, key))
    return query, key, value


def _check_call(joint_attention_kwargs: dict[str, Any] | None) -> None:
    """Refuse what changes the attention from outside; the scale of LoRA has been taken out."""
    if joint_attention_kwargs:
        raise UnsupportedInputError(
            "FluxTransformer2DModel: joint_attention_kwargs must hold no more than LoRA's scale "
            f"under a token cache, got {', '.join(joint_attention_kwargs)}"
        )


def _check_blocks(doubles: Sequence[Any], singles: Sequence[Any]) -> None:
    """Refuse a model that cannot be begun and ended, or whose attention is not known."""
    counts = f"{len(doubles)} double, {len(singles)} single"
    expect_part("both kinds of blocks", counts, bool(doubles and singles))
    for block in (*doubles, *singles):
        _check_attention(block.attn)


def _check_attention(attention: Any) -> None:
    """Refuse what our own attention, or a partial step, would get wrong."""
    check_processor(attention, _PROCESSORS)
    expect_part("unfused query, key and value", "to_qkv", not attention.fused_projections)
    is_sharded = attention.processor._parallel_config is not None
    expect_part("all tokens on one device", "context parallelism", not is_sharded)
