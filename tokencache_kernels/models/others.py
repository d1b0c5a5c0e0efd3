"""Models whose blocks run as they are, around cached attention and MLPs.

Their norms are root mean squares, or lie in modules of their own; ``fused`` sub-layers of them are
not described.
"""

from .spec import (
    JOINT,
    Branch,
    CrossAttention,
    JointAttention,
    Mlp,
    ModelSpec,
    SelfAttention,
    Stack,
)

COGVIDEOX = ModelSpec(
    transformer="CogVideoXTransformer3DModel",
    stacks=(
        Stack(
            "transformer_blocks",
            parts=(
                JointAttention(
                    "attn1",
                    image=Branch("attn1", "attn", "hidden_states"),
                    text=Branch("attn1", "attn", "encoder_hidden_states"),
                ),
                Mlp("ff", stream=JOINT),
            ),
            streams=("hidden_states", "encoder_hidden_states"),
            returns=("hidden_states", "encoder_hidden_states"),
        ),
    ),
)

LTX = ModelSpec(
    transformer="LTXVideoTransformer3DModel",
    stacks=(
        Stack(
            "transformer_blocks",
            parts=(SelfAttention("attn1"), CrossAttention("attn2"), Mlp("ff")),
        ),
    ),
    conditioning=("encoder_hidden_states", "encoder_attention_mask"),
)

# the audio runs as it is, and so does attention between video and audio
LTX2 = ModelSpec(
    transformer="LTX2VideoTransformer3DModel",
    stacks=(
        Stack(
            "transformer_blocks",
            parts=(SelfAttention("attn1"), CrossAttention("attn2"), Mlp("ff")),
            streams=("hidden_states", "audio_hidden_states"),
            returns=("hidden_states", "audio_hidden_states"),
        ),
    ),
    conditioning=("encoder_hidden_states", "audio_encoder_hidden_states"),
    notes="audio is not cached",
)

LUMINA2 = ModelSpec(
    transformer="Lumina2Transformer2DModel",
    stacks=(Stack("layers", parts=(SelfAttention("attn"), Mlp("feed_forward"))),),
    conditioning=("encoder_hidden_states", "encoder_attention_mask"),
    time_rises=True,
)

Z_IMAGE = ModelSpec(
    transformer="ZImageTransformer2DModel",
    stacks=(
        Stack(
            "layers",
            parts=(SelfAttention("attention", stream="x"), Mlp("feed_forward", stream="x")),
            streams=("x",),
            returns=("x",),
        ),
    ),
    conditioning=("cap_feats",),
    latents="x",
    timestep="t",
    time_rises=True,
)

KREA2 = ModelSpec(
    transformer="Krea2Transformer2DModel",
    stacks=(Stack("transformer_blocks", parts=(SelfAttention("attn"), Mlp("ff"))),),
)

# attention over frames, in blocks of its own, runs as it is
LATTE = ModelSpec(
    transformer="LatteTransformer3DModel",
    stacks=(
        Stack(
            "transformer_blocks",
            parts=(SelfAttention("attn1"), CrossAttention("attn2"), Mlp("ff")),
        ),
    ),
    conditioning=("encoder_hidden_states", "encoder_attention_mask"),
    notes="temporal blocks are not cached",
)
