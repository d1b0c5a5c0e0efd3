"""Training Learning-to-Cache's router on a real DiT, and running the result."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from tokencache_kernels.errors import DivergedError, UnsupportedInputError
from tokencache_kernels.integrations.diffusers import apply_token_cache, token_cache_context
from tokencache_kernels.learn.superposition import Superposition, find_sublayers
from tokencache_kernels.learn.train_router import train_router
from tokencache_kernels.learn.training import TrainingSettings
from tokencache_kernels.policies import CacheRouter, LearningToCacheConfig
from tokencache_kernels.testing import randn, tiny_dit, tiny_pixart

pytest.importorskip("tqdm")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
STEPS = 8  # divides 1000: the DDIM step of diffusers then ends at the next timestep
SETTINGS = TrainingSettings(num_steps=30, learning_rate=0.3, save_every=10)
COUNTERS = [0, 2, 4, 6]  # of the steps that are not full


def make_scheduler(steps=STEPS, **options):
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **options)
    scheduler.set_timesteps(steps)
    return scheduler


def draw(generator):
    latents = torch.randn(2, 2, 8, 8, generator=generator)
    return latents, torch.randint(10, (2,), generator=generator)


def train(folder, model=None, settings=SETTINGS, *, scheduler=None, **options):
    given = {"sparsity": 0.0, "threshold": 0.5, "facts": {"model": "tiny"}, **options}
    return train_router(
        tiny_dit(num_layers=2) if model is None else model,
        make_scheduler() if scheduler is None else scheduler,
        draw, settings, folder / "a.safetensors", **given,
    )  # fmt: skip


def forward(model, x, timestep, labels, cached=None, weights=None):
    """The network in plain PyTorch, written anew, and its sub-layers' outputs."""
    hidden, outputs, entry = model.pos_embed(x), [], 0
    for block in model.transformer_blocks:
        embedding = block.norm1.emb(timestep, labels, hidden_dtype=hidden.dtype)
        b1, g1, a1, b2, g2, a2 = (
            part[:, None] for part in block.norm1.linear(F.silu(embedding)).chunk(6, dim=1)
        )
        for shift, gain, gate, layer, eps in (
            (b1, g1, a1, block.attn1, 1e-6), (b2, g2, a2, block.ff, 1e-5),
        ):  # fmt: skip
            out = layer(F.layer_norm(hidden, hidden.shape[-1:], eps=eps) * (1 + gain) + shift)
            if weights is not None:
                out = (1 - weights[entry]) * cached[entry] + weights[entry] * out
            outputs.append(out)
            hidden = hidden + gate * out
            entry += 1
    embedding = model.transformer_blocks[0].norm1.emb(timestep, labels, hidden_dtype=hidden.dtype)
    shift, gain = model.proj_out_1(F.silu(embedding))[:, None].chunk(2, dim=-1)
    hidden = model.proj_out_2(model.norm_out(hidden) * (1 + gain) + shift)
    p, side = model.config.patch_size, 4
    hidden = hidden.unflatten(1, (side, side)).unflatten(3, (p, p, model.config.out_channels))
    return torch.einsum("bhwpqc->bchpwq", hidden).flatten(4).flatten(2, 3), outputs


@pytest.mark.parametrize("out_channels", [2, 4], ids=["noise", "noise-and-variance"])
def test_the_first_loss_is_the_published_one(tmp_path, out_channels):
    model = tiny_dit(num_layers=2, out_channels=out_channels)
    settings = replace(SETTINGS, num_steps=1, seed=4)

    _, history = train(tmp_path, model, settings, sparsity=0.01, label_dropout=0.5)

    generator = torch.Generator().manual_seed(4)
    counter = 2 * int(torch.randint(4, (), generator=generator))
    latents, labels = draw(generator)
    labels = torch.where(torch.rand(2, generator=generator) < 0.5, 10, labels)
    noise = torch.randn(latents.shape, generator=generator)
    scheduler = make_scheduler()
    before, now = (scheduler.timesteps[STEPS - 1 - c] for c in (counter + 1, counter))
    noisy = scheduler.add_noise(latents, noise, before.expand(2))
    with torch.no_grad():
        predicted, cached = forward(model, noisy, before.expand(2), labels)
        x = scheduler.step(predicted[:, :2], before, noisy).prev_sample
        whole, _ = forward(model, x, now.expand(2), labels)
        weights = CacheRouter(2, STEPS, seed=4)(counter)
        blended, _ = forward(model, x, now.expand(2), labels, cached, weights)
    loss = (blended - whole).square().mean() + 0.01 * weights.sum()
    assert history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert history[0]["error"] == pytest.approx((loss - 0.01 * weights.sum()).item(), rel=1e-3)


def test_the_error_falls_where_computing_costs_nothing(tmp_path):
    config, history = train(tmp_path, settings=replace(SETTINGS, num_steps=60))

    start = CacheRouter(2, STEPS).stack()
    assert history[-1]["error"] < history[0]["error"] / 2
    assert (config.logits[COUNTERS] > start[COUNTERS]).all()


def test_everything_is_skipped_where_computing_costs_too_much(tmp_path):
    config, history = train(tmp_path, settings=replace(SETTINGS, num_steps=60), sparsity=1e4)

    assert config.skipped_share == history[-1]["skipped"] == 1.0
    assert config.logits.min() >= -5


@pytest.mark.parametrize("steps", [8, 9])
def test_only_the_routers_of_steps_that_are_not_full_are_trained(tmp_path, steps):
    config, _ = train(tmp_path, scheduler=make_scheduler(steps))

    moved = (config.logits != CacheRouter(2, steps).stack()).any(dim=1)
    assert moved.nonzero().flatten().tolist() == COUNTERS == config.cached_counters


