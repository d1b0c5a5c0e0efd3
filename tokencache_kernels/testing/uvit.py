"""U-ViT (arXiv:2209.12152) on latents with a class, under the names of the published checkpoints.

Written from the paper and from the names and shapes of the parameters; diffusers holds the trunk of
another variant only.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UViT(nn.Module):
    """A U-ViT: every token alike, and long skips from the first half of the blocks to the second.

    Args:
        image_size: height and width of the latents.
        patch_size: of the patches.
        in_channels: of the latents.
        width: D.
        depth: the blocks beside the middle one, an even number.
        num_heads: H.
        num_classes: the classes; the last one stands for none.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        in_channels: int,
        width: int,
        depth: int,
        num_heads: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        num_patches = (image_size // patch_size) ** 2
        self.patch_embed = _PatchEmbed(patch_size, in_channels, width)
        self.label_emb = nn.Embedding(num_classes, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + num_patches, width))
        self.in_blocks = nn.ModuleList(_Block(width, num_heads) for _ in range(depth // 2))
        self.mid_block = _Block(width, num_heads)
        self.out_blocks = nn.ModuleList(
            _Block(width, num_heads, has_skip=True) for _ in range(depth // 2)
        )
        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, patch_size**2 * in_channels)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        """Predict the noise.

        Args:
            x: (B, C, H, W).
            timesteps: (B,) in [0, 1000], fractions allowed.
            y: (B,) integers, the classes.

        Returns:
            (B, C, H, W).
        """
        height, patch = x.shape[2] // self.patch_size, self.patch_size
        time = _embed_time(timesteps, self.pos_embed.shape[-1]).to(x.dtype)
        tokens = [self.label_emb(y)[:, None], time[:, None], self.patch_embed(x)]
        hidden_states = torch.cat(tokens, dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            hidden_states = block(hidden_states)
            skips.append(hidden_states)
        hidden_states = self.mid_block(hidden_states)
        for block in self.out_blocks:
            hidden_states = block(hidden_states, skips.pop())
        patches = self.decoder_pred(self.norm(hidden_states))[:, 2:]
        rows = patches.unflatten(-1, (patch, patch, -1)).unflatten(1, (height, -1))
        return rows.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class _PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, N, D), row by row."""
        patches: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return patches


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from all tokens to all: (B, N, D)."""
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads)
        out: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return out


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """A function of single tokens: (B, N, D)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int, has_skip: bool = False) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), _Attention(width, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(width), _Mlp(width)
        self.skip_linear = nn.Linear(2 * width, width) if has_skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Two branches behind a norm each, without modulation or gates."""
        if self.skip_linear is not None:
            assert skip is not None, "the model pairs its blocks"
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


def _embed_time(timesteps: Tensor, width: int) -> Tensor:
    half = width // 2
    rates = torch.exp(-math.log(10000) / half * torch.arange(half, device=timesteps.device))
    angles = timesteps.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
