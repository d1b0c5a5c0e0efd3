"""A block composed of sub-layers that run through our ops, from its description."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...blocks import (
    CrossAttentionLayer,
    JointAttention,
    Mlp,
    MlpLayer,
    Modulation,
    ParallelLayer,
    ResidualStream,
    Runner,
    SelfAttention,
    SelfAttentionLayer,
    SubLayer,
    WholeLayer,
    bring_up_to_date,
    run_sub_layer,
)
from ...models import spec
from ...models.spec import Norm, Stack, Vectors
from ...policies import Action, Site
from . import compat
from .binding import attention_site, resolve, site_of
from .interception import class_of
from .modulation import read_modulation

_GELU = {"none": "gelu", "tanh": "gelu_tanh"}
# where models clip in float16
_FLOAT16_LIMIT = 65504
Sources = Mapping[str, tuple[Tensor, ...]]


def find_refusal(stack: Stack, parts: tuple[spec.Part, ...], block: nn.Module) -> str | None:
    """Say why a block cannot be composed of sub-layers; None if it can."""
    if block.training:
        return "it is in training mode"
    for name, module in block.named_modules():
        is_layer = class_of(module) is nn.Linear
        if compat.is_wrapped(module) or (compat.has_hooks(module) and not is_layer):
            return f"{name or 'the block'} has a hook around it"
    for part in parts:
        if isinstance(part, spec.Parallel) and part.gives_pair:
            return "its attention takes image and text apart"
        for branch in (part.image, part.text) if isinstance(part, spec.JointAttention) else (part,):
            refusal = _refuse_branch(branch, block)
            if refusal is not None:
                return refusal
    return next(filter(None, (_refuse_source(source, block) for source in stack.vectors)), None)


def _refuse_branch(branch: Any, block: Any) -> str | None:
    name = getattr(branch, "module", "") or branch.fc2
    if branch.norm is None and not isinstance(branch, spec.CrossAttention):
        return f"the norm before {name} is not described"
    if branch.norm is not None:
        norm = resolve(block, branch.norm.module)
        if branch.norm.kind != "layer" or not hasattr(norm, "eps"):
            return f"{branch.norm.module} is no layer norm"
    if getattr(branch, "post_norm", None) is not None:
        return f"{name} has a norm behind it"
    modulation = branch.modulation
    if modulation is not None and modulation.gate_function != "none":
        return f"the gate of {name} is a {modulation.gate_function}"
    is_plain = (isinstance(branch, spec.SelfAttention) and branch.splits) or (
        isinstance(branch, spec.CrossAttention) and branch.is_plain
    )
    if is_plain and not is_plain_attention(resolve(block, branch.module)):
        return f"{name} has parts beside its four projections"
    return None


def _refuse_source(source: Vectors, block: Any) -> str | None:
    if source.kind not in ("adaln", "own_adaln"):
        return None
    module = resolve(block, source.module)
    if not (hasattr(module, "linear") and hasattr(module, "silu")):
        return f"{source.module} is no adaLN"
    if not isinstance(module.linear, nn.Linear):
        return None
    rows = module.linear.out_features / module.linear.in_features
    return None if rows == source.count else f"{source.module} makes {rows:g} vectors"


def described_arguments(stack: Stack) -> frozenset[str]:
    """The block's arguments that a composed block can handle."""
    names = set(stack.streams)
    for source in stack.vectors:
        names |= {"timestep", "class_labels"} if source.kind == "own_adaln" else {source.argument}
    for part in stack.parts:
        names |= set(getattr(part, "passes", {}).values())
        if isinstance(part, spec.CrossAttention):
            names |= {part.text} if part.mask is None else {part.text, part.mask}
    return frozenset(names)


def read_sources(
    stack: Stack, block: Any, named: Mapping[str, Any], like: Tensor
) -> Sources | None:
    """The adaLN vectors of a block, (B, D) each; None if they differ from token to token."""
    sources = {}
    for source in stack.vectors:
        vectors = _read_source(source, block, named, like)
        if vectors is None:
            return None
        B, D = len(like), like.shape[-1]
        if any(vector.shape not in ((B, D), (1, D)) for vector in vectors):
            return None
        sources[source.name] = tuple(
            vector.to(like.dtype).expand(B, D) if vector.shape[0] != B or vector.dtype != like.dtype
            else vector
            for vector in vectors
        )  # fmt: skip
    return sources


