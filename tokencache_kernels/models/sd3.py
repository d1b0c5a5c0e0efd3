"""Stable Diffusion 3 and 3.5 (arXiv:2403.03206): two streams, some blocks with two attentions."""

from ._joint import joint_parts
from .sizes import Published, Sizes
from .spec import Grid, ModelSpec, SelfAttention, Stack, Vectors

SD3 = ModelSpec(
    transformer="SD3Transformer2DModel",
    stacks=(
        Stack(
            "transformer_blocks",
            parts=(*joint_parts(passes={}), SelfAttention("attn2", site_stream="dual")),
            stream="double",
            streams=("hidden_states", "encoder_hidden_states"),
            returns=("encoder_hidden_states", "hidden_states"),
            vectors=(Vectors("image", "adaln", "norm1"), Vectors("text", "adaln", "norm1_context")),
        ),
    ),
    conditioning=("encoder_hidden_states", "pooled_projections"),
    grid=Grid(),
    modulated_by=("pooled_projections",),
    embedders=("time_text_embed",),
    norm_out="norm_out",
)

# the last block keeps no text
PUBLISHED = (
    Published(
        "sd3.5-large", SD3,
        Sizes(
            {"transformer_blocks": 38}, 2432, 38, 9728,
            only={"ff_context": range(37), "attn2": range(0)},
            vectors={"norm1_context": 37 * 6 + 2},
        ),
        batch=2, text_tokens=333, parameters=8_056_627_520,
    ),
    Published(
        "sd3.5-medium", SD3,
        Sizes(
            {"transformer_blocks": 24}, 1536, 24, 6144,
            only={"ff_context": range(23), "attn2": range(13)},
            vectors={"norm1": 13 * 9 + 11 * 6, "norm1_context": 23 * 6 + 2},
        ),
        batch=2, text_tokens=333, parameters=2_243_171_520,
    ),
)  # fmt: skip
