"""Shapes of models as data: enough to count FLOPs and bytes without running a model.

A multiply-add is 2 FLOPs; layer norm counts 1, softmax 5 and GELU 6 per element, as in the
published counters. Embeddings, modulation and the final layer are left out, as are gates and
residual sums.
"""

from dataclasses import dataclass, replace

from ..errors import fail
from ..models import (
    JOINT,
    CrossAttention,
    JointAttention,
    Mlp,
    ModelSpec,
    Parallel,
    Published,
    Sizes,
    Stack,
)
from ..models.spec import Part
from .decisions import Action, Decision, Site


@dataclass(frozen=True)
class ModuleShape:
    """One cached module of the layers of a stack; FLOPs are those of one sample."""

    name: str
    num_tokens: int
    flops_full: int
    # the keys that a token attends to: none in an MLP
    num_keys: int = 0
    # the cost of each fresh token
    flops_per_fresh: int = 0
    # the cost of a partial step as soon as one token is fresh, such as the keys of the text
    flops_if_fresh: int = 0
    # the cost of every step that is not full
    flops_always: int = 0
    # self-attention, whose tokens are also keys: the cost of each key, and of a fresh token with it
    flops_per_key: int = 0
    flops_per_pair: int = 0
    # the module that its output goes into, where it is no branch of its own
    read_by: str | None = None
    # whether it computes all tokens or none
    is_whole: bool = False
    # whether its tokens are selected by the scores of a module before it in its block
    shares_scores: bool = False
    # whether the keys and values of the text are kept
    keeps_text: bool = False
    # the layers that have it, if not all do, and the stream of their sites, if not the stack's
    layers: tuple[int, ...] | None = None
    stream: str | None = None

    def flops(self, decision: Decision) -> int:
        """The FLOPs of one sample and layer under ``decision``."""
        if decision.action is Action.FULL:
            return self.flops_full
        if decision.action is Action.SKIP:
            return 0
        if decision.action is Action.REUSE:
            return self.flops_always
        fresh = decision.num_fresh
        projected = self.num_tokens if decision.attention == "kv_all" else fresh
        attended = self.num_keys
        if decision.attention == "sel_only":
            attended = attended * fresh // self.num_tokens
        keys = projected * self.flops_per_key + fresh * attended * self.flops_per_pair
        return self.flops_always + self.flops_if_fresh + fresh * self.flops_per_fresh + keys


@dataclass(frozen=True)
class StackShape:
    """Layers of one kind; ``stream`` is the one in their ``Site``."""

    stream: str
    num_layers: int
    modules: tuple[ModuleShape, ...]

    def sites(self, module: ModuleShape) -> tuple[Site, ...]:
        """The sites of one of its modules, by layer."""
        layers = range(self.num_layers) if module.layers is None else module.layers
        return tuple(Site(module.stream or self.stream, layer, module.name) for layer in layers)


@dataclass(frozen=True)
class ModelShape:
    """A whole model on one batch as the network sees it: guidance doubles it."""

    batch: int
    hidden: int
    heads: int
    # the tokens of the last block
    output_tokens: int
    stacks: tuple[StackShape, ...]

    @property
    def dense_flops(self) -> int:
        """The FLOPs of one step without any cache."""
        return self.batch * sum(
            len(stack.sites(module)) * module.flops_full
            for stack in self.stacks
            for module in stack.modules
        )


@dataclass(frozen=True)
class Costs:
    """The FLOPs of an element besides multiply-adds; zeros count matrices alone."""

    norm: int = 1
    softmax: int = 5
    activation: int = 6


