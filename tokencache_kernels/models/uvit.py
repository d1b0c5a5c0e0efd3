"""U-ViT (arXiv:2209.12152): tokens for class and time, and long skips between the blocks."""

from .spec import Layers, Mlp, ModelSpec, Norm, SelfAttention, Skip, Stack

_PARTS = (
    SelfAttention("attn", stream="x", norm=Norm("norm1")),
    Mlp("mlp", stream="x", norm=Norm("norm2"), layers=Layers("fc1", "fc2", "gelu")),
)

# by the names of the published checkpoints
UVIT = ModelSpec(
    transformer="UViT",
    stacks=(
        Stack("in_blocks", _PARTS, streams=("x",), returns=("x",), is_seen=True),
        Stack("mid_block", _PARTS, streams=("x",), returns=("x",)),
        Stack(
            "out_blocks",
            _PARTS,
            streams=("x",),
            returns=("x",),
            skip=Skip("skip", "skip_linear"),
        ),
    ),
    conditioning=("y",),
    latents="x",
    timestep="timesteps",
)

# diffusers' blocks have their norms in several places, and are not fused
_TRUNK = (SelfAttention("attn1"), Mlp("ff"))
UTRANSFORMER = ModelSpec(
    transformer="UTransformer2DModel",
    stacks=(
        Stack("transformer_in_blocks", _TRUNK, is_seen=True),
        Stack("transformer_mid_block", _TRUNK, is_seen=True),
        Stack("transformer_out_blocks", _TRUNK, block="block", is_seen=True),
    ),
)
