"""Qwen-Image and Qwen-Image-Edit: blocks of two streams with a modulation of their own each."""

from ._joint import joint_parts
from .sizes import Published, Sizes
from .spec import ModelSpec, Stack, Vectors

QWEN_IMAGE = ModelSpec(
    transformer="QwenImageTransformer2DModel",
    stacks=(
        Stack(
            "transformer_blocks",
            parts=joint_parts(
                norms=("img_norm1", "txt_norm1"),
                mlp_norms=("img_norm2", "txt_norm2"),
                mlps=("img_mlp", "txt_mlp"),
                passes={
                    "encoder_hidden_states_mask": "encoder_hidden_states_mask",
                    "image_rotary_emb": "image_rotary_emb",
                },
            ),
            stream="double",
            streams=("hidden_states", "encoder_hidden_states"),
            returns=("encoder_hidden_states", "hidden_states"),
            vectors=(
                # editing: tokens of the image that is edited have vectors of their own
                Vectors("image", "call", "img_mod", index="modulate_index"),
                Vectors("text", "call", "txt_mod"),
            ),
            clips_float16=("encoder_hidden_states", "hidden_states"),
        ),
    ),
    conditioning=("encoder_hidden_states", "encoder_hidden_states_mask"),
    modulated_by=("guidance", "additional_t_cond"),
    timestep_divisor=1000,
    embedders=("time_text_embed",),
    norm_out="norm_out",
)

PUBLISHED = (
    Published(
        "qwen-image", QWEN_IMAGE, Sizes({"transformer_blocks": 60}, 3072, 24, 12288),
        text_tokens=512, parameters=20_430_401_088,
    ),
)  # fmt: skip
