"""Tiny real models with random weights.

Other projects import it from here: the path stays.
"""

from typing import Any

import torch
from torch import nn


def tiny_dit(num_layers: int = 3, seed: int = 0, **overrides: Any) -> Any:
    """A ``DiTTransformer2DModel``: 24 wide, 8 x 8 images of 2 channels, 4 x 4 = 16 tokens.

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


def tiny_flux(num_double: int = 2, num_single: int = 3, seed: int = 0, **overrides: Any) -> Any:
    """A ``FluxTransformer2DModel``: 2 heads of 12, packed latents of 4 channels, text of 10.

    All weights are random, as in ``tiny_dit``; those of the norms of queries and keys are near 1,
    so that attention is not nearly uniform.
    """
    from diffusers import FluxTransformer2DModel

    generator = torch.Generator().manual_seed(seed)
    shape = {
        "in_channels": 4,
        "num_layers": num_double,
        "num_single_layers": num_single,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "joint_attention_dim": 10,
        "pooled_projection_dim": 6,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 4),
    }
    model = FluxTransformer2DModel(**{**shape, **overrides})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.weight.data += 1
    return model.eval().requires_grad_(False)


def tiny_pixart(num_layers: int = 3, seed: int = 0, **overrides: Any) -> Any:
    """A ``PixArtTransformer2DModel``: 24 wide, 8 x 8 latents of 2 channels, text of 10 channels.

    All weights are random, as in ``tiny_dit``; queries and keys of the cross-attention are larger,
    so that its map is far from uniform.
    """
    from diffusers import PixArtTransformer2DModel

    generator = torch.Generator().manual_seed(seed)
    shape = {
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "in_channels": 2,
        "out_channels": 4,
        "num_layers": num_layers,
        "sample_size": 8,
        "cross_attention_dim": 24,
        "caption_channels": 10,
    }
    model = PixArtTransformer2DModel(**{**shape, **overrides})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15, generator=generator)
    for block in model.transformer_blocks:
        block.attn2.to_q.weight.data *= 3
        block.attn2.to_k.weight.data *= 3
    return model.eval().requires_grad_(False)
