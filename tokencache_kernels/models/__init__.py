"""Descriptions of the models that people run, by the name of the transformer's class."""

from .dit import DIT
from .flux import FLUX
from .pixart import PIXART
from .spec import (
    FEED_FORWARD,
    Branch,
    CrossAttention,
    Grid,
    JointAttention,
    Layers,
    Mlp,
    ModelSpec,
    Modulation,
    Norm,
    Parallel,
    SelfAttention,
    Stack,
    Vectors,
)

SPECS: dict[str, ModelSpec] = {spec.transformer: spec for spec in (DIT, FLUX, PIXART)}

__all__ = [
    "FEED_FORWARD",
    "SPECS",
    "Branch",
    "CrossAttention",
    "Grid",
    "JointAttention",
    "Layers",
    "Mlp",
    "ModelSpec",
    "Modulation",
    "Norm",
    "Parallel",
    "SelfAttention",
    "Stack",
    "Vectors",
]
