"""A step table on a model: against a loop that knows nothing of it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tokencache_kernels.errors import CacheMissError, UnsupportedInputError
from tokencache_kernels.integrations.step_carrier import (
    apply_step_table,
    remove_step_table,
    reset_step_table,
)
from tokencache_kernels.policies import Newton, StepTable
from tokencache_kernels.testing import randn
from tokencache_kernels.testing.models import tiny_dit

TABLE = StepTable(
    5,
    (0, 2, 3),
    ((1.0,), (0.75,), (-0.5, 1.5), (0.25, 0.75), (-0.125, 1.0)),
    (0.0, 0.5, 0.0, -0.25, 0.125),
    2,
)


class Velocity(nn.Module):
    """A network with two arguments that counts its calls; a sampler is a few lines."""

    def __init__(self, form=lambda output: output):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.form = form
        self.calls = 0

    def forward(self, hidden_states, timestep):
        self.calls += 1
        return self.form(torch.tanh(self.layer(hidden_states)) * (1 + timestep))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Velocity().requires_grad_(False)


def sample(model, latents, steps=5, read=lambda output: output, **named):
    for index in range(steps):
        latents = latents - 0.3 * read(model(latents, 0.1 * index, **named))
    return latents


def sample_by_hand(model, latents, table):
    """The table's definition, spelled out."""
    outputs = []
    for index in range(table.num_inference_steps):
        if index in table.full_steps:
            outputs.append(torch.tanh(model.layer(latents)) * (1 + 0.1 * index))
        kept = outputs[-table.history :]
        velocity = table.input_weights[index] * latents
        for weight, output in zip(table.weights[index], kept, strict=True):
            velocity = velocity + weight * output
        latents = latents - 0.3 * velocity
    return latents


def test_samples_are_those_of_the_definition_run_after_run(model):
    apply_step_table(model, TABLE)

    for seed in (0, 1):
        latents = randn(3, 6, seed=seed)
        wanted = sample_by_hand(model, latents, TABLE)
        torch.testing.assert_close(sample(model, latents), wanted)
    assert model.calls == 2 * len(TABLE.full_steps)


@pytest.mark.parametrize(
    ("form", "read"),
    [
        (lambda output: (output, "more"), lambda answer: answer[0]),
        (lambda output: SimpleNamespace(sample=output), lambda answer: answer.sample),
    ],
    ids=["tuple", "output"],
)
def test_an_answer_keeps_its_form(model, form, read):
    model.form = form
    latents = randn(3, 6)
    wanted = sample_by_hand(model, latents, TABLE)
    apply_step_table(model, TABLE)

    torch.testing.assert_close(sample(model, latents, read=read), wanted)


def test_all_steps_full_is_the_model_bit_for_bit(model):
    latents = randn(3, 6)
    wanted = sample(model, latents)
    apply_step_table(model, StepTable.from_carrier(range(5), Newton(2), 5))

    assert torch.equal(sample(model, latents), wanted)


def test_after_removal_the_model_is_as_before(model):
    latents = randn(3, 6)
    wanted = sample(model, latents)
    apply_step_table(model, TABLE)
    sample(model, latents, steps=2)

    remove_step_table(model)
    remove_step_table(model)

    assert "forward" not in vars(model)
    assert torch.equal(sample(model, latents), wanted)


def test_two_calls_a_step_keep_apart(model):
    latents = randn(2, 6)
    wanted = sample_by_hand(model, latents, TABLE)
    apply_step_table(model, TABLE, calls_per_step=2)

    for _ in range(2):
        one, other = latents.clone(), -latents
        for index in range(5):
            one, other = (x - 0.3 * model(x, 0.1 * index) for x in (one, other))
        torch.testing.assert_close(one, wanted)


def test_a_run_that_was_broken_off_is_forgotten_by_reset(model):
    latents = randn(3, 6)
    wanted = sample_by_hand(model, latents, TABLE)
    apply_step_table(model, TABLE)
    sample(model, latents, steps=3)

    reset_step_table(model)

    torch.testing.assert_close(sample(model, latents), wanted)


