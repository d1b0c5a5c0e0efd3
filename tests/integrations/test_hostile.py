"""Random sequences of what people do to a model under a cache, against a model made afresh."""

import copy
import random

import pytest
import torch
from torch import nn

from tokencache_kernels.integrations.diffusers import (
    apply_token_cache,
    remove_token_cache,
    reset_token_cache,
    token_cache_context,
)
from tokencache_kernels.policies import FactorRouter, IntervalSchedule, ScoreSelector, ToCaConfig
from tokencache_kernels.testing.families import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
STEPS = 5
ACTIONS = 12


def policy():
    router = FactorRouter(0.4, module_weight={"attn": 0.0, "cross": 1.0})
    return ToCaConfig(IntervalSchedule(3), router, ScoreSelector(staleness_weight=0.1), STEPS)


def run(model, name, prompt, batch, steps=range(STEPS)):
    outputs = []
    for step in steps:
        with torch.no_grad():
            given = FAMILIES[name].inputs(step, prompt, batch)
            outputs.append(model(**given, return_dict=False)[0])
    return torch.stack(outputs)


class Scaled(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    def forward(self, x):
        return 0.9 * self.base_layer(x)


def mlp_of(model, choice):
    return choice.choice(list(model.transformer_blocks)).ff


def act(model, name, choice):
    """Do one thing to the model, and return the one to go on with."""
    action = choice.choice(
        ["break off", "reset", "release", "apply anew", "copy", "scale", "data", "wrap", "context"]
    )
    prompt, batch = choice.randrange(4), choice.choice([1, 2])
    if action == "break off":
        run(model, name, prompt, batch, range(choice.randrange(1, STEPS)))
    elif action == "reset":
        reset_token_cache(model)
    elif action == "release":
        reset_token_cache(model, release_memory=True)
    elif action == "apply anew":
        remove_token_cache(model)
        apply_token_cache(model, policy(), tier=choice.choice(["auto", "as_is"]))
    elif action == "copy":
        return copy.deepcopy(model)
    elif action == "scale":
        for parameter in mlp_of(model, choice).parameters():
            parameter.mul_(1.05)
    elif action == "data":
        for parameter in mlp_of(model, choice).parameters():
            parameter.data = parameter.data * 0.95
    elif action == "wrap":
        net = mlp_of(model, choice).net
        net[2] = Scaled(net[2]) if isinstance(net[2], nn.Linear) else net[2].base_layer
    else:
        with token_cache_context(model, "another"):
            run(model, name, prompt, batch, range(2))
    return model


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "name", ["DiTTransformer2DModel", "PixArtTransformer2DModel", "FluxTransformer2DModel"]
)
def test_a_run_is_that_of_a_model_made_afresh(name, seed):
    choice = random.Random(f"{name} {seed}")
    model = FAMILIES[name].build()
    apply_token_cache(model, policy())

    for _ in range(ACTIONS):
        model = act(model, name, choice)
        prompt, batch = choice.randrange(4), choice.choice([1, 2])
        fresh = copy.deepcopy(model)
        remove_token_cache(fresh)
        apply_token_cache(fresh, policy())

        torch.testing.assert_close(
            run(model, name, prompt, batch), run(fresh, name, prompt, batch), rtol=1e-4, atol=1e-4
        )
