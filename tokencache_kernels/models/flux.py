"""FLUX.1: blocks of two streams for image and text, then parallel blocks of one."""

from .spec import Branch, JointAttention, Mlp, ModelSpec, Modulation, Norm, Parallel, Stack, Vectors

_PASSES = {"image_rotary_emb": "image_rotary_emb"}

DOUBLE_PARTS = (
    JointAttention(
        "attn",
        image=Branch(
            "attn", "attn", "hidden_states", Norm("norm1.norm"), Modulation("image", 0, 1, 2)
        ),
        text=Branch(
            "attn", "attn", "encoder_hidden_states", Norm("norm1_context.norm"),
            Modulation("text", 0, 1, 2),
        ),
        passes=_PASSES,
    ),
    Mlp("ff", norm=Norm("norm2"), modulation=Modulation("image", 3, 4, 5)),
    Mlp(
        "ff_context", "text_mlp", "encoder_hidden_states", Norm("norm2_context"),
        Modulation("text", 3, 4, 5),
    ),
)  # fmt: skip

FLUX = ModelSpec(
    transformer="FluxTransformer2DModel",
    stacks=(
        Stack(
            "transformer_blocks",
            parts=DOUBLE_PARTS,
            stream="double",
            streams=("hidden_states", "encoder_hidden_states"),
            returns=("encoder_hidden_states", "hidden_states"),
            vectors=(Vectors("image", "adaln", "norm1"), Vectors("text", "adaln", "norm1_context")),
            clips_float16=("encoder_hidden_states",),
        ),
        Stack(
            "single_transformer_blocks",
            parts=(
                Parallel(
                    norm=Norm("norm.norm"), modulation=Modulation("joint", 0, 1, 2), passes=_PASSES
                ),
            ),
            stream="single",
            streams=("hidden_states", "encoder_hidden_states"),
            returns=("encoder_hidden_states", "hidden_states"),
            joins=True,
            vectors=(Vectors("joint", "adaln", "norm", count=3),),
            clips_float16=("hidden_states",),
        ),
    ),
    conditioning=("encoder_hidden_states", "pooled_projections"),
)
