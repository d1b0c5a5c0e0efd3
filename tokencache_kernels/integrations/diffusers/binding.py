"""A description bound to a transformer: which parts there are, and the sites that they make."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ...errors import UnsupportedInputError
from ...models.spec import (
    JOINT,
    Branch,
    CrossAttention,
    JointAttention,
    Mlp,
    ModelSpec,
    Parallel,
    Part,
    SelfAttention,
    Stack,
)
from ...policies import LayerGroup, Site


def resolve(module: Any, path: str) -> Any:
    """The part of a module at a path such as ``net.0.proj``; None if it is absent."""
    for name in path.split("."):
        if module is None:
            return None
        module = module[int(name)] if name.isdigit() else getattr(module, name)
    return module


def site_of(stack: Stack, part: Part, layer: int) -> Site:
    """The site of a part, ``mlp`` for parallel attention and MLP."""
    number = stack.first_layer + layer
    if isinstance(part, Branch):
        return Site(part.site_stream or stack.stream, number, part.name)
    return Site(stack.stream, number, part.name if isinstance(part, JointAttention) else "mlp")


def attention_site(stack: Stack, layer: int) -> Site:
    """The site of the attention of a parallel block."""
    return Site(stack.stream, stack.first_layer + layer, "attn")


def module_paths(part: Part) -> tuple[str, ...]:
    """The paths of the modules whose calls the cache answers."""
    if isinstance(part, Parallel):
        return part.attention, part.fc1, part.fc2
    return (part.module,)


@dataclass(frozen=True)
class Binding:
    """A description and the parts of it that a transformer has.

    Attributes:
        spec: the description.
        parts: for each stack and layer, the parts that are there.
    """

    spec: ModelSpec
    parts: Mapping[str, tuple[tuple[Part, ...], ...]]

    def blocks(self, transformer: nn.Module) -> Iterator[tuple[Stack, int, nn.Module]]:
        """All described blocks in the order in which they run."""
        for stack in self.spec.stacks:
            for layer, block in enumerate(list_blocks(stack, resolve(transformer, stack.path))):
                yield stack, layer, block

    def depth(self, stack: Stack) -> int:
        """The number of blocks of a stack."""
        return len(self.parts[stack.path])

    @property
    def num_layers(self) -> int:
        """The most layers that the sites of one stream have."""
        return max(stack.first_layer + self.depth(stack) for stack in self.spec.stacks)

    def sites(self, stack: Stack, layer: int) -> tuple[Site, ...]:
        """The sites of a block, in the order in which they are computed."""
        sites: list[Site] = []
        for part in self.parts[stack.path][layer]:
            if isinstance(part, Parallel):
                sites.append(attention_site(stack, layer))
            sites.append(site_of(stack, part, layer))
        return tuple(sites)

    def groups(
        self, tokens: Mapping[str, int], grid: tuple[int, int] | None, scores_late: bool
    ) -> tuple[LayerGroup, ...]:
        """The cached modules by groups of layers.

        Args:
            tokens: the length of each stream.
            grid: how the image's tokens lie, or None.
            scores_late: whether cross-attention changes the scores within a step.
        """
        groups: list[LayerGroup] = []
        for stack in self.spec.stacks:
            layers = self.parts[stack.path]
            # the streams in which an earlier part already selects tokens
            selected: set[str] = set()
            for part in stack.parts:
                with_part = [
                    layer for layer, held in enumerate(layers) if any(one is part for one in held)
                ]
                if not with_part:
                    continue
                sites = tuple(site_of(stack, part, layer) for layer in with_part)
                if isinstance(part, Parallel):
                    count = _count(stack, stack.streams[0], tokens)
                    attention = tuple(attention_site(stack, layer) for layer in with_part)
                    groups.append(LayerGroup(attention, count, is_whole=True, read_by="mlp"))
                    groups.append(LayerGroup(sites, count))
                    continue
                if isinstance(part, JointAttention):
                    streams = part.image.stream, part.text.stream
                    count = sum(_count(stack, stream, tokens) for stream in streams)
                    groups.append(LayerGroup(sites, count, is_whole=True))
                    continue
                count = _count(stack, part.stream, tokens)
                is_whole = isinstance(part, SelfAttention) and not part.splits
                is_mlp = isinstance(part, Mlp)
                groups.append(
                    LayerGroup(
                        sites, count,
                        grid=grid if grid is not None and grid[0] * grid[1] == count else None,
                        selects_late=scores_late and is_mlp and part.stream in selected,
                        is_whole=is_whole,
                        shares_scores=is_mlp and part.stream in selected,
                    )
                )  # fmt: skip
                if not is_whole:
                    selected.add(part.stream)
        return tuple(groups)

    def scored_sites(self, stack: Stack, layer: int, stream: str) -> list[Site]:
        """The sites whose tokens are selected by the scores of a stream's tokens."""
        return [
            site_of(stack, part, layer)
            for part in self.parts[stack.path][layer]
            if isinstance(part, (Mlp, CrossAttention))
            or (isinstance(part, SelfAttention) and part.splits)
            if part.stream == stream
        ]

    @property
    def has_cross_attention(self) -> bool:
        """Tell whether some block attends to a text apart from the image."""
        return any(
            isinstance(part, CrossAttention) for stack in self.spec.stacks for part in stack.parts
        )


