"""Shapes of models as data: enough to count FLOPs and bytes without running a model.

A multiply-add is 2 FLOPs; layer norm counts 1, softmax 5 and GELU 6 per element, as in the
published counters. Embeddings, modulation and the final layer are left out, as are gates and
residual sums.
"""

from dataclasses import dataclass

from .decisions import Action, Decision


@dataclass(frozen=True)
class ModuleShape:
    """One cached module of every layer of a stack; FLOPs are those of one sample."""

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
            stack.num_layers * sum(module.flops_full for module in stack.modules)
            for stack in self.stacks
        )


def dit_shape(
    *,
    batch: int = 2,
    num_layers: int = 28,
    hidden: int = 1152,
    heads: int = 16,
    mlp: int = 4608,
    image_tokens: int = 256,
) -> ModelShape:
    """A DiT: self-attention and MLP."""
    modules = (
        _self_attention(hidden, heads, image_tokens, image_tokens, is_whole=False),
        _mlp("mlp", hidden, mlp, image_tokens),
    )
    return ModelShape(
        batch, hidden, heads, image_tokens, (StackShape("main", num_layers, modules),)
    )


def pixart_shape(
    *,
    batch: int = 2,
    num_layers: int = 28,
    hidden: int = 1152,
    heads: int = 16,
    mlp: int = 4608,
    image_tokens: int = 256,
    text_tokens: int = 20,
) -> ModelShape:
    """A PixArt: self-attention, cross-attention and MLP.

    The default length of the prompt is the one that published totals imply.
    """
    modules = (
        _self_attention(hidden, heads, image_tokens, image_tokens),
        _cross_attention(hidden, heads, image_tokens, text_tokens),
        _mlp("mlp", hidden, mlp, image_tokens),
    )
    return ModelShape(
        batch, hidden, heads, image_tokens, (StackShape("main", num_layers, modules),)
    )


def opensora_shape(
    *,
    batch: int = 2,
    num_layers: int = 28,
    hidden: int = 1152,
    heads: int = 16,
    mlp: int = 4608,
    frames: int = 15,
    image_tokens: int = 1590,
    text_tokens: int = 20,
) -> ModelShape:
    """An STDiT3: as many spatial as temporal blocks, each with cross-attention and MLP.

    ``image_tokens`` are those of a frame; the default number of frames is that of two seconds.
    """
    num_tokens = frames * image_tokens
    stacks = tuple(
        StackShape(
            stream,
            num_layers,
            (
                _self_attention(hidden, heads, num_tokens, num_keys),
                _cross_attention(hidden, heads, num_tokens, text_tokens),
                _mlp("mlp", hidden, mlp, num_tokens),
            ),
        )
        for stream, num_keys in (("spatial", image_tokens), ("temporal", frames))
    )
    return ModelShape(batch, hidden, heads, num_tokens, stacks)


def flux_shape(
    *,
    batch: int = 1,
    num_double: int = 19,
    num_single: int = 38,
    hidden: int = 3072,
    heads: int = 24,
    mlp: int = 12288,
    image_tokens: int = 4096,
    text_tokens: int = 512,
    projects_again: bool = False,
) -> ModelShape:
    """A FLUX: double blocks with an MLP for image and text each, and single blocks.

    The MLP of a single block is its share of the first projection and all of the second, which also
    projects the attention. ``projects_again``: published ToCa caches the attention of double blocks
    before its projection, and so projects every token in every step.
    """
    num_tokens = image_tokens + text_tokens
    project = 2 * hidden * hidden
    double = (
        _self_attention(
            hidden, heads, num_tokens, num_tokens,
            flops_always=num_tokens * project if projects_again else 0,
        ),
        _mlp("mlp", hidden, mlp, image_tokens),
        _mlp("text_mlp", hidden, mlp, text_tokens),
    )  # fmt: skip
    single = (
        _self_attention(hidden, heads, num_tokens, num_tokens, projects_output=False),
        _mlp("mlp", hidden, mlp, num_tokens, extra_per_token=project),
    )
    stacks = (StackShape("double", num_double, double), StackShape("single", num_single, single))
    return ModelShape(batch, hidden, heads, image_tokens, stacks)


def _self_attention(
    hidden: int,
    heads: int,
    num_tokens: int,
    num_keys: int,
    projects_output: bool = True,
    flops_always: int = 0,
    is_whole: bool = True,
) -> ModuleShape:
    per_fresh = (4 if projects_output else 2) * hidden * hidden
    per_key = hidden + 4 * hidden * hidden
    per_pair = 4 * hidden + 5 * heads
    flops_full = num_tokens * (per_fresh + per_key + num_keys * per_pair)
    return ModuleShape(
        "attn", num_tokens, flops_full, num_keys, per_fresh, flops_always=flops_always,
        flops_per_key=per_key, flops_per_pair=per_pair, read_by=None if projects_output else "mlp",
        is_whole=is_whole,
    )  # fmt: skip


def _cross_attention(hidden: int, heads: int, num_tokens: int, text_tokens: int) -> ModuleShape:
    per_token = 4 * hidden * hidden + 4 * text_tokens * hidden + 5 * heads * text_tokens
    keys_and_values = 4 * hidden * hidden * text_tokens
    return ModuleShape(
        "cross", num_tokens, num_tokens * per_token + keys_and_values, text_tokens, per_token,
        keys_and_values,
    )  # fmt: skip


def _mlp(
    name: str, hidden: int, mlp: int, num_tokens: int, extra_per_token: int = 0
) -> ModuleShape:
    per_token = hidden + 4 * hidden * mlp + 6 * mlp + extra_per_token
    return ModuleShape(name, num_tokens, num_tokens * per_token, flops_per_fresh=per_token)
