"""Random sequences of use of a model under a cache, against a model made afresh.

Whatever has been done before, a run is that of a new model with the same weights, layers and
options. Each change is a function of a model, so that it can be made to the new one too.
"""

import copy
from functools import partial

import accelerate
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from tokencache_kernels.integrations.diffusers import (
    apply_token_cache,
    remove_token_cache,
    reset_token_cache,
    token_cache_context,
)
from tokencache_kernels.policies import FactorRouter, IntervalSchedule, ScoreSelector, ToCaConfig
from tokencache_kernels.testing.families import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 5
NAMES = (
    "DiTTransformer2DModel", "PixArtTransformer2DModel", "FluxTransformer2DModel",
    "SD3Transformer2DModel", "WanTransformer3DModel", "QwenImageTransformer2DModel",
)  # fmt: skip
CPU = torch.device("cpu")


def policy():
    router = FactorRouter(0.4, module_weight={"attn": 0.0, "cross": 1.0})
    return ToCaConfig(IntervalSchedule(3), router, ScoreSelector(staleness_weight=0.1), STEPS)


def blocks_of(model):
    return next(
        getattr(model, path) for path in ("transformer_blocks", "blocks") if hasattr(model, path)
    )


@torch.no_grad()
def run(model, name, prompt, batch, steps=range(STEPS), total=None):
    """A run of some steps; with a total the caller says where each of them lies."""
    outputs = []
    for step in steps:
        given = FAMILIES[name].inputs(step, prompt, batch)
        place = {} if total is None else {"step_index": step, "num_inference_steps": total}
        context = "told" if place else "default"
        with token_cache_context(model, context, **place):
            outputs.append(model(**given, return_dict=False)[0])
    return torch.stack(outputs)


class Scaled(nn.Module):
    """A layer around another, as an adapter puts it there."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    def forward(self, x):
        return 0.9 * self.base_layer(x)


# --- changes, each made to the used model and to the new one --------------------------------------


def mlp_of(model, layer):
    block = blocks_of(model)[layer]
    for path in ("ff", "ffn", "img_mlp"):
        if hasattr(block, path):
            return getattr(block, path)
    raise AssertionError(path)


def scale_in_place(layer, model):
    with torch.no_grad():
        for parameter in mlp_of(model, layer).parameters():
            if parameter.is_floating_point() and type(parameter) is nn.Parameter:
                parameter.mul_(1.05)


def scale_data(layer, model):
    for parameter in mlp_of(model, layer).parameters():
        if type(parameter) is nn.Parameter:
            parameter.data = parameter.data * 0.95


def wrap(layer, model):
    net = mlp_of(model, layer).net
    net[2] = net[2].base_layer if isinstance(net[2], Scaled) else Scaled(net[2])


def quantise(layer, model):
    quantize_(mlp_of(model, layer), Int8WeightOnlyConfig())


def fuse(model):
    model.fuse_qkv_projections()


def unfuse(model):
    model.unfuse_qkv_projections()


class Hostile(RuleBasedStateMachine):
    """A model under a cache, and the changes that have been made to it."""

    name = NAMES[0]

    @initialize(tier=st.sampled_from(["auto", "as_is"]))
    def begin(self, tier):
        self.tier = tier
        self.changes = []
        self.quantised = set()
        self.is_offloaded = self.is_fused = False
        self.model = FAMILIES[self.name].build()
        apply_token_cache(self.model, policy(), tier=tier)

    def change(self, function):
        function(self.model)
        self.changes.append(function)

    @rule(prompt=st.integers(0, 3), batch=st.integers(1, 2), total=st.sampled_from([None, 3, 7]))
    def compare(self, prompt, batch, total):
        new = FAMILIES[self.name].build()
        for function in self.changes:
            function(new)
        apply_token_cache(new, policy(), tier=self.tier)
        steps = range(total or STEPS)

        got, wanted = (
            run(model, self.name, prompt, batch, steps, total) for model in (self.model, new)
        )

        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)

    @rule(prompt=st.integers(0, 3), steps=st.integers(1, STEPS - 1))
    def break_off(self, prompt, steps):
        run(self.model, self.name, prompt, 2, range(steps))

    @rule(prompt=st.integers(0, 3), step=st.integers(0, STEPS - 2))
    def interrupt(self, prompt, step):
        def stop(*_):
            raise KeyboardInterrupt

        if step:
            run(self.model, self.name, prompt, 1, range(step))
        with (
            blocks_of(self.model)[-1].register_forward_hook(stop),
            pytest.raises(KeyboardInterrupt),
        ):
            run(self.model, self.name, prompt, 1, [step])

    @rule(prompt=st.integers(0, 3))
    def call_in_another_context(self, prompt):
        with token_cache_context(self.model, "another"):
            run(self.model, self.name, prompt, 1, range(2))

    @rule(release_memory=st.booleans())
    def reset(self, release_memory):
        reset_token_cache(self.model, release_memory=release_memory)

    @rule(tier=st.sampled_from(["auto", "as_is"]))
    def apply_anew(self, tier):
        remove_token_cache(self.model)
        apply_token_cache(self.model, policy(), tier=tier)
        self.tier = tier

    # accelerate's wrappers of a copy call the original
    @precondition(lambda self: not self.is_offloaded)
    @rule()
    def copy(self):
        self.model = copy.deepcopy(self.model)

    @precondition(lambda self: not self.is_offloaded)
    @rule(layer=st.integers(0, 1), how=st.sampled_from([scale_in_place, scale_data]))
    def write_weights(self, layer, how):
        self.change(partial(how, layer))

    @precondition(lambda self: not self.is_offloaded)
    @rule(layer=st.integers(0, 1))
    def put_an_adapter_on_or_off(self, layer):
        self.change(partial(wrap, layer))

    @precondition(lambda self: not self.is_offloaded)
    @rule(layer=st.integers(0, 1))
    def quantise(self, layer):
        if layer not in self.quantised:
            self.quantised.add(layer)
            self.change(partial(quantise, layer))

    @precondition(
        lambda self: not self.is_offloaded and hasattr(self.model, "fuse_qkv_projections")
    )
    @rule()
    def fuse_or_unfuse(self):
        self.change(unfuse if self.is_fused else fuse)
        self.is_fused = not self.is_fused

    @precondition(lambda self: not self.quantised)
    @rule()
    def offload_or_bring_back(self):
        if self.is_offloaded:
            accelerate.hooks.remove_hook_from_module(self.model, recurse=True)
        else:
            accelerate.cpu_offload(self.model, CPU)
        self.is_offloaded = not self.is_offloaded


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_that_of_a_model_made_afresh(name):
    machine = type("Hostile", (Hostile,), {"name": name})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=4, stateful_step_count=12, deadline=None, derandomize=True,
            suppress_health_check=list(HealthCheck), database=None, phases=[Phase.generate],
        ),
    )  # fmt: skip