def _count(stack: Stack, stream: str, tokens: Mapping[str, int]) -> int:
    """The tokens of a stream as the blocks of a stack see it."""
    if stack.joins or stack.holds_all or stream == JOINT:
        return sum(tokens.values())
    return tokens[stream]


def bind(spec: ModelSpec, transformer: nn.Module) -> Binding:
    """Find the described parts in a transformer.

    Raises:
        UnsupportedInputError: the transformer lacks a part that the description names.
    """
    parts: dict[str, tuple[tuple[Part, ...], ...]] = {}
    counts: dict[str, int] = {}
    stacks = []
    for stack in spec.stacks:
        found = _resolve_or_refuse(spec, transformer, stack.path, "the transformer")
        blocks = list_blocks(stack, found)
        stacks.append(replace(stack, first_layer=counts.get(stack.stream, 0)))
        counts[stack.stream] = counts.get(stack.stream, 0) + len(blocks)
        if len(blocks) == 0:
            raise UnsupportedInputError(
                f"apply_token_cache: {spec.transformer} must have blocks in {stack.path}, got none"
            )
        parts[stack.path] = tuple(
            tuple(
                part
                for part in stack.parts
                if all(
                    _resolve_or_refuse(spec, block, path, f"block {layer} of {stack.path}")
                    is not None
                    for path in module_paths(part)
                )
            )
            for layer, block in enumerate(blocks)
        )
        for layer, held in enumerate(parts[stack.path]):
            if not held:
                raise UnsupportedInputError(
                    f"apply_token_cache: block {layer} of {stack.path} must have one of the "
                    f"described parts, got a {type(blocks[layer]).__name__} without any"
                )
    return Binding(replace(spec, stacks=tuple(stacks)), parts)


def list_blocks(stack: Stack, found: Any) -> list[Any]:
    """The blocks of a stack, from what lies at its path: a list, or a single block."""
    blocks = list(found) if isinstance(found, (nn.ModuleList, nn.Sequential)) else [found]
    return [resolve(block, stack.block) for block in blocks] if stack.block else blocks


def _resolve_or_refuse(spec: ModelSpec, module: Any, path: str, where: str) -> Any:
    try:
        return resolve(module, path)
    except (AttributeError, IndexError, TypeError) as error:
        raise UnsupportedInputError(
            f"apply_token_cache: the description of {spec.transformer} must fit the model, got no "
            f"{path} in {where}"
        ) from error
