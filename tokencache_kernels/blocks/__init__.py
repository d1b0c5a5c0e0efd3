"""One transformer block under one decision; no diffusers here."""

from .dit import DiTModulation, partial_dit_block, reuse_dit_block
from .mlp import Mlp
from .runner import Runner
from .stream import ResidualStream

__all__ = [
    "DiTModulation",
    "Mlp",
    "ResidualStream",
    "Runner",
    "partial_dit_block",
    "reuse_dit_block",
]
