"""Models with blocks of one stream, and some whose blocks run as they are."""

from .sizes import Published, Sizes
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
    timestep_divisor=1000,
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
    timestep_divisor=1000,
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

PUBLISHED = (
    Published(
        "cogvideox-5b", COGVIDEOX, Sizes({"transformer_blocks": 42}, 3072, 48, 12288),
        batch=2, height=480, width=720, frames=13, text_tokens=226, parameters=5_570_283_072,
    ),
    Published(
        "ltx-video", LTX, Sizes({"transformer_blocks": 28}, 2048, 32, 8192),
        batch=2, height=512, width=704, frames=21, text_tokens=128, pixels_per_token=32,
        parameters=1_923_385_472,
    ),
    Published(
        "lumina-2", LUMINA2,
        Sizes(
            {"layers": 26}, 2304, 24, 9216, is_gated=True, key_width=768, embedding=1024,
            holds_text=True,
        ),
        text_tokens=256, parameters=2_606_818_752,
    ),
    Published(
        "z-image", Z_IMAGE,
        Sizes({"layers": 30}, 3840, 30, 10240, is_gated=True, embedding=256, holds_text=True),
        text_tokens=512, parameters=6_154_908_736,
    ),
)  # fmt: skip
