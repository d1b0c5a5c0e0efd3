"""Whole models under ToCa as its published code runs them, written from its description.

Full steps hold the attention map of every head, from which the scores come; a partial step
surrounds each MLP with some thirty small kernels. The waste of that code is left out: waiting for
the device in each selection, a cache of hidden channels that nothing reads. Steps are decided as
ours are, so that both do the same work.
"""

from functools import partial

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb

from tokencache_kernels.policies import Action, Site, Step

from . import published


def apply_published(transformer, policy):
    """Make a diffusers transformer run as published; its steps are counted from the next call."""
    run = _Run(policy)
    name = type(transformer).__name__
    blocks, singles = transformer.transformer_blocks, []
    if name == "FluxTransformer2DModel":
        singles = transformer.single_transformer_blocks
        for layer, block in enumerate(singles):
            block.forward = partial(_run_single_block, run, block, layer)
    run_block = {
        "DiTTransformer2DModel": _run_dit_block,
        "PixArtTransformer2DModel": _run_pixart_block,
        "FluxTransformer2DModel": _run_double_block,
    }[name]
    for layer, block in enumerate(blocks):
        block.forward = partial(run_block, run, block, layer)
    (*_, last) = (*blocks, *singles)
    last.register_forward_hook(lambda *_: run.end_step())


class _Run:
    """The state of a run: decisions, features, attention maps or their means, waiting times."""

    def __init__(self, policy):
        self.policy = policy
        self.index = 0
        self.features, self.maps, self.staleness = {}, {}, {}
        self._decisions = {}

    def end_step(self):
        self.index = (self.index + 1) % self.policy.num_inference_steps

    def decide(self, site, x):
        """The policy's decision; asked once, so that it costs the run nothing."""
        key = (site, self.index)
        if key not in self._decisions:
            step = Step(self.index, self.policy.num_inference_steps)
            self._decisions[key] = self.policy.decide(site, step, x.shape[1])
        return self._decisions[key]

    def is_full(self, site, x):
        return self.decide(site, x).action is Action.FULL

    def keep(self, site, output):
        """A full step's output, before its gate."""
        B, N, _ = output.shape
        self.features[site] = output
        self.staleness[site] = torch.zeros(B, N, dtype=torch.int32, device=output.device)
        return output

    def choose(self, site, x, scores):
        """The fresh tokens (B, S), best first, given the scores (B, N) or (1, N)."""
        selector, staleness = self.policy.selector, self.staleness[site]
        combined = F.normalize(scores, dim=-1) + selector.staleness_weight * staleness
        if selector.bonus:
            side = int(x.shape[1] ** 0.5)
            combined = _add_bonus(combined, side, selector.tile, selector.bonus)
        order = combined.argsort(dim=-1, descending=True)
        fresh = order[:, : self.decide(site, x).num_fresh]
        staleness.add_(1).scatter_(-1, fresh, 0)
        return fresh

    def recompute(self, site, x, scores, compute):
        """The output with the fresh tokens' rows written anew: ``compute`` of their inputs."""
        fresh = self.choose(site, x, scores)
        rows = compute(published.gather_rows(x, fresh), fresh)
        return published.scatter_rows_(self.features[site], fresh, rows)


