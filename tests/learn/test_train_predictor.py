"""TokenCache's predictor on a real DiT: how it begins, how it learns, how it is calibrated."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from tokencache_kernels.errors import UnsupportedInputError
from tokencache_kernels.learn.superposition import run_step_before
from tokencache_kernels.learn.train_predictor import (
    calibrate_predictor,
    make_content_predictor,
    make_table_predictor,
    read_inputs,
    train_predictor,
)
from tokencache_kernels.learn.training import TrainingSettings
from tokencache_kernels.policies import TablePredictor, rank_scores
from tokencache_kernels.testing import randn, tiny_dit

pytest.importorskip("tqdm")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
STEPS = 4


def scheduler(steps=STEPS):
    made = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    made.set_timesteps(steps)
    return made


def draw(generator):
    latents = torch.randn(3, 2, 8, 8, generator=generator)
    return latents, torch.randint(10, (3,), generator=generator)


def train(predictor, folder, model=None, *, num_steps=6, sparsity=0.0, seed=0):
    settings = TrainingSettings(num_steps, learning_rate=0.05, save_every=2, seed=seed)
    return train_predictor(
        tiny_dit() if model is None else model, predictor, scheduler(), draw, settings,
        folder / "state.safetensors", sparsity=sparsity, facts={"data": "noise"},
    )  # fmt: skip


def scores_of(predictor):
    return predictor(randn(2, 16, 24), randn(2, 24), 2)


def test_a_predictor_as_wide_as_the_model_begins_with_its_first_block():
    model = tiny_dit()
    block = model.transformer_blocks[0]

    predictor = make_content_predictor(model, STEPS)

    for own, given in (
        (predictor.modulation, block.norm1.linear),
        (predictor.query, block.attn1.to_q),
        (predictor.project, block.attn1.to_out[0]),
        (predictor.fc1, block.ff.net[0].proj),
        (predictor.fc2, block.ff.net[2]),
    ):
        assert torch.equal(own.weight, given.weight)
        assert torch.equal(own.bias, given.bias)
    # the block itself is the model's: with the identity for a score it gives the block's output
    latents, timestep, labels = randn(2, 2, 8, 8), torch.tensor([300, 700]), torch.tensor([1, 2])
    x, conditioning = read_inputs(model, latents, timestep, labels)
    wanted = block(x, timestep=timestep, class_labels=labels)
    predictor.score = nn.Linear(24, 24, bias=False)
    predictor.score.weight.data = torch.eye(24)
    got = predictor(x, conditioning, 0).logit().permute(1, 2, 0)
    torch.testing.assert_close(got, nn.functional.layer_norm(wanted, (24,)), rtol=1e-3, atol=1e-3)


def test_a_narrow_predictor_keeps_the_width_of_the_heads():
    predictor = make_content_predictor(tiny_dit(), STEPS, width=8)

    assert predictor.num_heads == 1
    assert scores_of(predictor).shape == (3, 2, 16)
    for wrong in (12, 0):
        with pytest.raises(
            ValueError, match=f"width must be a positive multiple of 8, got {wrong}"
        ):
            make_content_predictor(tiny_dit(), STEPS, width=wrong)


@pytest.mark.parametrize("make", [make_table_predictor, make_content_predictor])
def test_scores_rise_where_tokens_are_free_and_fall_where_they_are_dear(make, tmp_path):
    free, dear = make(tiny_dit(), STEPS), make(tiny_dit(), STEPS)

    history = train(free, tmp_path / "free", num_steps=10)
    train(dear, tmp_path / "dear", num_steps=10, sparsity=1e4)

    assert scores_of(free).mean() > 0.52
    assert scores_of(dear).mean() < 0.45
    assert [row["step"] for row in history] == [2, 4, 6, 8, 10]
    assert history[-1]["loss"] == pytest.approx(history[-1]["error"])


def test_the_loss_is_that_of_superposed_sub_layers(tmp_path):
    """At scores of 1 the superposed network is the exact one; at 0 it is the step before's."""
    losses = {}
    for score, logit in ((1, 100.0), (0, -200.0)):
        predictor = make_table_predictor(tiny_dit(), STEPS)
        predictor.logits.data.fill_(logit)
        losses[score] = train(predictor, tmp_path / str(score), num_steps=1)[0]

    assert losses[1]["error"] == 0
    assert losses[0]["error"] > 1e-4
    assert losses[1]["score"] == 1


def test_a_token_that_never_changes_is_scored_below_those_that_do(tmp_path):
    """Sub-layers of block 1 ignore their input, so to compute them is of no use."""
    model = tiny_dit()
    for layer in (model.transformer_blocks[1].attn1.to_v, model.transformer_blocks[1].ff.net[2]):
        layer.weight.zero_()
    predictor = make_table_predictor(model, STEPS)

    train(predictor, tmp_path, model, num_steps=20, sparsity=1e-5)

    means = predictor.logits[1:].mean(dim=(0, 2))
    assert means[1] < means[0]
    assert means[1] < means[2]


