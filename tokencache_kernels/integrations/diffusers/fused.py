"""A block composed of sub-layers that run through our ops, from its description."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ... import ops
from ...blocks import (
    CrossAttentionLayer,
    JointAttention,
    Layers,
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

# activations of diffusers' FeedForward: as ops.linear names them, and the half that takes them
_ACTIVATIONS: dict[str, tuple[str, Literal["gate_last"] | None]] = {
    "GELU none": ("gelu", None),
    "GELU tanh": ("gelu_tanh", None),
    "GEGLU": ("gelu", "gate_last"),
    "SwiGLU": ("silu", "gate_last"),
}
# where models clip in float16
_FLOAT16_LIMIT = 65504


class Source(NamedTuple):
    """The adaLN vectors of a block in one step.

    Attributes:
        vectors: (B, D) each, (B, N, D), or (B, K, D) where they are numbered.
        vector_index: (B, N) int32, the number of each token's vector; None: they are not numbered.
    """

    vectors: tuple[Tensor, ...]
    vector_index: Tensor | None = None


Sources = Mapping[str, Source]


def find_refusal(stack: Stack, parts: tuple[spec.Part, ...], block: nn.Module) -> str | None:
    """Say why a block cannot be composed of sub-layers; None if it can."""
    if block.training:
        return "it is in training mode"
    for name, module in block.named_modules():
        is_layer = class_of(module) is nn.Linear
        if compat.is_wrapped(module) or (compat.has_hooks(module) and not is_layer):
            return f"{name or 'the block'} has a hook around it"
    refusal = spec.find_refusal(replace(stack, parts=parts))
    if refusal is not None:
        return refusal
    for part in parts:
        for branch in (part.image, part.text) if isinstance(part, spec.JointAttention) else (part,):
            refusal = _refuse_branch(branch, block)
            if refusal is not None:
                return refusal
    sources = (_refuse_source(source, parts, block) for source in stack.vectors)
    return next(filter(None, sources), None)


def _refuse_branch(branch: Any, block: Any) -> str | None:
    for norm in (branch.norm, branch.post_norm):
        if norm is None or norm.kind == "none":
            continue
        module = resolve(block, norm.module)
        is_other = isinstance(module, nn.RMSNorm if norm.kind == "layer" else nn.LayerNorm)
        if is_other or not hasattr(module, "eps"):
            kind = "layer norm" if norm.kind == "layer" else "root mean square"
            return f"{norm.module} is no {kind}"
        if norm is branch.post_norm and getattr(module, "bias", None) is not None:
            return f"{norm.module} has a bias"
    is_plain = (isinstance(branch, spec.SelfAttention) and branch.splits) or (
        isinstance(branch, spec.CrossAttention) and branch.is_plain
    )
    if is_plain and not is_plain_attention(resolve(block, branch.module)):
        return f"{branch.module} has parts beside its four projections"
    return None


def _refuse_source(source: Vectors, parts: tuple[spec.Part, ...], block: Any) -> str | None:
    if source.kind not in ("adaln", "own_adaln"):
        return None
    module = resolve(block, source.module)
    if not (hasattr(module, "linear") and hasattr(module, "silu")):
        return f"{source.module} is no adaLN"
    width = _width(source, parts, block)
    if not isinstance(module.linear, nn.Linear) or width is None:
        return None
    rows = module.linear.out_features / width
    return None if rows == source.count else f"{source.module} makes {rows:g} vectors"


def _width(source: Vectors, parts: tuple[spec.Part, ...], block: Any) -> int | None:
    """The channels of the rows that a source modulates."""
    for branch in branches_of(parts):
        if branch.modulation is not None and branch.modulation.source == source.name:
            norm = resolve(block, branch.norm.module)
            shape = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", None)
            return int(shape if isinstance(shape, int) else shape[-1]) if shape else None
    return None


def branches_of(parts: tuple[spec.Part, ...]) -> Iterator[Any]:
    """All branches of a block; a joint attention has two."""
    for part in parts:
        yield from (part.image, part.text) if isinstance(part, spec.JointAttention) else (part,)


def described_arguments(stack: Stack) -> frozenset[str]:
    """The block's arguments that a composed block can handle."""
    names = set(stack.streams) | ({stack.skip.argument} if stack.skip else set())
    for source in stack.vectors:
        names |= {"timestep", "class_labels"} if source.kind == "own_adaln" else {source.argument}
        names |= {source.index} if source.index else set()
    for part in stack.parts:
        names |= set(getattr(part, "passes", {}).values())
        if isinstance(part, spec.CrossAttention):
            names |= {part.text} if part.mask is None else {part.text, part.mask}
    return frozenset(names)


