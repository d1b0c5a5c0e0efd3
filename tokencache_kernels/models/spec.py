"""The anatomy of a diffusion transformer as data: its stacks of blocks, and their parts.

A description names the parts of a model by their paths; it imports neither torch nor diffusers.
Hooks, cached sites, selections, fused sub-layers, modulation in advance, training by blending and
plans all follow from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..errors import fail


@dataclass(frozen=True)
class Norm:
    """A normalisation over the channels.

    Attributes:
        module: its path in the block; weights and epsilon are read there.
        kind: layer norm, root mean square, or none: rows are taken as they are.
        plus_one: whether the factor is ``1 + weight``.
    """

    module: str
    kind: Literal["layer", "rms", "none"] = "layer"
    plus_one: bool = False


# a branch whose rows are taken as they are; no norm at all is one that is not described
NO_NORM = Norm("", "none")


@dataclass(frozen=True)
class Vectors:
    """A source of adaLN vectors: ``count`` rows of D channels, of each sample or of each token.

    Attributes:
        name: the name that modulations use.
        kind: how a block makes them:
            ``adaln``: ``module.linear(silu(argument))``, cut in ``count``;
            ``own_adaln``: the vectors of ``module.emb(timestep, class_labels)``;
            ``call``: ``module(argument)``, cut in ``count``;
            ``table``: the parameter ``module`` (count, D) plus ``argument``;
            ``argument``: rows ``[start, start + count)`` of ``argument``.
        module: the path of the module or parameter in the block.
        argument: the block's argument that holds the embedding.
        count: the number of rows.
        start: the first row; see ``argument``.
        index: the block's argument that numbers the vectors: an integer for each token. The
            embedding then holds all samples for number 0, then all for number 1, and so on; a
            source of the same argument without an index takes those for number 0.
    """

    name: str
    kind: Literal["adaln", "own_adaln", "call", "table", "argument"]
    module: str = ""
    argument: str = "temb"
    count: int = 6
    start: int = 0
    index: str = ""


@dataclass(frozen=True)
class Modulation:
    """The rows of a source of vectors that shift, scale and gate a branch; None: there is none."""

    source: str
    shift: int | None = None
    scale: int | None = None
    gate: int | None = None
    gate_function: Literal["none", "tanh"] = "none"


@dataclass(frozen=True)
class Layers:
    """The linear layers of an MLP, by their paths in it: ``fc2(activation(fc1(x)))``.

    Attributes:
        fc1: the first layer.
        fc2: the last layer.
        activation: as ``ops.linear`` names it; None: it and ``glu`` are read from the activations
            of diffusers' ``FeedForward``.
        gate: of a gated MLP with two first layers the one that takes the activation:
            ``fc2(activation(gate(x)) * fc1(x))``.
        glu: of a gated MLP with one first layer the half of its rows that does.
    """

    fc1: str
    fc2: str
    activation: str | None = None
    gate: str = ""
    glu: Literal["gate_first", "gate_last"] | None = None


# the stream of a module that is given the tokens of all streams, joined
JOINT = "joint"
FEED_FORWARD = Layers("net.0.proj", "net.2")


@dataclass(frozen=True)
class Branch:
    """A module of a block whose output is added to a residual stream.

    ``x += gate * post_norm(module(norm(x) * (1 + scale) + shift))``

    Attributes:
        module: its path in the block.
        name: the name of its site: ``attn``, ``cross``, ``mlp``, ``text_mlp``.
        stream: the block's argument that is its residual stream, or ``JOINT``.
        norm: the norm before it; None: it is not described, and the block is not fused.
        modulation: shift, scale and gate, if there are any.
        post_norm: a norm of the output, before the gate; a root mean square.
        site_stream: the stream of its site, if not the stack's.
    """

    module: str
    name: str
    stream: str = "hidden_states"
    norm: Norm | None = None
    modulation: Modulation | None = None
    post_norm: Norm | None = None
    site_stream: str | None = None


@dataclass(frozen=True)
class Mlp(Branch):
    """A function of single tokens, of which some may be recomputed.

    Attributes:
        layers: its linear layers, for the fused path; None: the module is called.
    """

    name: str = "mlp"
    layers: Layers | None = FEED_FORWARD


@dataclass(frozen=True)
class SelfAttention(Branch):
    """Attention among the tokens of one stream.

    Attributes:
        passes: the module's arguments, and the block's arguments that they are given.
        also: further arguments of the module that are given its tokens.
        folds: the sequences that attend, of a video whose tokens lie frame by frame: all tokens
            (``none``), those of a frame (``frames``), those of a place in all frames (``places``).
        splits: whether some of its tokens may be recomputed by ``to_q``, ``to_k``, ``to_v`` and
            ``to_out``: there are no norms of queries and keys, and no rotary embedding.
    """

    name: str = "attn"
    passes: Mapping[str, str] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    folds: Literal["none", "frames", "places"] = "none"
    splits: bool = False


@dataclass(frozen=True)
class CrossAttention(Branch):
    """Attention to a text; a function of single tokens, of which some may be recomputed.

    Attributes:
        passes: see ``SelfAttention``.
        text: the block's argument that holds the text.
        mask: the block's argument that says which text tokens are seen, if there is one.
        is_plain: whether ``to_q``, ``to_k``, ``to_v`` and ``to_out`` are all there is to it.
    """

    name: str = "cross"
    passes: Mapping[str, str] = field(default_factory=dict)
    text: str = "encoder_hidden_states"
    mask: str | None = None
    is_plain: bool = False


@dataclass(frozen=True)
class JointAttention:
    """Attention among the tokens of two streams together.

    Attributes:
        module: its path in the block.
        image: norm, modulation and stream of the image's side; its output comes first.
        text: those of the text's side.
        name: the name of its site; one decision is for both sides.
        passes: see ``SelfAttention``.
        is_text_first: whether the text's tokens come first in the sequence.
    """

    module: str
    image: Branch
    text: Branch
    name: str = "attn"
    passes: Mapping[str, str] = field(default_factory=dict)
    is_text_first: bool = True


@dataclass(frozen=True)
class Parallel:
    """Attention and MLP side by side: ``x += gate * fc2(cat(attn(y), activation(fc1(y))))``.

    Two sites: ``attn``, read by ``mlp`` alone, and ``mlp``, the output of ``fc2``.

    Attributes:
        attention: the path of the attention in the block.
        fc1: the path of the MLP's first layer.
        activation: the path of the activation's module.
        fc2: the path of the layer that projects both.
        norm: the norm before both.
        modulation: shift, scale and gate.
        post_norm: see ``Branch``.
        passes: see ``SelfAttention``.
        gives_pair: whether the attention takes and gives the image's tokens and the text's apart.
    """

    attention: str = "attn"
    fc1: str = "proj_mlp"
    activation: str = "act_mlp"
    fc2: str = "proj_out"
    norm: Norm | None = None
    modulation: Modulation | None = None
    post_norm: Norm | None = None
    passes: Mapping[str, str] = field(default_factory=dict)
    gives_pair: bool = False


Part = Mlp | SelfAttention | CrossAttention | JointAttention | Parallel


@dataclass(frozen=True)
class Skip:
    """A long skip: ``x = linear(cat(x, argument))`` before the first part of a block.

    Attributes:
        argument: the block's argument that holds what is skipped to it.
        linear: the path of the layer.
    """

    argument: str
    linear: str


@dataclass(frozen=True)
class Stack:
    """Blocks of one kind, one behind the other.

    Blocks of several stacks whose sites have the same stream count their layers on.

    Attributes:
        path: the path of their list in the transformer, or of a single block.
        parts: the cached modules of a block, in the order in which they run.
        stream: the stream of their sites.
        streams: the block's arguments that are residual streams: the image's, then the text's.
        returns: the streams in the order in which a block returns them; one alone is no tuple.
        joins: whether a block joins its two streams to one sequence.
        holds_all: whether its one stream holds the tokens of the streams before it, joined.
        is_text_first: the order of a joined sequence.
        vectors: the sources of adaLN vectors.
        clips_float16: the streams that the block clips to float16's range.
        block: the path of the block in an entry of the list; empty: the entry is the block.
        is_seen: whether the model looks at what each block returns, as for long skips.
        skip: the long skip that a block takes in, if it does.
        first_layer: the number of its first layer; counted when the description is bound.
    """

    path: str
    parts: tuple[Part, ...]
    stream: str = "main"
    streams: tuple[str, ...] = ("hidden_states",)
    returns: tuple[str, ...] = ("hidden_states",)
    joins: bool = False
    holds_all: bool = False
    is_text_first: bool = True
    vectors: tuple[Vectors, ...] = ()
    clips_float16: tuple[str, ...] = ()
    block: str = ""
    is_seen: bool = False
    skip: Skip | None = None
    first_layer: int = 0


@dataclass(frozen=True)
class Grid:
    """The source of the tokens' grid: the latents (B, C, H, W) or (B, C, F, H, W).

    Attributes:
        patch: the patch size: a number, the name of a config entry, or an attribute path.
        is_video: whether there are frames; tiles do not cross them.
    """

    patch: int | str = "patch_size"
    is_video: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """A diffusion transformer.

    Attributes:
        transformer: the name of its class.
        stacks: its blocks; blocks that are not described run as they are.
        conditioning: the transformer's arguments that tell one run from another.
        latents: the argument that holds the tokens of the image.
        timestep: the argument that holds the timestep.
        time_rises: whether timesteps rise from step to step.
        grid: the source of the tokens' grid; None: tokens lie on no grid.
        text_mask: the argument that says which text tokens a cross-attention may see.
        modulated_by: the arguments, beside the timestep, that adaLN vectors depend on.
        timestep_divisor: the divisor by which pipelines make a timestep of the scheduler's.
        embedders: the paths of modules that are called before the blocks and see nothing but
            the timestep and ``modulated_by``.
        norm_out: the path of the adaLN behind the blocks, if there is one; its argument is theirs.
        notes: a remark for ``tokencache models``.
    """

    transformer: str
    stacks: tuple[Stack, ...]
    conditioning: tuple[str, ...] = ("encoder_hidden_states",)
    latents: str = "hidden_states"
    timestep: str = "timestep"
    time_rises: bool = False
    grid: Grid | None = None
    text_mask: str | None = None
    modulated_by: tuple[str, ...] = ()
    timestep_divisor: int = 1
    embedders: tuple[str, ...] = ()
    norm_out: str = ""
    notes: str = ""

    def __post_init__(self) -> None:
        if not self.stacks:
            fail("ModelSpec", "stacks", "hold at least one stack", "none")
        for stack in self.stacks:
            if not stack.parts:
                fail("ModelSpec", f"stack {stack.path}", "have at least one part", "none")


def find_refusal(stack: Stack) -> str | None:
    """Say why a description keeps the blocks of a stack from being composed of sub-layers.

    Returns:
        None: it says everything that is needed.
    """
    sources = {source.name: source for source in stack.vectors}
    numbered: dict[str, str] = {}
    for part in stack.parts:
        for branch in (part.image, part.text) if isinstance(part, JointAttention) else (part,):
            name = branch.fc2 if isinstance(branch, Parallel) else branch.module
            stream = stack.streams[0] if isinstance(branch, Parallel) else branch.stream
            if branch.norm is None:
                return f"the norm before {name} is not described"
            if stream not in stack.streams:
                return f"{name} is given the tokens of all streams"
            post_norm = branch.post_norm
            if post_norm is not None and post_norm.kind != "rms":
                return f"the norm behind {name} is no root mean square"
            modulation = branch.modulation
            if modulation is None:
                continue
            source = sources.get(modulation.source)
            if source is None:
                return f"the vectors {modulation.source!r} of {name} are not described"
            rows = (modulation.shift, modulation.scale, modulation.gate)
            if any(row is not None and not 0 <= row < source.count for row in rows):
                return f"the vectors {source.name!r} of {name} have {source.count} rows"
            if numbered.setdefault(stream, source.index) != source.index:
                return f"the vectors of {stream} are numbered in two ways"
    return None
