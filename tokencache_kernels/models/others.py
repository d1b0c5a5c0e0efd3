"""Models with blocks of one stream, and some whose blocks run as they are."""

from .spec import (
    JOINT,
    NO_NORM,
    Branch,
    CrossAttention,
    JointAttention,
    Layers,
    Mlp,
    ModelSpec,
    Modulation,
    Norm,
    SelfAttention,
    Stack,
    Vectors,
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

_TABLE = Vectors("table", "table", "scale_shift_table")

LTX = ModelSpec(
    transformer="LTXVideoTransformer3DModel",
    stacks=(
        Stack(
            "transformer_blocks",
            parts=(
                SelfAttention(
                    "attn1",
                    norm=Norm("norm1", "rms"),
                    modulation=Modulation("table", 0, 1, 2),
                    passes={"image_rotary_emb": "image_rotary_emb"},
                ),
                CrossAttention(
                    "attn2",
                    norm=NO_NORM,
                    passes={
                        "encoder_hidden_states": "encoder_hidden_states",
                        "attention_mask": "encoder_attention_mask",
                    },
                ),
                Mlp("ff", norm=Norm("norm2", "rms"), modulation=Modulation("table", 3, 4, 5)),
            ),
            vectors=(_TABLE,),
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
    stacks=(
        Stack(
            "layers",
            parts=(
                SelfAttention(
                    "attn",
                    norm=Norm("norm1.norm", "rms"),
                    modulation=Modulation("adaln", scale=0, gate=1, gate_function="tanh"),
                    post_norm=Norm("norm2", "rms"),
                    passes={
                        "attention_mask": "attention_mask",
                        "image_rotary_emb": "image_rotary_emb",
                    },
                    also=("encoder_hidden_states",),
                ),
                Mlp(
                    "feed_forward",
                    norm=Norm("ffn_norm1", "rms"),
                    modulation=Modulation("adaln", scale=2, gate=3, gate_function="tanh"),
                    post_norm=Norm("ffn_norm2", "rms"),
                    layers=Layers("linear_3", "linear_2", "silu", gate="linear_1"),
                ),
            ),
            vectors=(Vectors("adaln", "adaln", "norm1", count=4),),
        ),
    ),
    conditioning=("encoder_hidden_states", "encoder_attention_mask"),
    time_rises=True,
)

Z_IMAGE = ModelSpec(
    transformer="ZImageTransformer2DModel",
    stacks=(
        Stack(
            "layers",
            parts=(
                SelfAttention(
                    "attention",
                    stream="x",
                    norm=Norm("attention_norm1", "rms"),
                    modulation=Modulation("adaln", scale=0, gate=1, gate_function="tanh"),
                    post_norm=Norm("attention_norm2", "rms"),
                    passes={"attention_mask": "attn_mask", "freqs_cis": "freqs_cis"},
                ),
                Mlp(
                    "feed_forward",
                    stream="x",
                    norm=Norm("ffn_norm1", "rms"),
                    modulation=Modulation("adaln", scale=2, gate=3, gate_function="tanh"),
                    post_norm=Norm("ffn_norm2", "rms"),
                    layers=Layers("w3", "w2", "silu", gate="w1"),
                ),
            ),
            streams=("x",),
            returns=("x",),
            vectors=(
                Vectors("adaln", "call", "adaLN_modulation", argument="adaln_input", count=4),
            ),
        ),
    ),
    conditioning=("cap_feats",),
    latents="x",
    timestep="t",
    time_rises=True,
)

KREA2 = ModelSpec(
    transformer="Krea2Transformer2DModel",
    stacks=(
        Stack(
            "transformer_blocks",
            parts=(
                SelfAttention(
                    "attn",
                    norm=Norm("norm1", "rms", plus_one=True),
                    modulation=Modulation("table", shift=1, scale=0, gate=2),
                    passes={
                        "attention_mask": "attention_mask",
                        "image_rotary_emb": "image_rotary_emb",
                    },
                ),
                Mlp(
                    "ff",
                    norm=Norm("norm2", "rms", plus_one=True),
                    modulation=Modulation("table", shift=4, scale=3, gate=5),
                    layers=Layers("up", "down", "silu", gate="gate"),
                ),
            ),
            vectors=(_TABLE,),
        ),
    ),
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
