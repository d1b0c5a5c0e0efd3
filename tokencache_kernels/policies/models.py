"""Models with a published setting: their shape at any size, and the published code's memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..errors import fail
from .shapes import ModelShape, dit_shape, flux_shape, opensora_shape, pixart_shape
from .toca import PUBLISHED_LAYERS


@dataclass(frozen=True)
class PublishedCode:
    """The work and memory of ToCa's published code beside the output of every sub-layer.

    Attributes:
        mapped: the modules whose attention map it makes in full steps, for every head; the prompts
            of a batch are joined, so that a token has the keys of all of them.
        keeps_maps: whether it keeps each layer's map, averaged over the heads, or only the mean
            that each key receives.
        unread_width: the hidden features of a single block's MLP, kept though nothing reads them.
        computes: the other arguments that tell its shape from ours.
    """

    mapped: tuple[str, ...]
    keeps_maps: bool = True
    unread_width: int = 0
    computes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A model by name, for a picture of any size.

    Attributes:
        preset: ToCa's published setting, as ``ToCaConfig.preset`` names it.
        build: its shape, from ``batch``, ``image_tokens`` and where it reads text ``text_tokens``.
        preset_layers: the depth over which the preset's ratio changes.
        size: (height, width) of the picture in pixels, where no other is asked for.
        pixels_per_token: the side of the square that is one token.
        dtype: the one that the published code runs in.
        reads_text: whether its tokens attend to a text of any length.
        published: the deviations of the published code, if there is one.
    """

    preset: str
    build: Callable[..., ModelShape]
    preset_layers: int = PUBLISHED_LAYERS
    size: tuple[int, int] = (256, 256)
    # a latent is 8 times smaller than its picture, and a token is 2 x 2 of it
    pixels_per_token: int = 16
    dtype: str = "float32"
    reads_text: bool = False
    published: PublishedCode | None = None

    def shape(
        self,
        *,
        height: int | None = None,
        width: int | None = None,
        text_tokens: int | None = None,
        batch: int | None = None,
        as_published: bool = False,
    ) -> ModelShape:
        """The shape for a picture and a batch as the network sees it, ours or the published code's.

        Raises:
            ValueError: there is no such picture, text or batch; the message is one sentence.
        """
        sizes = {
            "height": self.size[0] if height is None else height,
            "width": self.size[1] if width is None else width,
        }
        for name, pixels in sizes.items():
            if pixels < 1 or pixels % self.pixels_per_token:
                wanted = f"be a positive multiple of {self.pixels_per_token}"
                fail("Model.shape", name, wanted, pixels)
        counts = {"text_tokens": text_tokens, "batch": batch}
        given = {name: count for name, count in counts.items() if count is not None}
        if "text_tokens" in given and not self.reads_text:
            fail("Model.shape", "text_tokens", "be left out where no text is read", text_tokens)
        for name, count in given.items():
            if count < 1:
                fail("Model.shape", name, "be at least 1", count)
        image_tokens = sizes["height"] * sizes["width"] // self.pixels_per_token**2
        extra = self.published.computes if as_published and self.published else {}
        return self.build(image_tokens=image_tokens, **given, **extra)


MODELS = {
    "dit-xl": Model("dit-xl-ddim50", dit_shape, published=PublishedCode(("attn",))),
    "pixart-alpha": Model(
        "pixart-alpha",
        pixart_shape,
        dtype="float16",
        reads_text=True,
        published=PublishedCode(("attn", "cross")),
    ),
    "opensora": Model(
        "opensora",
        opensora_shape,
        size=(480, 848),
        dtype="bfloat16",
        reads_text=True,
        published=PublishedCode(("cross",)),
    ),
    "flux-1-dev": Model(
        "flux-1-dev",
        flux_shape,
        size=(1024, 1024),
        dtype="bfloat16",
        reads_text=True,
        published=PublishedCode(
            ("attn",), keeps_maps=False, unread_width=12288, computes={"projects_again": True}
        ),
    ),
    "demo": Model(
        "dit-xl-ddim50",
        partial(dit_shape, num_layers=6, hidden=128, heads=4, mlp=512),
        preset_layers=6,
        size=(32, 32),
        pixels_per_token=2,
    ),
}
# every model for the picture that is its own
SHAPES = {name: model.shape() for name, model in MODELS.items()}


def published_cache_bytes(
    published: PublishedCode, shape: ModelShape, element_size: int
) -> dict[str, int]:
    """Count the bytes of ToCa's published code for one batch, by their use.

    ``features``, ``staleness`` and ``scores`` as in ``cache_bytes``, with the kept means of
    attention maps as scores; ``maps``: the map of one layer while a full step is under way.
    """
    features = staleness = scores = maps = 0
    for stack in shape.stacks:
        for module in stack.modules:
            rows = shape.batch * module.num_tokens
            layers = stack.num_layers * rows
            is_unread = (stack.stream, module.name) == ("single", "mlp")
            width = shape.hidden + (published.unread_width if is_unread else 0)
            features += layers * width * element_size
            if module.name != "attn":
                staleness += layers * 4
            if module.name in published.mapped:
                keys = module.num_keys * (shape.batch if module.name == "cross" else 1)
                scores += layers * (keys if published.keeps_maps else 1) * element_size
                maps = max(maps, shape.heads * rows * keys * element_size)
    return {"features": features, "staleness": staleness, "scores": scores, "maps": maps}
