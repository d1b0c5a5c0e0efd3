"""STDiT3, the transformer of Open-Sora 1.2, under the names of the published checkpoint.

Written from the names and shapes of the parameters and from published facts about them; the
project's own source was not read.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# channels of a timestep's sines and cosines
_FREQUENCIES = 256


class STDiT3(nn.Module):
    """A transformer of videos: blocks within frames and blocks across frames, in turns.

    Args:
        width: D.
        depth: the spatial blocks; there are as many temporal ones.
        num_heads: H.
        in_channels: of the latents; the output has twice as many.
        caption_channels: of the text.
        text_length: the tokens of the text that stands for none.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        in_channels: int = 4,
        caption_channels: int = 4096,
        text_length: int = 300,
    ) -> None:
        super().__init__()
        self.width = width
        self.x_embedder = _PatchEmbed(in_channels, width)
        self.t_embedder, self.fps_embedder = _TimeEmbed(width), _TimeEmbed(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = _TextEmbed(caption_channels, width, text_length)
        self.rope = _Rotary(width // num_heads)
        self.spatial_blocks = nn.ModuleList(_Block(width, num_heads) for _ in range(depth))
        self.temporal_blocks = nn.ModuleList(_Block(width, num_heads) for _ in range(depth))
        self.final_layer = _FinalLayer(width, 2 * in_channels)

    def forward(
        self, x: Tensor, timestep: Tensor, y: Tensor, mask: Tensor | None, fps: Tensor
    ) -> Tensor:
        """Predict velocity and variance.

        Args:
            x: (B, C, F, H, W), H and W even.
            timestep: (B,) in [0, 1000].
            y: (B, M, caption channels).
            mask: (B, M), 1 where there is a token of the text, which come first; None: everywhere.
            fps: (B,) frames in a second.

        Returns:
            (B, 2 C, F, H, W).
        """
        frames, rows, columns = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
        c = self.t_embedder(timestep, x.dtype) + self.fps_embedder(fps, x.dtype)
        text = self.y_embedder.y_proj(y)
        hidden_states = self.x_embedder(x)
        positions = _embed_positions(rows, columns, self.width, x.device).to(x.dtype)
        hidden_states = hidden_states + positions.repeat(frames, 1)
        arguments = (text, mask, self.t_block(c), frames)
        angles = self.rope(frames)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            hidden_states = spatial(hidden_states, *arguments, None)
            hidden_states = temporal(hidden_states, *arguments, angles)
        patches = self.final_layer(hidden_states, c)
        video = patches.unflatten(-1, (2, 2, -1)).unflatten(1, (frames, rows, columns))
        return video.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)


class _PatchEmbed(nn.Module):
    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_channels, width, (1, 2, 2), (1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, H, W) to (B, N, D), by frame, row and column."""
        patches: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return patches


class _TimeEmbed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) to (B, D)."""
        half = _FREQUENCIES // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half, device=value.device) / half)
        angles = value.float()[:, None] * rates
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        embedding: Tensor = self.mlp(waves.to(dtype))
        return embedding


class _TextEmbed(nn.Module):
    def __init__(self, caption_channels: int, width: int, text_length: int) -> None:
        super().__init__()
        self.y_proj = _TextMlp(caption_channels, width)
        self.register_buffer("y_embedding", torch.zeros(text_length, caption_channels))


class _TextMlp(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width_in, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """A function of single tokens."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class _Mlp(_TextMlp):
    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class _Rotary(nn.Module):
    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.freqs = nn.Parameter(10000 ** (-torch.arange(0, head_dim, 2) / head_dim))

    def forward(self, count: int) -> Tensor:
        """The angles (count, E / 2) of positions from 0."""
        return torch.arange(count, device=self.freqs.device)[:, None] * self.freqs.float()


class _Attention(nn.Module):
    """Attention within frames, or with ``angles`` across the frames of a position."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = (nn.RMSNorm(width // num_heads, eps=1e-6) for _ in range(2))

    def forward(self, x: Tensor, frames: int, angles: Tensor | None) -> Tensor:
        """(B, F * S, D) to the same."""
        B = len(x)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unflatten(1, (frames, -1))
        if angles is None:
            # (3, B * F, H, S, E)
            qkv = qkv.permute(3, 0, 1, 4, 2, 5).flatten(1, 2)
        else:
            # (3, B * S, H, F, E)
            qkv = qkv.permute(3, 0, 2, 4, 1, 5).flatten(1, 2)
        query, key, value = qkv.unbind()
        query, key = self.q_norm(query), self.k_norm(key)
        if angles is not None:
            query, key = _rotate(query, angles), _rotate(key, angles)
        attended = F.scaled_dot_product_attention(query, key, value).unflatten(0, (B, -1))
        order = (0, 1, 3, 2, 4) if angles is None else (0, 3, 1, 2, 4)
        out: Tensor = self.proj(attended.permute(order).flatten(3).flatten(1, 2))
        return out


class _CrossAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear, self.kv_linear = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from (B, N, D) to (B, M, D), of which a mask (B, M) keeps the tokens with 1."""
        query = self.q_linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key, value = (
            self.kv_linear(text).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        seen = None if mask is None else mask.bool()[:, None, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        out: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return out


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (
            nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2)
        )
        self.attn = _Attention(width, num_heads)
        self.cross_attn = _CrossAttention(width, num_heads)
        self.mlp = _Mlp(width)
        self.scale_shift_table = nn.Parameter(torch.zeros(6, width))

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        mask: Tensor | None,
        vectors: Tensor,
        frames: int,
        angles: Tensor | None,
    ) -> Tensor:
        """``vectors`` (B, 6 D) shift, scale and gate attention and MLP, with the block's table."""
        rows = self.scale_shift_table + vectors.unflatten(-1, (6, -1))
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = rows[:, :, None].unbind(1)
        x = x + gate * self.attn(self.norm1(x) * (1 + scale) + shift, frames, angles)
        x = x + self.cross_attn(x, text, mask)
        out: Tensor = x + mlp_gate * self.mlp(self.norm2(x) * (1 + mlp_scale) + mlp_shift)
        return out


class _FinalLayer(nn.Module):
    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, 4 * out_channels)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, N, D) to patches (B, N, 4 C)."""
        shift, scale = (self.scale_shift_table + c[:, None])[:, :, None].unbind(1)
        out: Tensor = self.linear(self.norm_final(x) * (1 + scale) + shift)
        return out


def _rotate(rows: Tensor, angles: Tensor) -> Tensor:
    """Rotate neighbouring channels of (..., N, E) by the angles (N, E / 2)."""
    cosine, sine = angles.cos().to(rows.dtype), angles.sin().to(rows.dtype)
    even, odd = rows[..., ::2], rows[..., 1::2]
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2)


def _embed_positions(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """The positions within a frame, (rows * columns, D): half from the column, half from the row.

    They are scaled as if a frame of 512 x 512 pixels, of 16 each, had that many tokens.
    """
    base = round(math.sqrt(rows * columns))
    scale = math.sqrt(rows * columns * 256) / 512
    quarter = width // 4
    rates = 10000 ** (-torch.arange(quarter, device=device) / quarter)

    def embed(extent: int) -> Tensor:
        place = torch.arange(extent, device=device) * (base / extent) / scale
        angles = place[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    by_row, by_column = embed(rows)[:, None], embed(columns)[None]
    shape = (rows, columns, width // 2)
    return torch.cat([by_column.expand(shape), by_row.expand(shape)], dim=-1).flatten(0, 1)