def test_training_leaves_the_model_as_it_was(tmp_path):
    """Also one as it comes from a config: in training mode, with weights that can be trained."""
    model = tiny_dit().train().requires_grad_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    predictor = make_content_predictor(model, STEPS)

    train(predictor, tmp_path, model, num_steps=2)

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.requires_grad and value.grad is None for value in model.parameters())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    frozen = make_content_predictor(tiny_dit(), STEPS)
    train(frozen, tmp_path / "frozen", num_steps=2)
    assert torch.equal(frozen.score.weight, predictor.score.weight)


def test_a_run_that_is_broken_off_ends_with_the_same_bits(tmp_path):
    predictors = [make_content_predictor(tiny_dit(), STEPS) for _ in range(3)]

    train(predictors[0], tmp_path / "whole")
    train(predictors[1], tmp_path / "broken", num_steps=4)
    train(predictors[2], tmp_path / "broken")

    for name, value in predictors[0].state_dict().items():
        torch.testing.assert_close(
            predictors[2].state_dict()[name], value, rtol=0, atol=0, equal_nan=True
        )


def test_a_model_with_a_learned_variance_trains_too(tmp_path):
    model = tiny_dit(out_channels=4)
    predictor = make_table_predictor(model, STEPS)

    train(predictor, tmp_path, model, num_steps=2)

    assert predictor.logits.abs().max() > 0


def test_the_step_before_leads_where_the_sampler_goes():
    model, ddim = tiny_dit(), scheduler()
    clean, noise = randn(2, 2, 8, 8), randn(2, 2, 8, 8, seed=1)
    labels, steps = torch.tensor([3, 4]), torch.tensor([2, 2])

    got = run_step_before(model, ddim, clean, labels, noise, steps)

    time = ddim.timesteps[1]
    noisy = ddim.add_noise(clean, noise, time.expand(2))
    predicted = model(noisy, timestep=time.expand(2), class_labels=labels).sample
    torch.testing.assert_close(got, ddim.step(predicted, time, noisy).prev_sample)


def test_samples_at_different_steps_are_those_samples_alone():
    model, ddim = tiny_dit(), scheduler()
    clean, noise = randn(2, 2, 8, 8), randn(2, 2, 8, 8, seed=1)
    labels, steps = torch.tensor([3, 4]), torch.tensor([1, 3])

    together = run_step_before(model, ddim, clean, labels, noise, steps)

    for place in range(2):
        one = [value[place : place + 1] for value in (clean, labels, noise, steps)]
        alone = run_step_before(model, ddim, *one)
        torch.testing.assert_close(together[place : place + 1], alone)


def test_a_calibrated_table_ranks_its_own_scores():
    model = tiny_dit()
    predictor = make_table_predictor(model, STEPS)
    predictor.logits.data = randn(STEPS, 3, 16)

    calibrate_predictor(model, predictor, scheduler(), draw, num_batches=2, seed=0)

    wanted = predictor.logits.data.sigmoid().sort(descending=True).values
    wanted[0] = wanted[1]
    torch.testing.assert_close(predictor.importance, wanted)


def test_calibration_is_the_mean_over_noised_samples():
    model, ddim = tiny_dit(), scheduler()
    predictor = make_content_predictor(model, STEPS)
    nn.init.normal_(predictor.score.weight, generator=torch.Generator().manual_seed(1))

    calibrate_predictor(model.train(), predictor, ddim, draw, num_batches=1, seed=5)

    model.eval()

    generator = torch.Generator().manual_seed(5)
    clean, labels = draw(generator)
    noise = torch.randn(clean.shape, generator=generator)
    for step in (1, 3):
        time = ddim.timesteps[step].expand(3)
        inputs = read_inputs(model, ddim.add_noise(clean, noise, time), time, labels)
        with torch.no_grad():
            wanted = rank_scores(predictor(*inputs, step))
        torch.testing.assert_close(predictor.importance[step], wanted)


@pytest.mark.parametrize(
    ("sizes", "got"),
    [
        ((2, 16, 4), "2 blocks, 16 tokens and 4 steps"),
        ((3, 64, 4), "3 blocks, 64 tokens and 4 steps"),
        ((3, 16, 5), "3 blocks, 16 tokens and 5 steps"),
    ],
)
def test_a_predictor_of_another_size_is_refused_before_anything_is_written(sizes, got, tmp_path):
    wanted = f"predictor must be for 3 blocks, 16 tokens and 4 steps, got one for {got}"

    with pytest.raises(ValueError, match=f"train_predictor: {wanted}"):
        train(TablePredictor(*sizes), tmp_path)

    assert not list(tmp_path.iterdir())


def test_another_kind_of_model_is_refused(tmp_path):
    class Other(type(tiny_dit())):
        pass

    model = tiny_dit()
    model.__class__ = Other

    with pytest.raises(UnsupportedInputError, match=r"must be one of .*, got Other"):
        train(make_table_predictor(model, STEPS), tmp_path, model)
