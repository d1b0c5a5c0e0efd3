"""FLUX.1: blocks of two streams for image and text, then parallel blocks of one; and its kin."""

from dataclasses import replace

from ._joint import joint_parts
from .sizes import Published, PublishedCode, Sizes
from .spec import (
    Layers,
    Mlp,
    ModelSpec,
    Modulation,
    Norm,
    Parallel,
    SelfAttention,
    Stack,
    Vectors,
)

_PASSES = {"image_rotary_emb": "image_rotary_emb"}
_STREAMS = ("hidden_states", "encoder_hidden_states")
_RETURNS = ("encoder_hidden_states", "hidden_states")

_DOUBLE = Stack(
    "transformer_blocks",
    parts=joint_parts(passes=_PASSES),
    stream="double",
    streams=_STREAMS,
    returns=_RETURNS,
    vectors=(Vectors("image", "adaln", "norm1"), Vectors("text", "adaln", "norm1_context")),
    clips_float16=("encoder_hidden_states",),
)
_SINGLE = Stack(
    "single_transformer_blocks",
    parts=(
        Parallel(norm=Norm("norm.norm"), modulation=Modulation("joint", 0, 1, 2), passes=_PASSES),
    ),
    stream="single",
    streams=_STREAMS,
    returns=_RETURNS,
    joins=True,
    vectors=(Vectors("joint", "adaln", "norm", count=3),),
    clips_float16=("hidden_states",),
)

FLUX = ModelSpec(
    transformer="FluxTransformer2DModel",
    stacks=(_DOUBLE, _SINGLE),
    conditioning=("encoder_hidden_states", "pooled_projections"),
    modulated_by=("pooled_projections", "guidance"),
    timestep_divisor=1000,
    embedders=("time_text_embed",),
    norm_out="norm_out",
)

# an approximator makes the vectors of all blocks; each is given its own
CHROMA = ModelSpec(
    transformer="ChromaTransformer2DModel",
    stacks=(
        replace(
            _DOUBLE,
            vectors=(
                Vectors("image", "argument", count=6),
                Vectors("text", "argument", count=6, start=6),
            ),
        ),
        replace(
            _SINGLE,
            streams=("hidden_states",),
            returns=("hidden_states",),
            joins=False,
            holds_all=True,
            vectors=(Vectors("joint", "argument", count=3),),
        ),
    ),
    timestep_divisor=1000,
    embedders=("distilled_guidance_layer",),
)

_SWIGLU = Layers("linear_in", "linear_out", "silu", glu="gate_first")

# its parallel blocks have one product for queries, keys, values and MLP: reused as a whole
FLUX2 = ModelSpec(
    transformer="Flux2Transformer2DModel",
    stacks=(
        replace(
            _DOUBLE,
            parts=tuple(
                replace(part, layers=_SWIGLU) if isinstance(part, Mlp) else part
                for part in joint_parts(passes=_PASSES, norms=("norm1", "norm1_context"))
            ),
            vectors=(
                Vectors("image", "argument", argument="temb_mod_img"),
                Vectors("text", "argument", argument="temb_mod_txt"),
            ),
        ),
        Stack(
            "single_transformer_blocks",
            parts=(
                SelfAttention(
                    "attn",
                    norm=Norm("norm"),
                    modulation=Modulation("joint", 0, 1, 2),
                    passes=_PASSES,
                ),
            ),
            stream="single",
            holds_all=True,
            vectors=(Vectors("joint", "argument", argument="temb_mod", count=3),),
            clips_float16=("hidden_states",),
        ),
    ),
    modulated_by=("guidance",),
    timestep_divisor=1000,
    embedders=(
        "time_guidance_embed",
        "double_stream_modulation_img",
        "double_stream_modulation_txt",
        "single_stream_modulation",
    ),
    notes="single blocks are reused or computed as a whole",
)

_LAYERS = {"transformer_blocks": 19, "single_transformer_blocks": 38}
_SIZES = Sizes(_LAYERS, 3072, 24, 12288)
PUBLISHED = (
    Published(
        "flux-1-dev", FLUX, _SIZES, text_tokens=512, parameters=11_901_408_320,
        preset="flux-1-dev",
        code=PublishedCode(("attn",), False, unread_width=12288, projects_again=True),
    ),
    Published("chroma", CHROMA, _SIZES, text_tokens=512, parameters=8_899_983_424),
    Published(
        "flux-2-dev", FLUX2,
        Sizes(
            {"transformer_blocks": 8, "single_transformer_blocks": 48}, 6144, 48, 18432,
            is_gated=True, extra={"single_transformer_blocks": 18432},
        ),
        text_tokens=512, parameters=32_223_281_152,
    ),
)  # fmt: skip
