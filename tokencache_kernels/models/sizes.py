"""Sizes of models, and the published ones: with a description enough to count FLOPs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .spec import ModelSpec


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model of a described class.

    Attributes:
        layers: the number of blocks, by the path of their stack.
        hidden: D, the channels of a token.
        heads: of its attentions.
        mlp: the hidden features of an MLP; of a gated one those of each half.
        is_gated: whether its MLPs are gated.
        key_width: the channels of keys and values, if they are not D.
        embedding: the channels of the embedding that adaLN layers are given, if they are not D.
        vectors: the vectors that all layers make together, by the path of their source, where not
            every layer makes as many as the description says.
        only: the layers that have a part, by its path, where not all have it.
        extra: by stack, features that its attention projects from and to besides its own, for
            each token: an MLP inside of it.
        sees: by stack, whether self-attention sees the tokens of a frame, or those at the same
            place in all frames; all tokens where none is named.
        holds_text: whether the one stream of the blocks holds the text's tokens, too.
    """

    layers: Mapping[str, int]
    hidden: int
    heads: int
    mlp: int
    is_gated: bool = False
    key_width: int | None = None
    embedding: int | None = None
    vectors: Mapping[str, int] = field(default_factory=dict)
    only: Mapping[str, range] = field(default_factory=dict)
    extra: Mapping[str, int] = field(default_factory=dict)
    sees: Mapping[str, Literal["frame", "time"]] = field(default_factory=dict)
    holds_text: bool = False


@dataclass(frozen=True)
class PublishedCode:
    """The work and memory of ToCa's published code beside the output of every sub-layer.

    Attributes:
        mapped: the modules whose attention map it makes in full steps, for every head; the prompts
            of a batch are joined, so that a token has the keys of all of them.
        keeps_maps: whether it keeps each layer's map, averaged over the heads, or only the mean
            that each key receives.
        unread_width: the hidden features of a parallel block's MLP, kept though nothing reads them.
        projects_again: whether the attention of two streams is kept before its projection, which
            every step then computes for all tokens.
    """

    mapped: tuple[str, ...]
    keeps_maps: bool = True
    unread_width: int = 0
    projects_again: bool = False


@dataclass(frozen=True)
class Published:
    """A published model: a description with its sizes, for a picture or a video of any size.

    Attributes:
        name: the one that ``tokencache plan`` takes.
        spec: the description.
        sizes: the published ones.
        batch: the rows of a forward; guidance doubles it.
        height: of the picture in pixels, where no other is asked for.
        width: as ``height``.
        frames: of the latents, where no other number is asked for.
        text_tokens: the length of the prompt, where no other is asked for; 0: none is read.
        pixels_per_token: the side of the square that is one token.
        dtype: the one that the published code runs in.
        parameters: of the transformer; 0: not counted.
        preset: ToCa's published setting, as ``ToCaConfig.preset`` names it; empty: there is none.
        preset_layers: the depth over which the preset's ratio changes.
        code: the deviations of ToCa's published code, if there is one.
    """

    name: str
    spec: ModelSpec
    sizes: Sizes
    batch: int = 1
    height: int = 1024
    width: int = 1024
    frames: int = 1
    text_tokens: int = 0
    # a latent is 8 times smaller than its picture, and a token is 2 x 2 of it
    pixels_per_token: int = 16
    dtype: str = "bfloat16"
    parameters: int = 0
    preset: str = ""
    preset_layers: int = 28
    code: PublishedCode | None = None
