"""HunyuanVideo and HunyuanVideo 1.5: video, blocks of two streams; the text's tokens come last."""

from ._joint import joint_parts
from .sizes import Published, Sizes
from .spec import ModelSpec, Modulation, Norm, Parallel, Stack, Vectors

_STREAMS = ("hidden_states", "encoder_hidden_states")
_VECTORS = Vectors("image", "adaln", "norm1"), Vectors("text", "adaln", "norm1_context")
_DOUBLE = Stack(
    "transformer_blocks",
    parts=joint_parts(
        passes={"attention_mask": "attention_mask", "image_rotary_emb": "freqs_cis"},
        is_text_first=False,
    ),
    stream="double",
    streams=_STREAMS,
    returns=_STREAMS,
    vectors=_VECTORS,
)

HUNYUAN_VIDEO = ModelSpec(
    transformer="HunyuanVideoTransformer3DModel",
    stacks=(
        _DOUBLE,
        Stack(
            "single_transformer_blocks",
            parts=(
                Parallel(
                    norm=Norm("norm.norm"),
                    modulation=Modulation("joint", 0, 1, 2),
                    passes={
                        "attention_mask": "attention_mask",
                        "image_rotary_emb": "image_rotary_emb",
                    },
                    gives_pair=True,
                ),
            ),
            stream="single",
            streams=_STREAMS,
            returns=_STREAMS,
            joins=True,
            is_text_first=False,
            vectors=(Vectors("joint", "adaln", "norm", count=3),),
        ),
    ),
    conditioning=("encoder_hidden_states", "encoder_attention_mask", "pooled_projections"),
    modulated_by=("pooled_projections", "guidance"),
    embedders=("time_text_embed",),
    norm_out="norm_out",
)

HUNYUAN_VIDEO_15 = ModelSpec(
    transformer="HunyuanVideo15Transformer3DModel",
    stacks=(_DOUBLE,),
    conditioning=(
        "encoder_hidden_states",
        "encoder_attention_mask",
        "encoder_hidden_states_2",
        "encoder_attention_mask_2",
        "image_embeds",
    ),
    modulated_by=("timestep_r",),
    embedders=("time_embed",),
    norm_out="norm_out",
)

# 720p, of five seconds
PUBLISHED = (
    Published(
        "hunyuan-video", HUNYUAN_VIDEO,
        Sizes({"transformer_blocks": 20, "single_transformer_blocks": 40}, 3072, 24, 12288),
        height=720, width=1280, frames=33, text_tokens=256, parameters=12_821_012_544,
    ),
    Published(
        "hunyuan-video-1.5", HUNYUAN_VIDEO_15, Sizes({"transformer_blocks": 54}, 2048, 16, 8192),
        height=720, width=1280, frames=31, text_tokens=1000, parameters=8_326_608_160,
    ),
)  # fmt: skip
