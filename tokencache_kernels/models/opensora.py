"""Open-Sora 1.2's STDiT3: spatial and temporal blocks by turns; the published sizes alone."""

from .sizes import Published, PublishedCode, Sizes
from .spec import CrossAttention, Mlp, ModelSpec, SelfAttention, Stack

_PARTS = SelfAttention("attn"), CrossAttention("cross_attn", is_plain=True), Mlp("mlp")
_SPEC = ModelSpec(
    transformer="STDiT3",
    stacks=(
        Stack("spatial_blocks", _PARTS, stream="spatial"),
        Stack("temporal_blocks", _PARTS, stream="temporal"),
    ),
)
# two seconds of video at 480p
PUBLISHED = Published(
    "opensora",
    _SPEC,
    Sizes(
        {"spatial_blocks": 28, "temporal_blocks": 28}, 1152, 16, 4608,
        sees={"spatial_blocks": "frame", "temporal_blocks": "time"},
    ),
    batch=2, height=480, width=848, frames=15, text_tokens=20, preset="opensora",
    code=PublishedCode(("cross",)),
)  # fmt: skip
