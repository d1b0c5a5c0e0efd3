"""Descriptions of the models that people run, by the name of the transformer's class."""

from . import dit, flux, hunyuan_video, opensora, others, pixart, qwen_image, sd3, wan
from .dit import DIT
from .flux import CHROMA, FLUX, FLUX2
from .hunyuan_video import HUNYUAN_VIDEO, HUNYUAN_VIDEO_15
from .opensora import STDIT3
from .others import COGVIDEOX, KREA2, LATTE, LTX, LTX2, LUMINA2, Z_IMAGE
from .pixart import PIXART
from .qwen_image import QWEN_IMAGE
from .sd3 import SD3
from .sizes import Published, PublishedCode, Sizes
from .spec import (
    FEED_FORWARD,
    JOINT,
    NO_NORM,
    Branch,
    CrossAttention,
    Grid,
    JointAttention,
    Layers,
    Mlp,
    ModelSpec,
    Modulation,
    Norm,
    Parallel,
    SelfAttention,
    Skip,
    Stack,
    Vectors,
    find_refusal,
)
from .uvit import UTRANSFORMER, UVIT
from .wan import WAN

SPECS: dict[str, ModelSpec] = {
    spec.transformer: spec
    for spec in (
        CHROMA, COGVIDEOX, DIT, FLUX, FLUX2, HUNYUAN_VIDEO, HUNYUAN_VIDEO_15, KREA2, LATTE, LTX,
        LTX2, LUMINA2, PIXART, QWEN_IMAGE, SD3, STDIT3, UTRANSFORMER, UVIT, WAN,
        Z_IMAGE,
    )
}  # fmt: skip
PUBLISHED: dict[str, Published] = {
    one.name: one
    for one in (
        *dit.PUBLISHED, *pixart.PUBLISHED, opensora.PUBLISHED, *flux.PUBLISHED, *sd3.PUBLISHED,
        *qwen_image.PUBLISHED, *wan.PUBLISHED, *hunyuan_video.PUBLISHED, *others.PUBLISHED,
    )
}  # fmt: skip
# models whose MLPs are no functions of single tokens, or are chosen per token
UNSUPPORTED: dict[str, str] = {
    "SanaTransformer2DModel": "the MLP has a convolution: tokens depend on their neighbours",
    "SanaVideoTransformer3DModel": "the MLP has a convolution: tokens depend on their neighbours",
    "HiDreamImageTransformer2DModel": "the MLP is a mixture of experts that are chosen by token",
}

__all__ = [
    "FEED_FORWARD",
    "JOINT",
    "NO_NORM",
    "PUBLISHED",
    "SPECS",
    "UNSUPPORTED",
    "Branch",
    "CrossAttention",
    "Grid",
    "JointAttention",
    "Layers",
    "Mlp",
    "ModelSpec",
    "Modulation",
    "Norm",
    "Parallel",
    "Published",
    "PublishedCode",
    "SelfAttention",
    "Sizes",
    "Skip",
    "Stack",
    "Vectors",
    "find_refusal",
]
