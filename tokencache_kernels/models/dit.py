"""DiT (arXiv:2212.09748): one stream of image tokens, conditioned by class and timestep."""

from .spec import Grid, Mlp, ModelSpec, Modulation, Norm, SelfAttention, Stack, Vectors

DIT = ModelSpec(
    transformer="DiTTransformer2DModel",
    stacks=(
        Stack(
            "transformer_blocks",
            parts=(
                SelfAttention(
                    "attn1",
                    splits=True,
                    norm=Norm("norm1.norm"),
                    modulation=Modulation("adaln", 0, 1, 2),
                ),
                Mlp("ff", norm=Norm("norm3"), modulation=Modulation("adaln", 3, 4, 5)),
            ),
            vectors=(Vectors("adaln", "own_adaln", "norm1"),),
        ),
    ),
    conditioning=("class_labels",),
    grid=Grid(),
    modulated_by=("class_labels",),
)
