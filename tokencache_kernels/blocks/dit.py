"""A DiT block in a partial step: attention reused, the MLP recomputed for the fresh tokens."""

from typing import NamedTuple

from torch import Tensor

from ..cache import FeatureCache
from ..policies import Site
from .mlp import Mlp
from .stream import ResidualStream


class DiTModulation(NamedTuple):
    """The current step's adaLN vectors of one block, (B, D) each."""

    gate_attention: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor


def reuse_dit_block(
    stream: ResidualStream, cache: FeatureCache, layer: int, modulation: DiTModulation
) -> None:
    """x += gate_attention * cached attention + gate_mlp * cached MLP; no launch by itself."""
    x = stream.hidden_states
    stream.add(cache.load(attention_site(layer), like=x), modulation.gate_attention)
    stream.add(cache.load(mlp_site(layer), like=x), modulation.gate_mlp)


def partial_dit_block(
    stream: ResidualStream,
    cache: FeatureCache,
    layer: int,
    modulation: DiTModulation,
    mlp: Mlp,
    eps: float,
    indices: Tensor,
    positions: Tensor,
    backend: str = "auto",
) -> None:
    """Like ``reuse_dit_block``, with the MLP recomputed first for the selected tokens.

    Three launches: the row pass, the first linear layer, the second with its scatter.

    Source:
        ToCa's partial DiT block (arXiv:2410.05317): self-attention is never recomputed.
    """
    x = stream.hidden_states
    cached_mlp = cache.load(mlp_site(layer), like=x)
    stream.add(cache.load(attention_site(layer), like=x), modulation.gate_attention)
    packed = stream.take_rows(indices, positions, modulation.shift_mlp, modulation.scale_mlp, eps)
    mlp.recompute_(cached_mlp, indices, packed, backend)
    stream.add(cached_mlp, modulation.gate_mlp)


def attention_site(layer: int) -> Site:
    """Where the block's attention output is cached."""
    return Site("main", layer, "attn")


def mlp_site(layer: int) -> Site:
    """Where the block's MLP output is cached."""
    return Site("main", layer, "mlp")