def test_another_batch_within_a_run_is_refused(model):
    apply_step_table(model, TABLE)
    model(randn(3, 6), 0.0)

    with pytest.raises(CacheMissError, match=r"changed at step 1 .*; call reset_step"):
        model(randn(2, 6), 0.0)


def test_a_copy_of_a_model_has_no_table(model):
    apply_step_table(model, TABLE)

    twin = copy.deepcopy(model)

    latents = randn(3, 6)
    remove_step_table(model)
    assert torch.equal(sample(twin, latents), sample(model, latents))
    assert twin.calls == 5


def test_outputs_in_bfloat16_are_summed_in_float32(model):
    model.to(torch.bfloat16)
    apply_step_table(model, StepTable(2, (0,), ((1.0,), (0.333,)), (0.0, 0.777), 1))
    latents, now = randn(3, 6, dtype=torch.bfloat16), randn(3, 6, seed=1, dtype=torch.bfloat16)
    first = model(latents, 0.0)

    out = model(now, 0.0)

    assert out.dtype == torch.bfloat16
    assert torch.equal(out, (0.333 * first.float() + 0.777 * now.float()).bfloat16())


def test_a_second_table_is_refused(model):
    apply_step_table(model, TABLE)

    with pytest.raises(ValueError, match="has a step table; remove_step_table first"):
        apply_step_table(model, TABLE)


def test_latents_of_another_shape_have_no_weight():
    model = nn.Linear(6, 12).requires_grad_(False)
    apply_step_table(model, TABLE)
    model(randn(3, 6))

    with pytest.raises(UnsupportedInputError, match=r"the output.s \(3, 12\), got \(3, 6\)"):
        model(randn(3, 6))


def test_a_diffusers_transformer_is_carried():
    pytest.importorskip("diffusers")
    model = tiny_dit()
    config = model.config
    size = config.sample_size
    latents = [randn(2, config.in_channels, size, size, seed=seed) for seed in range(3)]
    labels = torch.tensor([0, 1])

    def call(step):
        return model(latents[step], timestep=torch.tensor([step, step]), class_labels=labels).sample

    with torch.no_grad():
        dense = [call(0), call(1)]
        apply_step_table(model, StepTable.from_carrier((0, 1), Newton(1), 3))
        out = [call(step) for step in range(3)]

    assert torch.equal(out[0], dense[0])
    torch.testing.assert_close(out[2], 2 * dense[1] - dense[0])


def test_apply_token_cache_takes_a_table_like_any_policy():
    pytest.importorskip("diffusers")
    from tokencache_kernels.integrations.diffusers import (
        apply_token_cache,
        remove_token_cache,
        reset_token_cache,
    )

    def run(model):
        labels = torch.tensor([1, 2])
        return torch.stack([
            model(randn(2, 2, 8, 8, seed=step), timestep=900 - 60 * step + 0 * labels,
                  class_labels=labels).sample
            for step in range(4)
        ])  # fmt: skip

    table = StepTable.from_carrier((0, 1), Newton(1), 4)
    model, other = tiny_dit(), tiny_dit()
    with torch.no_grad():
        dense = run(model)
        apply_step_table(other, table)
        wanted = run(other)
        apply_token_cache(model, table)
        with pytest.raises(ValueError, match="must not have a token cache yet"):
            apply_token_cache(model, table)
        run(model)
        model(randn(2, 2, 8, 8), timestep=torch.tensor([9, 9]), class_labels=torch.tensor([1, 2]))
        reset_token_cache(model)
        again = run(model)
        remove_token_cache(model)

        assert torch.equal(again, wanted)
        assert not torch.equal(wanted, dense)
        assert torch.equal(run(model), dense)
        with pytest.raises(ValueError, match="cuda_graphs must be False under a StepTable"):
            apply_token_cache(model, table, cuda_graphs=True)