def _read_source(
    source: Vectors, block: Any, named: Mapping[str, Any], like: Tensor
) -> tuple[Tensor, ...] | None:
    if source.kind in ("adaln", "own_adaln"):
        norm = resolve(block, source.module)
        vectors = read_modulation(norm)
        if vectors is not None:
            return vectors
        if source.kind == "own_adaln":
            embedding = norm.emb(named["timestep"], named["class_labels"], hidden_dtype=like.dtype)
        else:
            embedding = named[source.argument]
        return tuple(norm.linear(norm.silu(embedding)).chunk(source.count, dim=1))
    given = named[source.argument]
    if source.kind == "call":
        made = resolve(block, source.module)(given)
        return tuple(made.chunk(source.count, dim=-1)) if made.dim() == 2 else None
    D = like.shape[-1]
    if source.kind == "table":
        table = resolve(block, source.module)
        if given.numel() != given.shape[0] * source.count * D:
            return None
        return (table.reshape(source.count, D) + given.reshape(-1, source.count, D)).unbind(1)
    rows = given.reshape(len(given), -1, D)
    return rows[:, source.start : source.start + source.count].unbind(1)


def modulation_of(block: Any, norm: Norm, modulation: Any, sources: Sources) -> Modulation:
    """A layer norm and its modulation; weights of its own are folded into shift and scale."""
    module = resolve(block, norm.module)
    vectors = next(iter(sources.values())) if modulation is None else sources[modulation.source]

    def row(index: int | None) -> Tensor:
        return torch.zeros_like(vectors[0]) if index is None else vectors[index]

    shift = row(None if modulation is None else modulation.shift)
    scale = row(None if modulation is None else modulation.scale)
    if module.weight is not None:
        # (w * y + b) * (1 + scale) + shift, with y the plain layer norm
        gain = 1 + scale
        shift = shift if module.bias is None else module.bias * gain + shift
        scale = module.weight * gain - 1
    return Modulation(shift, scale, module.eps)


def gate_of(modulation: Any, sources: Sources) -> Tensor | None:
    """The gate of a branch, or None."""
    if modulation is None or modulation.gate is None:
        return None
    return sources[modulation.source][modulation.gate]


def mlp_of(module: Any, layers: spec.Layers | None) -> Mlp:
    """An MLP; on the fused path if it is two plain linear layers around a GELU."""
    if layers is None or module.training or compat.has_hooks(module):
        return Mlp(module)
    fc1 = [resolve(module, path) for path in layers.fc1]
    fc2 = resolve(module, layers.fc2)
    activation = layers.activation
    if activation is None:
        first = resolve(module, layers.fc1[0].rpartition(".")[0])
        if class_of(first).__name__ != "GELU":
            return Mlp(module)
        activation = _GELU[first.approximate]
    if len(fc1) != 1 or not (compat.is_plain(fc1[0]) and compat.is_plain(fc2)):
        return Mlp(module)
    return Mlp(module, fc1[0], fc2, activation)


def is_plain_attention(attention: Any) -> bool:
    """Tell whether an attention is four projections and a softmax, and nothing else."""
    parts = (
        "norm_q", "norm_k", "norm_cross", "group_norm", "spatial_norm", "added_kv_proj_dim",
        "residual_connection",
    )  # fmt: skip
    processor = type(getattr(attention, "processor", None)).__name__
    return (
        processor in ("AttnProcessor", "AttnProcessor2_0", "Attention2_0")
        and not getattr(attention, "fused_projections", False)
        and not any(getattr(attention, part, None) for part in parts)
    )


def self_attention_of(attention: Any, backend: str) -> SelfAttention:
    """A self-attention of four projections, recomputed for some of its tokens."""
    qkv = (attention.to_q, attention.to_k, attention.to_v)
    out = attention.to_out[0]
    return SelfAttention(
        qkv,
        out,
        is_fused=all(map(compat.is_plain, (*qkv, out))),
        num_heads=attention.heads,
        head_dim=attention.to_q.out_features // attention.heads,
        softmax_scale=attention.scale,
        backend=backend,
    )