def test_another_seed_learns_from_another_start(tmp_path):
    (tmp_path / "other").mkdir()

    first, _ = train(tmp_path)
    other, _ = train(tmp_path / "other", settings=replace(SETTINGS, seed=1))

    assert first != other


def test_a_run_in_two_parts_gives_the_same_router(tmp_path):
    (tmp_path / "whole").mkdir()
    whole, _ = train(tmp_path / "whole")

    train(tmp_path, settings=replace(SETTINGS, num_steps=10))
    parts, _ = train(tmp_path)

    assert parts == whole


def test_the_transformer_is_left_as_it_was(tmp_path):
    model = tiny_dit(num_layers=2)
    model.train()
    model.proj_out_2.weight.requires_grad_()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    train(tmp_path, model, replace(SETTINGS, num_steps=2))

    assert model.training
    trainable = [name for name, value in model.named_parameters() if value.requires_grad]
    assert trainable == ["proj_out_2.weight"]
    assert model.proj_out_2.weight.grad is None
    assert not any(module._forward_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_checkpoint_of_another_sparsity_is_refused(tmp_path):
    train(tmp_path, settings=replace(SETTINGS, num_steps=2), sparsity=0.5)

    with pytest.raises(ValueError, match=r"of a run with sparsity 0.25, got .* with sparsity 0.5"):
        train(tmp_path, sparsity=0.25)


def test_a_model_that_gives_nan_stops_the_training(tmp_path):
    model = tiny_dit(num_layers=2)
    model.proj_out_2.weight.fill_(torch.nan)

    with pytest.raises(DivergedError, match="in step 1; the last good checkpoint is none"):
        train(tmp_path, model)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"scheduler": make_scheduler(1)}, "scheduler must be set to at least 2 steps, got 1"),
        (
            {"scheduler": make_scheduler(prediction_type="v_prediction")},
            "scheduler must have prediction_type 'epsilon', got 'v_prediction'",
        ),
        (
            {"scheduler": EulerDiscreteScheduler()},
            "scheduler must have alphas_cumprod and whole timesteps, as DDIM has, got EulerDisc",
        ),
        (
            {"scheduler": FlowMatchEulerDiscreteScheduler()},
            "scheduler must have alphas_cumprod and whole timesteps, as DDIM has, got FlowMatch",
        ),
        ({"sparsity": -1.0}, "sparsity must be at least 0, got -1.0"),
    ],
    ids=["steps", "prediction", "float-timesteps", "flow", "sparsity"],
)
def test_what_cannot_be_trained_is_refused(tmp_path, options, sentence):
    with pytest.raises(ValueError, match=f"train_router: {sentence}"):
        train(tmp_path, **options)

    assert list(tmp_path.iterdir()) == []


def test_another_model_is_refused(tmp_path):
    with pytest.raises(UnsupportedInputError, match=r"^train_router: transformer must be one of"):
        train(tmp_path, torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedInputError, match="conditioned by class_labels alone, got Pix"):
        train(tmp_path, tiny_pixart())


def step_inputs(index):
    timestep = torch.full((2,), 900 - 100 * index)
    return {"timestep": timestep, "class_labels": torch.arange(2)}, randn(2, 2, 8, 8, seed=index)


@pytest.mark.parametrize(
    "logits",
    [
        torch.full((STEPS, 6), 5.0),
        torch.full((STEPS, 6), -5.0),
        CacheRouter(3, STEPS, seed=1).stack(),
    ],
    ids=["all", "none", "some"],
)
def test_a_router_runs_as_it_was_blended_in_training(logits):
    config = LearningToCacheConfig(logits, threshold=0.5)
    wanted_model, model = tiny_dit(), tiny_dit()
    superposition = Superposition(wanted_model)
    sites = list(find_sublayers(wanted_model))
    apply_token_cache(model, config)

    for index in range(2 * STEPS):  # two runs
        named, x = step_inputs(index % STEPS)
        counter = STEPS - 1 - index % STEPS
        with torch.no_grad():
            if counter % 2 == 1:
                with superposition.recording():
                    wanted = wanted_model(x, **named).sample
            else:
                weights = (logits[counter].sigmoid() > 0.5).float()
                with superposition.blending(dict(zip(sites, weights, strict=True))):
                    wanted = wanted_model(x, **named).sample
            got = model(x, **named).sample

        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_guidance_in_two_calls_has_two_caches_in_the_order_of_uvit():
    config = LearningToCacheConfig(CacheRouter(3, STEPS).stack(), 0.5, counts_down=False)
    together, alone = tiny_dit(), {"cond": tiny_dit(), "uncond": tiny_dit()}
    for model in (together, *alone.values()):
        apply_token_cache(model, config)

    for index in range(STEPS):
        for name, model in alone.items():
            named, x = step_inputs(index)
            x = x if name == "cond" else -x
            with torch.no_grad(), token_cache_context(together, name):
                got = together(x, **named).sample
            with torch.no_grad():
                wanted = model(x, **named).sample
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("depth", [2, 4])
def test_a_router_for_another_depth_is_refused_and_nothing_is_hooked(depth):
    model = tiny_dit()
    config = LearningToCacheConfig(CacheRouter(depth, STEPS).stack())

    with pytest.raises(ValueError, match=f"policy must be for 3 blocks, got one for {depth}"):
        apply_token_cache(model, config)

    assert not any(hasattr(module, "_diffusers_hook") for module in model.modules())
