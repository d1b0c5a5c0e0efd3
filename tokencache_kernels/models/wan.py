"""Wan 2.1 and 2.2: video, one stream, self-attention, cross-attention to a text, MLP."""

from .sizes import Published, Sizes
from .spec import (
    CrossAttention,
    Grid,
    Mlp,
    ModelSpec,
    Modulation,
    Norm,
    SelfAttention,
    Stack,
    Vectors,
)

WAN = ModelSpec(
    transformer="WanTransformer3DModel",
    stacks=(
        Stack(
            "blocks",
            parts=(
                SelfAttention(
                    "attn1",
                    norm=Norm("norm1"),
                    modulation=Modulation("table", 0, 1, 2),
                    passes={"rotary_emb": "rotary_emb"},
                ),
                CrossAttention(
                    "attn2",
                    norm=Norm("norm2"),
                    passes={"encoder_hidden_states": "encoder_hidden_states"},
                ),
                Mlp("ffn", norm=Norm("norm3"), modulation=Modulation("table", 3, 4, 5)),
            ),
            vectors=(Vectors("table", "table", "scale_shift_table"),),
        ),
    ),
    conditioning=("encoder_hidden_states", "encoder_hidden_states_image"),
    grid=Grid(is_video=True),
    embedders=("condition_embedder.time_embedder", "condition_embedder.time_proj"),
)

# 480p, of five seconds
PUBLISHED = (
    Published(
        "wan-2.1-14b", WAN, Sizes({"blocks": 40}, 5120, 40, 13824),
        height=480, width=832, frames=21, text_tokens=512, parameters=14_288_491_584,
    ),
    Published(
        "wan-2.1-1.3b", WAN, Sizes({"blocks": 30}, 1536, 12, 8960),
        height=480, width=832, frames=21, text_tokens=512, parameters=1_418_996_800,
    ),
)  # fmt: skip
