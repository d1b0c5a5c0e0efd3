"""Stable Diffusion 3 and 3.5 (arXiv:2403.03206): two streams, some blocks with two attentions."""

from ._joint import joint_parts
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
