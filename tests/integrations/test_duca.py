"""Aggressive steps on real models: no block runs, the final layer sees the step."""

import pytest
import torch

from tokencache_kernels.errors import UnsupportedInputError
from tokencache_kernels.integrations.diffusers import apply_token_cache
from tokencache_kernels.integrations.diffusers.interception import interceptor_of
from tokencache_kernels.policies import (
    REUSE,
    Action,
    Decision,
    DuCaConfig,
    ScoreSelector,
    ToCaConfig,
)
from tokencache_kernels.testing import randn, tiny_dit, tiny_flux, tiny_pixart

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def dit_inputs(step):
    return {
        "hidden_states": randn(2, 2, 8, 8, seed=step),
        "timestep": torch.full((2,), 900 - 100 * step),
        "class_labels": torch.tensor([1, 2]),
    }


def flux_inputs(step):
    return {
        "hidden_states": randn(2, 6, 4, seed=step),
        "encoder_hidden_states": randn(2, 5, 10),
        "pooled_projections": randn(2, 6),
        "timestep": torch.full((2,), 0.9 - 0.1 * step),
        "guidance": torch.full((2,), 3.5),
        "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(5, 3),
    }


MODELS = {"dit": (tiny_dit, dit_inputs), "flux": (tiny_flux, flux_inputs)}


def last_block(model):
    return getattr(model, "single_transformer_blocks", model.transformer_blocks)[-1]


@torch.no_grad()
def run(model, inputs, steps):
    return [model(**inputs(step)).sample for step in steps]


def duca(**options):
    """Full, aggressive, partial: the aggressive step follows a full one."""
    return DuCaConfig(ToCaConfig.constant(0.5, 3, 3, **options), skips_odd=True)


@pytest.mark.parametrize("name", MODELS)
def test_an_aggressive_step_is_the_final_layer_on_the_last_blocks_output(name):
    build, inputs = MODELS[name]
    dense, cached = build(), build()
    apply_token_cache(cached, duca())
    kept = []
    handle = last_block(dense).register_forward_hook(lambda *call: kept.append(call[-1]))
    full = run(dense, inputs, [0])
    handle.remove()
    last_block(dense).register_forward_hook(lambda *_: kept[0])

    out = run(cached, inputs, [0, 1])

    torch.testing.assert_close(out[0], full[0])
    torch.testing.assert_close(out[1], run(dense, inputs, [1])[0])


@pytest.mark.parametrize("name", MODELS)
def test_an_aggressive_step_leaves_no_trace(name):
    """The partial step behind it is that of a run without it: caches, staleness, selection."""
    build, inputs = MODELS[name]
    first, second = build(), build()
    apply_token_cache(first, duca())
    apply_token_cache(second, ToCaConfig.constant(0.5, 2, 2))

    out = run(first, inputs, [0, 1, 2, 0])

    torch.testing.assert_close(out[2], run(second, inputs, [0, 2])[1], rtol=0, atol=0)
    torch.testing.assert_close(out[3], run(second, inputs, [0])[0], rtol=0, atol=0)


@pytest.mark.parametrize("build", [tiny_dit, tiny_pixart], ids=["dit", "pixart"])
def test_tokens_are_selected_by_the_norm_of_their_values(build):
    """The selected are those whose value vectors are shortest, head by head."""
    model = build()
    policy = ToCaConfig.constant(0.25, 2, 2, selector=ScoreSelector("value_norm"))
    values = []
    attention = model.transformer_blocks[1].attn1
    attention.to_v.register_forward_hook(lambda *call: values.append(call[-1]))
    apply_token_cache(model, policy)
    inputs = dit_inputs(0)
    if build is tiny_pixart:
        del inputs["class_labels"]
        inputs["encoder_hidden_states"] = randn(2, 5, model.config.caption_channels)
        inputs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        inputs["hidden_states"] = randn(2, model.config.in_channels, 8, 8)

    with torch.no_grad():
        model(**inputs)

    runner = interceptor_of(model).session.passes()[0][1].runner
    (selection,) = (one for one in runner._selections if one._group.sites[0].module == "mlp")
    heads = values[0].unflatten(-1, (attention.heads, -1)).norm(dim=-1)
    torch.testing.assert_close(selection.tokens.scores[1], (1 - heads).mean(dim=-1))


class Halfway:
    """Skips the attention sites only."""

    num_inference_steps = 2
    carrier = REUSE
    num_layers = predictor = None
    selector = ScoreSelector("none")

    def decide(self, site, step, num_tokens):
        if step.index == 1 and site.module == "attn":
            return Decision(Action.SKIP, 0)
        return Decision(Action.FULL, num_tokens)


def test_skipping_some_sites_of_a_step_is_refused():
    model = tiny_dit()
    apply_token_cache(model, Halfway())

    with pytest.raises(UnsupportedInputError, match="must skip all sites of a step or none, got 3"):
        run(model, dit_inputs, [0])


class Hasty(Halfway):
    """Skips the first step."""

    def decide(self, site, step, num_tokens):
        return Decision(Action.SKIP, 0)


def test_a_run_begins_with_a_full_step_whatever_the_policy_says():
    model = tiny_dit()
    dense = run(model, dit_inputs, [0])
    apply_token_cache(model, Hasty())

    first, second = run(model, dit_inputs, [0, 1])

    torch.testing.assert_close(first, dense[0], rtol=0, atol=0)
    assert not torch.equal(second, first)