def _add_bonus(scores, side, tile, bonus):
    B = len(scores)
    tiles = scores.view(B, side // tile, tile, side // tile, tile).transpose(2, 3).flatten(3)
    best = tiles.argmax(dim=-1, keepdim=True)
    gain = torch.ones_like(tiles).scatter_(-1, best, 1 + bonus)
    tiles = (tiles * gain).unflatten(-1, (tile, tile)).transpose(2, 3)
    return tiles.reshape(B, side * side)


def _modulate(norm, x, shift, scale):
    return norm(x) * (1 + scale[:, None]) + shift[:, None]


def _attend(query, key, value, mask=None):
    """(B, N, H, E) each to the rows (B, N, H * E) and the map (B, H, N, M)."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    weights = (logits if mask is None else logits + mask).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).flatten(2), weights


def _project(attention, x, text=None):
    text = x if text is None else text
    query, key, value = attention.to_q(x), attention.to_k(text), attention.to_v(text)
    return (rows.unflatten(-1, (attention.heads, -1)) for rows in (query, key, value))


# DiT


def _run_dit_block(run, block, layer, x, timestep, class_labels, **_):
    attention, mlp = (Site("main", layer, module) for module in ("attn", "mlp"))
    embedding = block.norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)
    vectors = block.norm1.linear(block.norm1.silu(embedding))
    shift1, scale1, gate1, shift2, scale2, gate2 = vectors.chunk(6, dim=1)

    def feed_forward(rows, fresh=None):
        return block.ff(_modulate(block.norm3, rows, shift2, scale2))

    if run.is_full(mlp, x):
        rows = _modulate(block.norm1.norm, x, shift1, scale1)
        out, weights = _attend(*_project(block.attn1, rows))
        run.maps[layer] = weights.mean(dim=1)
        x = x + gate1[:, None] * run.keep(attention, block.attn1.to_out[0](out))
        return x + gate2[:, None] * run.keep(mlp, feed_forward(x))
    x = x + gate1[:, None] * run.features[attention]
    scores = run.maps[layer].sum(dim=1)
    return x + gate2[:, None] * run.recompute(mlp, x, scores, feed_forward)


# PixArt


def _run_pixart_block(
    run, block, layer, x, encoder_hidden_states, encoder_attention_mask, timestep, **_
):
    attention, cross, mlp = (Site("main", layer, module) for module in ("attn", "cross", "mlp"))
    vectors = block.scale_shift_table + timestep.reshape(len(x), 6, -1)
    shift1, scale1, gate1, shift2, scale2, gate2 = vectors.unbind(dim=1)
    # the prompts of a batch are joined, and a mask keeps each sample to its own
    B, M, _ = encoder_hidden_states.shape
    mask = x.new_full((B, B, M), -torch.inf)
    mask.diagonal().copy_(encoder_attention_mask[:, 0].t())
    mask = mask.view(B, 1, 1, B * M)

    def feed_forward(rows, fresh=None):
        return block.ff(_modulate(block.norm2, rows, shift2, scale2))

    def attend_to_text(rows, fresh=None):
        text = encoder_hidden_states.reshape(1, B * M, -1)
        query, key, value = _project(block.attn2, rows, text)
        out, weights = _attend(query, key, value, mask)
        weights = weights.mean(dim=1)
        if fresh is None:
            run.maps[layer] = weights
        else:
            published.scatter_rows_(run.maps[layer], fresh, weights)
        return block.attn2.to_out[0](out)

    def score():
        """By the entropy of the two guidance halves' mean map, the same for both."""
        mean = sum(run.maps[layer].chunk(2)) / 2
        entropy = -(mean * (mean + 1e-7).log()).sum(dim=-1)
        return (1 + entropy).repeat(2, 1)

    if run.is_full(mlp, x):
        rows = _modulate(block.norm1, x, shift1, scale1)
        out, _ = _attend(*_project(block.attn1, rows))
        x = x + gate1[:, None] * run.keep(attention, block.attn1.to_out[0](out))
        x = x + run.keep(cross, attend_to_text(x))
        return x + gate2[:, None] * run.keep(mlp, feed_forward(x))
    x = x + gate1[:, None] * run.features[attention]
    x = x + run.recompute(cross, x, score(), attend_to_text)
    return x + gate2[:, None] * run.recompute(mlp, x, score(), feed_forward)


# FLUX


def _run_double_block(
    run, block, layer, hidden_states, encoder_hidden_states, temb, image_rotary_emb, **_
):
    """The attention is cached before its projection, which every step repeats for all tokens."""
    attention, *mlps = (Site("double", layer, module) for module in ("attn", "mlp", "text_mlp"))
    streams = hidden_states, encoder_hidden_states
    first, second = (block.norm1, block.norm1_context), (block.norm2, block.norm2_context)
    feeds = block.ff, block.ff_context
    vectors = [norm.linear(norm.silu(temb)).chunk(6, dim=1) for norm in first]
    is_full = run.is_full(attention, hidden_states)
    if is_full:
        rows = (
            _modulate(norm.norm, x, shift, scale)
            for norm, x, (shift, scale, *_) in zip(first, streams, vectors, strict=True)
        )
        out, weights = _attend(*_query_key_value(block.attn, *rows, image_rotary_emb))
        run.features[attention] = out
        run.maps[attention] = weights.mean(dim=1).mean(dim=1)
    # the text's tokens come first
    num_text = encoder_hidden_states.shape[1]
    parts = [
        (tensor[:, num_text:], tensor[:, :num_text])
        for tensor in (run.features[attention], run.maps[attention])
    ]
    projections = block.attn.to_out[0], block.attn.to_add_out
    results = []
    for x, site, vector, norm, feed, project, attended, scores in zip(
        streams, mlps, vectors, second, feeds, projections, *parts, strict=True
    ):
        _, _, gate1, shift, scale, gate2 = vector
        compute = partial(_feed_forward, feed, norm, shift, scale)
        x = x + gate1[:, None] * project(attended)
        out = run.keep(site, compute(x)) if is_full else run.recompute(site, x, scores, compute)
        results.append(x + gate2[:, None] * out)
    image, text = results
    return text, image


def _feed_forward(feed, norm, shift, scale, rows, fresh=None):
    return feed(_modulate(norm, rows, shift, scale))


def _run_single_block(
    run, block, layer, hidden_states, encoder_hidden_states, temb, image_rotary_emb, **_
):
    attention, mlp = (Site("single", layer, module) for module in ("attn", "mlp"))
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    shift, scale, gate = block.norm.linear(block.norm.silu(temb)).chunk(3, dim=1)

    def project(rows, fresh=None):
        attended = run.features[attention]
        if fresh is not None:
            attended = published.gather_rows(attended, fresh)
        hidden = block.act_mlp(block.proj_mlp(_modulate(block.norm.norm, rows, shift, scale)))
        return block.proj_out(torch.cat([attended, hidden], dim=-1))

    if run.is_full(mlp, x):
        rows = _modulate(block.norm.norm, x, shift, scale)
        heads = _query_key_value(block.attn, rows, None, image_rotary_emb)
        run.features[attention], weights = _attend(*heads)
        run.maps[attention] = weights.mean(dim=1).mean(dim=1)
        out = run.keep(mlp, project(x))
    else:
        out = run.recompute(mlp, x, run.maps[attention], project)
    x = x + gate[:, None] * out
    num_text = encoder_hidden_states.shape[1]
    return x[:, :num_text], x[:, num_text:]


def _query_key_value(attention, hidden_states, text, rotary):
    """(B, N, H, E) each, normalised and rotated; the text's tokens come first."""

    def heads(rows):
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