class Composer:
    """Runs the sub-layers of one block in one step."""

    def __init__(
        self,
        stack: Stack,
        layer: int,
        parts: tuple[spec.Part, ...],
        block: Any,
        named: Mapping[str, Any],
        sources: Sources,
        runner: Runner,
        streams: Mapping[str, ResidualStream],
        key_lengths: Tensor | None,
        takes_entropy: bool,
        scored_site: Site | None,
    ) -> None:
        self._stack = stack
        self._layer = layer
        self._parts = parts
        self._block = block
        self._named = named
        self._sources = sources
        self._runner = runner
        self._streams = streams
        self._key_lengths = key_lengths
        self._takes_entropy = takes_entropy
        self._scored_site = scored_site

    def run(self) -> None:
        """Run all sub-layers in order."""
        for part in self._parts:
            if isinstance(part, spec.JointAttention):
                self._run_joint(part)
            elif isinstance(part, spec.Parallel):
                self._run_parallel(part)
            else:
                stream = self._streams[part.stream]
                run_sub_layer(stream, self._runner, self._sub_layer(part))
        for name in self._stack.clips_float16:
            if name in self._streams and self._streams[name].hidden_states.dtype == torch.float16:
                self._streams[name].clip(_FLOAT16_LIMIT)

    def _given(self, passes: Mapping[str, str]) -> dict[str, Any]:
        return {name: self._named.get(argument) for name, argument in passes.items()}

    def _sub_layer(self, part: Any) -> SubLayer:
        site = site_of(self._stack, part, self._layer)
        module = resolve(self._block, part.module)
        backend, gate = self._runner.backend, gate_of(part.modulation, self._sources)
        if isinstance(part, spec.CrossAttention) and part.is_plain and part.norm is None:
            return self._cross_attention(part, site, module)
        modulation = modulation_of(self._block, part.norm, part.modulation, self._sources)
        if isinstance(part, spec.Mlp):
            return MlpLayer(site, gate, modulation, mlp_of(module, part.layers), backend)
        given = self._given(part.passes)
        if isinstance(part, spec.SelfAttention) and part.splits:
            attention = self_attention_of(module, backend)
            call = partial(module, **given)
            return SelfAttentionLayer(site, gate, modulation, call, attention, self._runner)
        if isinstance(part, spec.SelfAttention):
            return WholeLayer(site, gate, modulation, partial(module, **given))
        # a cross-attention behind a norm: a function of single tokens
        return MlpLayer(site, gate, modulation, Mlp(partial(module, **given)), backend)

    def _cross_attention(self, part: spec.CrossAttention, site: Site, module: Any) -> SubLayer:
        query, out = module.to_q, module.to_out[0]
        text = self._named[part.text]

        def project_text() -> tuple[Tensor, Tensor]:
            key, value = (
                self._runner.once((site.layer, name), partial(project, text))
                for name, project in (("key", module.to_k), ("value", module.to_v))
            )
            return key.unflatten(-1, (module.heads, -1)), value.unflatten(-1, (module.heads, -1))

        return CrossAttentionLayer(
            site,
            self._runner,
            scored_site=self._scored_site if self._takes_entropy else None,
            query=query,
            out=out,
            is_fused=compat.is_plain(query) and compat.is_plain(out),
            project_text=project_text,
            key_lengths=self._key_lengths,
            softmax_scale=module.scale,
            backend=self._runner.backend,
        )

    def _run_joint(self, part: spec.JointAttention) -> None:
        module = resolve(self._block, part.module)
        sides = part.image, part.text
        modulations = tuple(
            modulation_of(self._block, side.norm, side.modulation, self._sources)  # type: ignore[arg-type]
            for side in sides
        )
        gates = tuple(gate_of(side.modulation, self._sources) for side in sides)
        given = self._given(part.passes)

        def attend(image: Tensor, text: Tensor) -> Any:
            return module(hidden_states=image, encoder_hidden_states=text, **given)

        layer = JointAttention(site_of(self._stack, part, self._layer), gates, modulations, attend)
        image, text = (self._streams[side.stream] for side in sides)
        layer.run(image, text, self._runner)

    def _run_parallel(self, part: spec.Parallel) -> None:
        runner, block = self._runner, self._block
        stream = self._streams[self._stack.streams[0]]
        site = attention_site(self._stack, self._layer)
        mlp_site = site_of(self._stack, part, self._layer)
        modulation = modulation_of(block, part.norm, part.modulation, self._sources)  # type: ignore[arg-type]
        module = resolve(block, part.attention)
        given = self._given(part.passes)
        attention = WholeLayer(
            site, None, modulation, lambda rows: module(hidden_states=rows, **given)
        )

        def attend() -> Tensor:
            return bring_up_to_date(stream, runner, attention)

        if runner.action(mlp_site) is Action.REUSE and runner.is_remembered(site):
            # for a later step: this one does not ask for it
            attend()
        fc1, activation, fc2 = (
            resolve(block, path) for path in (part.fc1, part.activation, part.fc2)
        )
        is_fused = compat.is_plain(fc1) and compat.is_plain(fc2)
        gelu = isinstance(activation, nn.GELU)
        layer = ParallelLayer(
            mlp_site,
            gate_of(part.modulation, self._sources),
            modulation,
            attend,
            lambda rows, attended: fc2(torch.cat([attended, activation(fc1(rows))], dim=-1)),
            fc1=fc1 if is_fused and gelu else None,
            fc2=fc2 if is_fused and gelu else None,
            activation=_GELU[activation.approximate] if gelu else "none",
            backend=runner.backend,
        )
        run_sub_layer(stream, runner, layer)
