"""Tiny real models with random weights."""

from typing import Any

import torch
from torch import nn


def tiny_dit(num_layers: int = 3, seed: int = 0, **overrides: Any) -> Any:
    """A ``DiTTransformer2DModel``: 24 wide, 8 x 8 pictures of 2 channels, 4 x 4 = 16 tokens.

    All weights are random: a new DiT's own gates are small, which would hide mistakes.
    """
    from diffusers import DiTTransformer2DModel

    generator = torch.Generator().manual_seed(seed)
    shape = {
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "in_channels": 2,
        "out_channels": 2,
        "num_layers": num_layers,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 10,
        "norm_num_groups": 1,
    }
    model = DiTTransformer2DModel(**{**shape, **overrides})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15, generator=generator)
    return model.eval().requires_grad_(False)
