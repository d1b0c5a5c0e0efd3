"""``precompute_modulation`` on a tiny model of every described class that has adaLN vectors."""

import copy
from types import SimpleNamespace

import pytest
import torch

from tokencache_kernels.errors import UnsupportedInputError
from tokencache_kernels.integrations.diffusers import (
    apply_token_cache,
    precompute_modulation,
    remove_precomputed_modulation,
)
from tokencache_kernels.integrations.diffusers.modulation import list_sources
from tokencache_kernels.models import SPECS
from tokencache_kernels.policies import RandomSelector, ToCaConfig, random_tokens
from tokencache_kernels.testing.families import FAMILIES

# diffusers deprecates parts of its own models
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
STEPS = 6
TIMES = 900.0 - 60 * torch.arange(STEPS)


def sources_of(name, model):
    return list_sources(SPECS[name], model)


def modulated(by_block):
    """The classes that have vectors: of their blocks' own, or any."""
    names = []
    for name, spec in SPECS.items():
        kinds = {source.kind for stack in spec.stacks for source in stack.vectors}
        own = kinds & {"adaln", "own_adaln", "call"}
        if name in FAMILIES and (own if by_block else own or spec.embedders):
            names.append(name)
    return names


def run(model, name, prompt=0, dtype=torch.float32, batch=2, steps=range(STEPS)):
    conditioning, outputs = {}, []
    for step in steps:
        given = FAMILIES[name].inputs(step, prompt, batch)
        given = {key: convert(value, dtype) for key, value in given.items()}
        # pipelines hand over the same tensors in every step
        for key in SPECS[name].modulated_by:
            if key in given:
                given[key] = conditioning.setdefault(key, given[key])
        with torch.no_grad():
            output = model(**given, return_dict=False)[0]
        outputs.append(torch.stack(output) if isinstance(output, list) else output)
    return torch.stack(outputs)


def convert(value, dtype):
    if isinstance(value, list):
        return [convert(one, dtype) for one in value]
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if is_float else value


def scheduler():
    return SimpleNamespace(timesteps=TIMES)


@pytest.mark.parametrize("policy", [None, "random"])
@pytest.mark.parametrize("name", modulated(by_block=False))
def test_runs_are_as_exact_as_with_the_models_own_vectors(name, policy):
    plain = FAMILIES[name].build()
    precomputed, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    if policy is not None:
        selector = RandomSelector(shares_guidance=False)
        config = random_tokens(0.4, 3, STEPS)
        config = ToCaConfig(config.schedule, config.router, selector, STEPS)
        for model in (plain, precomputed, exact):
            apply_token_cache(model, config)
    precompute_modulation(precomputed, scheduler())

    for prompt in (0, 3):
        own = run(plain, name, prompt)
        wanted = run(exact, name, prompt, torch.float64)
        error = (own - wanted).abs().max().item()
        # products of many rows are rounded otherwise than those of one
        torch.testing.assert_close(
            run(precomputed, name, prompt).double(), wanted, rtol=0, atol=4 * error
        )


@pytest.mark.parametrize("name", modulated(by_block=True))
def test_weights_are_read_once_a_run(name):
    model = FAMILIES[name].build()
    counts = {}
    for source in sources_of(name, model):
        counts[source.key] = 0

        def count(*_, key=source.key):
            counts[key] += 1

        linear = next(one for one in source.weights.modules() if isinstance(one, torch.nn.Linear))
        linear.register_forward_hook(count)
    precompute_modulation(model, scheduler())

    for prompt in range(2):
        run(model, name, prompt)

    assert counts
    assert set(counts.values()) == {2}


@pytest.mark.parametrize("name", modulated(by_block=True))
def test_weights_rest_elsewhere_between_first_calls(name, monkeypatch):
    model = FAMILIES[name].build()
    wanted = run(model, name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    resting = {source.weights: source.key for source in sources_of(name, model)}
    moves = []
    own = torch.nn.Module.to

    def move(module, device):
        if module in resting:
            moves.append((resting[module], str(device)))
            # as if they were on another device: nothing can be computed with them there
            for parameter in module.parameters():
                parameter.data.copy_(
                    state[f"{paths[parameter]}"] if str(device) == "cpu" else torch.nan
                )
            return module
        return own(module, device)

    paths = {parameter: path for path, parameter in model.named_parameters()}
    monkeypatch.setattr(torch.nn.Module, "to", move)
    precompute_modulation(model, scheduler(), weights_rest_on="elsewhere")
    out = run(model, name)
    after_one_run = len(moves)
    remove_precomputed_modulation(model)
    removed = run(model, name)

    assert after_one_run == 3 * len(resting)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(removed, wanted)


def test_two_embeddings_in_one_norm_are_refused():
    from diffusers.models.transformers.transformer_hunyuan_video import (
        HunyuanVideoTokenReplaceAdaLayerNormZero,
    )

    from tokencache_kernels.integrations.diffusers.modulation import _StandIn

    norm = HunyuanVideoTokenReplaceAdaLayerNormZero(8)
    rows, embedding = torch.zeros(1, 4, 8), torch.zeros(1, 8)
    stand_in = _StandIn(norm, torch.zeros(1, 48))

    with pytest.raises(UnsupportedInputError, match="of one embedding, got HunyuanVideoTok"):
        type(norm).forward(stand_in, rows, embedding, embedding, 2)


def test_timesteps_of_single_tokens_are_refused():
    name = "WanTransformer3DModel"
    model = FAMILIES[name].build()
    precompute_modulation(model, scheduler())
    given = FAMILIES[name].inputs(0, 0, 2)
    given["timestep"] = given["timestep"][:, None].expand(2, 32)

    with pytest.raises(ValueError, match=r"timestep must be one for each sample, got shape \(2, 3"):
        model(**given)