def read_sources(stack: Stack, block: Any, named: Mapping[str, Any]) -> Sources | None:
    """The adaLN vectors of a block; None if they are of a grain that is not described."""
    sources = {}
    for source in stack.vectors:
        stream = next(
            (
                stack.streams[0] if isinstance(branch, spec.Parallel) else branch.stream
                for branch in branches_of(stack.parts)
                if branch.modulation is not None and branch.modulation.source == source.name
            ),
            stack.streams[0],
        )
        like = named[stream]
        held = stack.streams if stack.joins else (stream,)
        num_tokens = sum(named[name].shape[1] for name in held)
        read = _read_source(source, stack, block, named, like, num_tokens)
        if read is None:
            return None
        sources[source.name] = read
    return sources


def _read_source(
    source: Vectors,
    stack: Stack,
    block: Any,
    named: Mapping[str, Any],
    like: Tensor,
    num_tokens: int,
) -> Source | None:
    B, D = len(like), like.shape[-1]
    index = named.get(source.index) if source.index else None
    if source.kind != "own_adaln" and named.get(source.argument) is None:
        return None
    made = _make_vectors(source, stack, block, named, like)
    if isinstance(made, tuple):
        return Source(made)
    # the rows of an argument that several sources share
    total = source.count
    if source.kind == "argument":
        shared = (one for one in stack.vectors if one.argument == source.argument)
        total = max(one.start + one.count for one in shared)
    R, width = len(made), total * D
    T, rest = divmod(made.numel(), R * width)
    if rest or T not in (1, num_tokens):
        return None
    made = made.reshape(R, T, total, D)[:, :, source.start : source.start + source.count]
    made = made.to(like.dtype)
    if index is not None:
        K, rest = divmod(R, B)
        if rest or T != 1:
            return None
        numbers = index.to(torch.int32).expand(B, num_tokens)
        return Source(made.reshape(K, B, -1, D).transpose(0, 1).unbind(2), numbers)
    if R not in (1, B):
        return None
    made = made.expand(B, -1, -1, -1)
    return Source(made[:, 0].unbind(1) if T == 1 else made.unbind(2))


def _make_vectors(
    source: Vectors, stack: Stack, block: Any, named: Mapping[str, Any], like: Tensor
) -> Tensor | tuple[Tensor, ...]:
    """The vectors of a source side by side, or apart if they have been made in advance."""
    if source.kind in ("adaln", "own_adaln"):
        norm = resolve(block, source.module)
        vectors = read_modulation(norm)
        if vectors is not None:
            return vectors
        if source.kind == "own_adaln":
            embedding = norm.emb(named["timestep"], named["class_labels"], hidden_dtype=like.dtype)
        else:
            embedding = named[source.argument]
        made: Tensor = norm.linear(norm.silu(embedding))
        return made
    given: Tensor = named[source.argument]
    if not source.index and any(
        one.index and one.argument == source.argument for one in stack.vectors
    ):
        # those of number 0 come first
        given = given[: len(like)]
    if source.kind == "call":
        called: Tensor = resolve(block, source.module)(given)
        return called
    if source.kind == "table":
        table = resolve(block, source.module)
        return (table + given.reshape(len(given), -1, *table.shape)).flatten(1)
    return given


