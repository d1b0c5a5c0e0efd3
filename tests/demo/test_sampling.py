import pytest
import torch

from tokencache_kernels.demo.classifier import classify, load_classifier
from tokencache_kernels.demo.model import NULL_CLASS, build_scheduler, load_model
from tokencache_kernels.demo.sampling import make_noise, sample


@pytest.fixture(scope="module")
def model(weights):
    return load_model(weights)


def test_a_sample_alone_is_the_same_as_in_a_batch(model):
    batch = sample(model, [3, 8, 3], [5, 6, 7], steps=3)

    alone = sample(model, [8], [6], steps=3)

    assert batch.shape == (3, 1, 32, 32)
    assert not torch.equal(batch[0], batch[2])
    torch.testing.assert_close(batch[1:2], alone, rtol=1e-3, atol=1e-3)


def test_noise_belongs_to_its_seed():
    assert torch.equal(make_noise([4, 9])[1], make_noise([9, 4])[0])
    assert not torch.equal(make_noise([4]), make_noise([9]))


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_guidance_extrapolates_from_the_unconditional_prediction(model, guidance):
    out = sample(model, [2], [0], steps=2, guidance=guidance)

    scheduler = build_scheduler()
    scheduler.set_timesteps(2)
    images = make_noise([0])
    for timestep in scheduler.timesteps:
        noise = [
            model(images, timestep=timestep[None], class_labels=torch.tensor([label])).sample
            for label in (2, NULL_CLASS)
        ]
        mixed = guidance * noise[0] + (1 - guidance) * noise[1]
        images = scheduler.step(mixed, timestep, images).prev_sample
    torch.testing.assert_close(out, images, rtol=1e-3, atol=1e-3)


def test_every_step_is_told(model):
    calls = []

    sample(model, [1], [0], steps=4, on_step=lambda: calls.append(1))

    assert len(calls) == 4


def test_the_shipped_model_draws_the_digits_that_it_is_asked_for():
    labels = list(range(10))

    images = sample(load_model(), labels, labels, steps=10)

    predicted, _ = classify(load_classifier(), images)
    assert images.abs().max() < 2
    assert (predicted == torch.tensor(labels)).sum() >= 8


def test_labels_without_seeds_are_refused(model):
    with pytest.raises(ValueError, match="seeds must be one for each of 2 labels, got 1"):
        sample(model, [1, 2], [0], steps=1)
