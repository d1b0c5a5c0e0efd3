"""One transformer block under one decision; no diffusers here."""

from .mlp import Mlp
from .runner import Lane, Runner
from .stream import Modulation, ResidualStream
from .sublayers import MlpLayer, SubLayer, WholeLayer, run_sub_layer

__all__ = [
    "Lane",
    "Mlp",
    "MlpLayer",
    "Modulation",
    "ResidualStream",
    "Runner",
    "SubLayer",
    "WholeLayer",
    "run_sub_layer",
]