def norm_of(block: Any, norm: Norm, dtype: torch.dtype) -> ops.RowNorm:
    """A norm as the ops take it."""
    if norm.kind == "none":
        return ops.RowNorm("none")
    module = resolve(block, norm.module)
    weight, bias = (
        None if vector is None else vector.to(dtype)
        for vector in (getattr(module, name, None) for name in ("weight", "bias"))
    )
    eps = torch.finfo(dtype).eps if module.eps is None else module.eps
    offset = 1.0 if norm.plus_one and weight is not None else 0.0
    return ops.RowNorm(norm.kind, weight, bias, offset, eps)


def modulation_of(block: Any, branch: Any, sources: Sources, dtype: torch.dtype) -> Modulation:
    """The norm before a branch, and its modulation."""
    norm, modulation = norm_of(block, branch.norm, dtype), branch.modulation
    if modulation is None:
        return Modulation(None, None, norm)
    vectors = sources[modulation.source].vectors
    shift, scale = (
        None if row is None else vectors[row] for row in (modulation.shift, modulation.scale)
    )
    return Modulation(shift, scale, norm)


def gate_of(modulation: Any, sources: Sources) -> Tensor | None:
    """The gate of a branch, or None."""
    if modulation is None or modulation.gate is None:
        return None
    gate = sources[modulation.source].vectors[modulation.gate]
    return gate.tanh() if modulation.gate_function == "tanh" else gate


