"""Open-Sora's STDiT3: blocks within and across frames in turns, by the checkpoint's names."""

from typing import Literal

from .sizes import Published, PublishedCode, Sizes
from .spec import (
    NO_NORM,
    CrossAttention,
    Grid,
    Layers,
    Mlp,
    ModelSpec,
    Modulation,
    Norm,
    SelfAttention,
    Stack,
    Vectors,
)


def _stack(stream: str, folds: Literal["frames", "places"]) -> Stack:
    return Stack(
        f"{stream}_blocks",
        parts=(
            SelfAttention(
                "attn",
                stream="x",
                norm=Norm("norm1"),
                modulation=Modulation("table", 0, 1, 2),
                passes={"frames": "frames", "angles": "angles"},
                folds=folds,
            ),
            CrossAttention(
                "cross_attn",
                stream="x",
                norm=NO_NORM,
                passes={"text": "text", "mask": "mask"},
                text="text",
            ),
            Mlp(
                "mlp",
                stream="x",
                norm=Norm("norm2"),
                modulation=Modulation("table", 3, 4, 5),
                layers=Layers("fc1", "fc2", "gelu_tanh"),
            ),
        ),
        stream=stream,
        streams=("x",),
        returns=("x",),
        vectors=(Vectors("table", "table", "scale_shift_table", argument="vectors"),),
    )


STDIT3 = ModelSpec(
    transformer="STDiT3",
    # spatial block l is followed by temporal block l
    stacks=(_stack("spatial", "frames"), _stack("temporal", "places")),
    conditioning=("y", "mask"),
    latents="x",
    grid=Grid(patch=2, is_video=True),
    text_mask="mask",
)
# two seconds of video at 480p
PUBLISHED = Published(
    "opensora",
    STDIT3,
    Sizes(
        {"spatial_blocks": 28, "temporal_blocks": 28}, 1152, 16, 4608,
        sees={"spatial_blocks": "frame", "temporal_blocks": "time"},
    ),
    batch=2, height=480, width=848, frames=15, text_tokens=20, preset="opensora",
    code=PublishedCode(("cross",)),
)  # fmt: skip
