"""DiT (arXiv:2212.09748): one stream of image tokens, conditioned by class and timestep."""

from .sizes import Published, PublishedCode, Sizes
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

PUBLISHED = (
    Published(
        "dit-xl", DIT, Sizes({"transformer_blocks": 28}, 1152, 16, 4608),
        batch=2, height=256, width=256, dtype="float32", parameters=749_826_464,
        preset="dit-xl-ddim50", code=PublishedCode(("attn",)),
    ),
    # the model of tokencache_kernels.demo, on latents of 32 x 32
    Published(
        "demo", DIT, Sizes({"transformer_blocks": 6}, 128, 4, 512),
        batch=2, height=32, width=32, pixels_per_token=2, dtype="float32", preset="dit-xl-ddim50",
        preset_layers=6,
    ),
)  # fmt: skip