def mlp_of(module: Any, layers: spec.Layers | None) -> Mlp:
    """An MLP; on the fused path if its layers are described and plain."""
    if layers is None or module.training or compat.has_hooks(module) or compat.is_wrapped(module):
        return Mlp(module)
    paths = [layers.fc1, layers.fc2, *([layers.gate] if layers.gate else [])]
    try:
        fc1, fc2, *gate = (resolve(module, path) for path in paths)
    except (AttributeError, IndexError, TypeError):
        # its layers are others than a FeedForward's
        return Mlp(module)
    if not all(map(compat.is_plain, (fc1, fc2, *gate))):
        return Mlp(module)
    activation, glu = layers.activation, layers.glu
    if activation is None:
        first = resolve(module, layers.fc1.rpartition(".")[0])
        name = " ".join(filter(None, (class_of(first).__name__, getattr(first, "approximate", ""))))
        if name not in _ACTIVATIONS:
            return Mlp(module)
        activation, glu = _ACTIVATIONS[name]
    return Mlp(module, Layers(fc1, fc2, activation, gate[0] if gate else None, glu))


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
        if self._stack.skip is not None:
            self._take_in(self._stack.skip)
        for branch in branches_of(self._parts):
            if branch.modulation is not None:
                index = self._sources[branch.modulation.source].vector_index
                self._stream_of(branch).number_vectors(index)
        for part in self._parts:
            if isinstance(part, spec.JointAttention):
                self._run_joint(part)
            elif isinstance(part, spec.Parallel):
                self._run_parallel(part)
            else:
                run_sub_layer(self._stream_of(part), self._runner, self._sub_layer(part))
        for name in self._stack.clips_float16:
            if name in self._streams and self._streams[name].hidden_states.dtype == torch.float16:
                self._streams[name].clip(_FLOAT16_LIMIT)

    def _take_in(self, skip: spec.Skip) -> None:
        stream = self._streams[self._stack.streams[0]]
        joined = torch.cat([stream.flush(), self._named[skip.argument]], dim=-1)
        stream.follow(resolve(self._block, skip.linear)(joined))

    def _stream_of(self, branch: Any) -> ResidualStream:
        is_parallel = isinstance(branch, spec.Parallel)
        return self._streams[self._stack.streams[0] if is_parallel else branch.stream]

    def _modulation_of(self, branch: Any) -> Modulation:
        dtype = self._stream_of(branch).hidden_states.dtype
        return modulation_of(self._block, branch, self._sources, dtype)

    def _post_norm_of(self, branch: Any) -> ops.RowNorm | None:
        if branch.post_norm is None:
            return None
        dtype = self._stream_of(branch).hidden_states.dtype
        return norm_of(self._block, branch.post_norm, dtype)

    def _given(self, passes: Mapping[str, str]) -> dict[str, Any]:
        return {name: self._named.get(argument) for name, argument in passes.items()}

    def _sub_layer(self, part: Any) -> SubLayer:
        site = site_of(self._stack, part, self._layer)
        module = resolve(self._block, part.module)
        backend, gate = self._runner.backend, gate_of(part.modulation, self._sources)
        is_bare = part.norm.kind == "none" and part.modulation is None and part.post_norm is None
        if isinstance(part, spec.CrossAttention) and part.is_plain and is_bare:
            return self._cross_attention(part, site, module)
        modulation, post_norm = self._modulation_of(part), self._post_norm_of(part)
        if isinstance(part, spec.Mlp):
            mlp = mlp_of(module, part.layers)
            return MlpLayer(site, gate, modulation, mlp, backend, post_norm)
        given = self._given(part.passes)
        if isinstance(part, spec.CrossAttention):
            # a function of single tokens
            call = partial(module, **given)
            return MlpLayer(site, gate, modulation, Mlp(call), backend, post_norm)

        def attend(rows: Tensor) -> Any:
            return module(rows, **given, **dict.fromkeys(part.also, rows))

        if not part.splits:
            return WholeLayer(site, gate, modulation, attend, post_norm)
        attention = self_attention_of(module, backend)
        return SelfAttentionLayer(
            site, gate, modulation, attend, attention, self._runner, post_norm
        )

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
        modulations = tuple(map(self._modulation_of, sides))
        post_norms = tuple(map(self._post_norm_of, sides))
        gates = tuple(gate_of(side.modulation, self._sources) for side in sides)
        given = self._given(part.passes)

        def attend(image: Tensor, text: Tensor) -> Any:
            return module(hidden_states=image, encoder_hidden_states=text, **given)

        site = site_of(self._stack, part, self._layer)
        layer = JointAttention(site, gates, modulations, attend, post_norms)
        image, text = (self._streams[side.stream] for side in sides)
        layer.run(image, text, self._runner)

    def _run_parallel(self, part: spec.Parallel) -> None:
        runner, block = self._runner, self._block
        stream = self._streams[self._stack.streams[0]]
        site = attention_site(self._stack, self._layer)
        mlp_site = site_of(self._stack, part, self._layer)
        modulation = self._modulation_of(part)
        module = resolve(block, part.attention)
        given = self._given(part.passes)

        def attend_all(rows: Tensor) -> Tensor:
            if not part.gives_pair:
                attended: Tensor = module(hidden_states=rows, **given)
                return attended
            text = self._named[self._stack.streams[1]].shape[1]
            image, text_rows = rows[:, :-text], rows[:, -text:]
            pair = module(hidden_states=image, encoder_hidden_states=text_rows, **given)
            return torch.cat(pair, dim=1)

        attention = WholeLayer(site, None, modulation, attend_all)

        def attend() -> Tensor:
            return bring_up_to_date(stream, runner, attention)

        if runner.action(mlp_site) is Action.REUSE and runner.is_remembered(site):
            # for a later step: this one does not ask for it
            attend()
        fc1, activation, fc2 = (
            resolve(block, path) for path in (part.fc1, part.activation, part.fc2)
        )
        is_fused = compat.is_plain(fc1) and compat.is_plain(fc2) and isinstance(activation, nn.GELU)
        layers = None
        if is_fused:
            layers = Layers(fc1, fc2, _ACTIVATIONS[f"GELU {activation.approximate}"][0])
        layer = ParallelLayer(
            mlp_site,
            gate_of(part.modulation, self._sources),
            modulation,
            attend,
            lambda rows, attended: fc2(torch.cat([attended, activation(fc1(rows))], dim=-1)),
            layers,
            runner.backend,
            self._post_norm_of(part),
        )
        run_sub_layer(stream, runner, layer)