def model_shape(
    spec: ModelSpec,
    sizes: Sizes,
    *,
    batch: int,
    image_tokens: int,
    text_tokens: int = 0,
    frames: int = 1,
    projects_again: bool = False,
    costs: Costs | None = None,
) -> ModelShape:
    """Derive the shape of a model from its description and sizes.

    Args:
        spec: the description.
        sizes: the model's sizes.
        batch: B, as the network sees it.
        image_tokens: of one sample, all frames together.
        text_tokens: T, the length of the prompt.
        frames: of the latents.
        projects_again: see ``PublishedCode``.
        costs: of elements; None: as published counters have them.
    """
    shapes = _Shapes(sizes, image_tokens, text_tokens, frames, projects_again, costs or Costs())
    last = spec.stacks[-1]
    return ModelShape(
        batch,
        sizes.hidden,
        sizes.heads,
        # a joined stream shows the image alone
        image_tokens if last.joins else shapes.count_tokens(last, last.streams[0]),
        tuple(shapes.stack_shape(stack) for stack in spec.stacks),
    )


@dataclass(frozen=True)
class _Shapes:
    """The shapes of the parts of one model."""

    sizes: Sizes
    image_tokens: int
    text_tokens: int
    frames: int
    projects_again: bool
    costs: Costs

    def stack_shape(self, stack: Stack) -> StackShape:
        num_layers = self.sizes.layers[stack.path]
        modules: list[ModuleShape] = []
        # the streams in which an earlier part already selects tokens
        selected: set[str] = set()
        for part in stack.parts:
            made = self._part_shapes(stack, part, selected)
            path = part.fc2 if isinstance(part, Parallel) else part.module
            layers = tuple(self.sizes.only.get(path, range(num_layers)))
            if layers:
                are_all = len(layers) == num_layers
                modules += [
                    one if are_all or one.layers else replace(one, layers=layers) for one in made
                ]
            if not made[-1].is_whole and not isinstance(part, (JointAttention, Parallel)):
                selected.add(part.stream)
        return StackShape(stack.stream, num_layers, tuple(modules))

    def count_tokens(self, stack: Stack, stream: str) -> int:
        """The tokens of a stream as the blocks of a stack see it."""
        holds_all = stack.joins or stack.holds_all or stream == JOINT or self.sizes.holds_text
        if holds_all:
            return self.image_tokens + self.text_tokens
        return self.image_tokens if stream == stack.streams[0] else self.text_tokens

    def _part_shapes(self, stack: Stack, part: Part, selected: set[str]) -> list[ModuleShape]:
        if isinstance(part, JointAttention):
            streams = part.image.stream, part.text.stream
            count = sum(self.count_tokens(stack, stream) for stream in streams)
            project = 2 * self.sizes.hidden**2
            one = self._attention(
                part.name, count, count, flops_always=count * project * self.projects_again
            )
            ends = self._text_ends(stack, part)
            if not ends:
                return [one]
            goes_on = tuple(set(range(self.sizes.layers[stack.path])) - set(ends))
            unprojected = self.count_tokens(stack, part.text.stream) * project
            last = replace(one, flops_full=one.flops_full - unprojected, layers=ends)
            return [replace(one, layers=goes_on), last]
        if isinstance(part, Parallel):
            count = self.count_tokens(stack, stack.streams[0])
            extra = 2 * self.sizes.hidden**2
            return [
                self._attention("attn", count, count, projects_output=False),
                self._mlp("mlp", count, extra),
            ]
        count = self.count_tokens(stack, part.stream)
        if isinstance(part, Mlp):
            return [replace(self._mlp(part.name, count), shares_scores=part.stream in selected)]
        if isinstance(part, CrossAttention):
            return [self._cross_attention(part, count)]
        seen = self.sizes.sees.get(stack.path)
        keys = {"frame": count // self.frames, "time": self.frames}.get(seen or "", count)
        extra = self._count_mlp(self.sizes.extra.get(stack.path, 0))
        one = self._attention(part.name, count, keys, extra=extra, is_whole=not part.splits)
        return [replace(one, stream=part.site_stream)]

    def _text_ends(self, stack: Stack, part: JointAttention) -> tuple[int, ...]:
        """The layers that keep no text: it has no MLP there, nor an output of the attention."""
        layers = set(range(self.sizes.layers[stack.path]))
        for other in stack.parts:
            if isinstance(other, Mlp) and other.stream == part.text.stream:
                layers &= set(self.sizes.only.get(other.module, layers))
        return tuple(sorted(set(range(self.sizes.layers[stack.path])) - layers))

    def _attention(
        self,
        name: str,
        num_tokens: int,
        num_keys: int,
        projects_output: bool = True,
        flops_always: int = 0,
        extra: int = 0,
        is_whole: bool = True,
    ) -> ModuleShape:
        sizes, costs = self.sizes, self.costs
        D, keys_width = sizes.hidden, sizes.key_width or sizes.hidden
        per_fresh = (4 if projects_output else 2) * D * D + extra
        per_key = costs.norm * D + 4 * D * keys_width
        per_pair = 4 * D + costs.softmax * sizes.heads
        flops_full = num_tokens * (per_fresh + per_key + num_keys * per_pair)
        return ModuleShape(
            name, num_tokens, flops_full, num_keys, per_fresh, flops_always=flops_always,
            flops_per_key=per_key, flops_per_pair=per_pair,
            read_by=None if projects_output else "mlp", is_whole=is_whole,
        )  # fmt: skip

    def _cross_attention(self, part: CrossAttention, num_tokens: int) -> ModuleShape:
        D, T = self.sizes.hidden, self.text_tokens
        per_token = 4 * D * D + 4 * T * D + self.costs.softmax * self.sizes.heads * T
        keys_and_values = 4 * D * D * T
        return ModuleShape(
            part.name, num_tokens, num_tokens * per_token + keys_and_values, T, per_token,
            keys_and_values, keeps_text=part.is_plain,
        )  # fmt: skip

    def _mlp(self, name: str, num_tokens: int, extra: int = 0) -> ModuleShape:
        per_token = self.costs.norm * self.sizes.hidden + self._count_mlp(self.sizes.mlp) + extra
        return ModuleShape(name, num_tokens, num_tokens * per_token, flops_per_fresh=per_token)

    def _count_mlp(self, width: int) -> int:
        """The FLOPs of an MLP for one token."""
        matrices = 3 if self.sizes.is_gated else 2
        return 2 * matrices * self.sizes.hidden * width + self.costs.activation * width


def published_shape(
    model: Published,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    text_tokens: int | None = None,
    batch: int | None = None,
    as_published: bool = False,
) -> ModelShape:
    """The shape for a picture and a batch as the network sees it, ours or the published code's.

    Args:
        model: the published model.
        height: of the picture in pixels; None, here and below: as published.
        width: as ``height``.
        frames: of the latents.
        text_tokens: the length of the prompt.
        batch: the rows of a forward.
        as_published: whether the published code of ToCa is meant.

    Raises:
        ValueError: there is no such picture, text or batch; the message is one sentence.
    """
    name, side = "published_shape", model.pixels_per_token
    sizes = [model.height if height is None else height, model.width if width is None else width]
    for label, pixels in zip(("height", "width"), sizes, strict=True):
        if pixels < 1 or pixels % side:
            fail(name, label, f"be a positive multiple of {side}", pixels)
    if text_tokens is not None and not model.text_tokens:
        fail(name, "text_tokens", "be left out where no text is read", text_tokens)
    counts = {"frames": frames, "text_tokens": text_tokens, "batch": batch}
    for label, count in counts.items():
        if count is not None and count < 1:
            fail(name, label, "be at least 1", count)
    frames = model.frames if frames is None else frames
    return model_shape(
        model.spec,
        model.sizes,
        batch=model.batch if batch is None else batch,
        image_tokens=frames * (sizes[0] // side) * (sizes[1] // side),
        text_tokens=model.text_tokens if text_tokens is None else text_tokens,
        frames=frames,
        projects_again=as_published and model.code is not None and model.code.projects_again,
    )


def count_modulation(spec: ModelSpec, sizes: Sizes) -> int:
    """Count the parameters that ``precompute_modulation`` reads once a run: the blocks' adaLN."""
    D = sizes.hidden
    rows = sum(
        sizes.vectors.get(source.module, source.count * sizes.layers[stack.path])
        for stack in spec.stacks
        for source in stack.vectors
        if source.kind in ("adaln", "own_adaln", "call")
    )
    return rows * D * ((sizes.embedding or D) + 1)
