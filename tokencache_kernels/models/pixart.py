"""PixArt-alpha (arXiv:2310.00426) and -Sigma: one stream, with cross-attention to a text."""

from .sizes import Published, PublishedCode, Sizes
from .spec import (
    NO_NORM,
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

PIXART = ModelSpec(
    transformer="PixArtTransformer2DModel",
    stacks=(
        Stack(
            "transformer_blocks",
            parts=(
                SelfAttention(
                    "attn1",
                    norm=Norm("norm1"),
                    modulation=Modulation("table", 0, 1, 2),
                    passes={"attention_mask": "attention_mask"},
                ),
                CrossAttention("attn2", norm=NO_NORM, mask="encoder_attention_mask", is_plain=True),
                Mlp("ff", norm=Norm("norm2"), modulation=Modulation("table", 3, 4, 5)),
            ),
            vectors=(Vectors("table", "table", "scale_shift_table", argument="timestep"),),
        ),
    ),
    conditioning=("encoder_hidden_states", "encoder_attention_mask"),
    grid=Grid(),
    text_mask="encoder_attention_mask",
    modulated_by=("added_cond_kwargs",),
    embedders=("adaln_single",),
)

# the length of the prompt is the one that published totals imply
PUBLISHED = (
    Published(
        "pixart-alpha", PIXART, Sizes({"transformer_blocks": 28}, 1152, 16, 4608),
        batch=2, height=256, width=256, text_tokens=20, dtype="float16", parameters=610_856_096,
        preset="pixart-alpha", code=PublishedCode(("attn", "cross")),
    ),
)  # fmt: skip
