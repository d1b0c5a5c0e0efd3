"""One transformer block under one decision; no diffusers here."""

from .attention import SelfAttention
from .cross_attention import CrossAttentionLayer
from .graphs import (
    Capture,
    CudaCapture,
    GraphCounts,
    StaticInputs,
    StepGraphs,
    copy_tensors,
    describe_arguments,
    refuse,
)
from .joint import JointAttention, remember_joint_attention, text_feature
from .mlp import Layers, Mlp, Product
from .parallel import ParallelLayer
from .runner import Runner
from .stream import Modulation, ResidualStream
from .sublayers import (
    MlpLayer,
    SelfAttentionLayer,
    SubLayer,
    WholeLayer,
    bring_up_to_date,
    key_sites,
    run_sub_layer,
)

__all__ = [
    "Capture",
    "CrossAttentionLayer",
    "CudaCapture",
    "GraphCounts",
    "JointAttention",
    "Layers",
    "Mlp",
    "MlpLayer",
    "Modulation",
    "ParallelLayer",
    "Product",
    "ResidualStream",
    "Runner",
    "SelfAttention",
    "SelfAttentionLayer",
    "StaticInputs",
    "StepGraphs",
    "SubLayer",
    "WholeLayer",
    "bring_up_to_date",
    "copy_tensors",
    "describe_arguments",
    "key_sites",
    "refuse",
    "remember_joint_attention",
    "run_sub_layer",
    "text_feature",
]
