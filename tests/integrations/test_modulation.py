"""``precompute_modulation`` on real models: as exact as the model's own steps, and never stale."""

import logging
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
)
from torch import nn

from tokencache_kernels.errors import UnsupportedInputError
from tokencache_kernels.integrations.diffusers import (
    apply,
    apply_token_cache,
    count_graph_steps,
    precompute_modulation,
    remove_precomputed_modulation,
    remove_token_cache,
    reset_token_cache,
    token_cache_context,
)
from tokencache_kernels.integrations.diffusers.modulation import read_modulation
from tokencache_kernels.models import SPECS
from tokencache_kernels.policies import RandomSelector, random_tokens
from tokencache_kernels.testing import (
    Tape,
    randn,
    tiny_dit,
    tiny_flux,
    tiny_pixart,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
STEPS = 6
# steps 0 and 3 are full; which tokens are fresh does not depend on rounding
POLICY = replace(random_tokens(0.4, 3, STEPS), selector=RandomSelector(shares_guidance=False))


@dataclass(frozen=True)
class DiT:
    """The arguments of a sampler; a ``prompt`` is a seed."""

    batch: int = 2
    dtype: torch.dtype = torch.float32

    def make(self):
        return tiny_dit().to(self.dtype)

    def times(self):
        return torch.arange(900, 0, -150)

    def norms(self, model):
        return [block.norm1 for block in model.transformer_blocks]

    def conditioning(self, prompt=0, device="cpu"):
        return {"class_labels": (torch.arange(self.batch, device=device) + prompt) % 10}

    def inputs(self, step, device="cpu"):
        latents = randn(self.batch, 2, 8, 8, dtype=self.dtype, device=device, seed=10 + step)
        timestep = self.times()[step].to(device).expand(self.batch)
        return {"hidden_states": latents, "timestep": timestep}


@dataclass(frozen=True)
class Flux(DiT):
    has_guidance: bool = True

    def make(self):
        return tiny_flux(guidance_embeds=self.has_guidance).to(self.dtype)

    def times(self):
        # a thousandth of each is exact in every dtype
        return 1000 / 64 * torch.tensor([64.0, 60.0, 52.0, 42.0, 29.0, 13.0])

    def norms(self, model):
        doubles = [
            norm
            for block in model.transformer_blocks
            for norm in (block.norm1, block.norm1_context)
        ]
        singles = [block.norm for block in model.single_transformer_blocks]
        return [*doubles, *singles, model.norm_out]

    def conditioning(self, prompt=0, device="cpu"):
        pooled = randn(self.batch, 6, dtype=self.dtype, device=device, seed=prompt)
        guidance = torch.full((self.batch,), 3.5, device=device) if self.has_guidance else None
        return {"pooled_projections": pooled, "guidance": guidance}

    def inputs(self, step, device="cpu"):
        timestep = self.times()[step].to(device).expand(self.batch).to(self.dtype)
        return {
            "hidden_states": randn(
                self.batch, 12, 4, dtype=self.dtype, device=device, seed=10 + step
            ),
            "timestep": timestep / 1000,
            "encoder_hidden_states": randn(self.batch, 5, 10, dtype=self.dtype, device=device),
            "img_ids": torch.arange(36.0, device=device).view(12, 3) % 5,
            "txt_ids": torch.zeros(5, 3, device=device),
        }


FAMILIES = [
    pytest.param(DiT(), id="dit"),
    pytest.param(Flux(), id="flux"),
    pytest.param(Flux(batch=1, has_guidance=False), id="flux-schnell"),
]
IDS = {"ids": lambda policy: policy.name if policy else "dense"}


def scheduler_of(family, device="cpu"):
    return SimpleNamespace(timesteps=family.times().to(device))


def call(model, family, step, conditioning):
    """One step; the conditioning is handed over as it is."""
    inputs = family.inputs(step, next(model.parameters()).device)
    with torch.no_grad():
        return model(**inputs, **conditioning).sample


def run(model, family, prompt=0, steps=range(STEPS)):
    conditioning = family.conditioning(prompt, next(model.parameters()).device)
    return torch.stack([call(model, family, step, conditioning) for step in steps])


def make(family, policy=None, precomputed=True, device="cpu"):
    model = family.make().to(device)
    if policy is not None:
        apply_token_cache(model, policy)
    if precomputed:
        precompute_modulation(model, scheduler_of(family, device))
    return model


def count_calls(modules):
    """The rows of every call of each module."""
    rows = {module: [] for module in modules}
    for module in modules:
        module.register_forward_hook(lambda module, inputs, _: rows[module].append(len(inputs[0])))
    return list(rows.values())


# --- exact ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [None, POLICY], **IDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_runs_are_as_exact_as_with_the_models_own_vectors(device, family, policy):
    exactly = replace(family, dtype=torch.float64)
    precomputed = make(family, policy, device=device)
    plain = make(family, policy, precomputed=False, device=device)
    exact = make(exactly, policy, precomputed=False, device=device)
    for parameter, own in zip(exact.parameters(), plain.parameters(), strict=True):
        parameter.data.copy_(own)

    for prompt in (0, 3):
        wanted, own = run(exact, exactly, prompt), run(plain, family, prompt)
        # products of many rows are rounded otherwise than those of one
        budget = 4 * (own - wanted).abs().max().item()
        torch.testing.assert_close(
            run(precomputed, family, prompt).double(), wanted, rtol=0, atol=budget
        )


@pytest.mark.parametrize("policy", [None, POLICY], **IDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_is_called_once_a_run(device, family, policy):
    model = make(family, policy, device=device)
    calls = count_calls([norm.linear for norm in family.norms(model)])

    for prompt in range(3):
        run(model, family, prompt)

    assert all(rows == 3 * [STEPS * family.batch] for rows in calls)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vectors_are_the_ones_that_the_norms_make(family):
    """In bfloat16, where FLUX's own rounding of its timesteps has to be followed."""
    family = replace(family, dtype=torch.bfloat16)
    model, plain = make(family), make(family, precomputed=False)
    read, made = [], []
    for norm, own in zip(family.norms(model), family.norms(plain), strict=True):
        norm.register_forward_pre_hook(
            lambda norm, _: read.append(torch.cat(read_modulation(norm), dim=1))
        )
        own.linear.register_forward_hook(lambda linear, _, output: made.append(output))

    run(model, family)
    run(plain, family)

    for vectors, output in zip(read, made, strict=True):
        torch.testing.assert_close(vectors, output)


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_contexts_have_their_own_runs(device, family):
    model = make(family, POLICY, precomputed=False, device=device)
    alone = make(family, POLICY, device=device)
    prompts = {"cond": 0, "uncond": 5}
    # as a pipeline has that was used before: by then diffusers has listed the hooked parts
    with token_cache_context(model, "cond"):
        run(model, family, steps=[0])
    precompute_modulation(model, scheduler_of(family, device))
    (calls,) = count_calls([family.norms(model)[0].linear])

    for prompt in (0, 1):
        given = {name: family.conditioning(prompt + own, device) for name, own in prompts.items()}
        outputs = {name: [] for name in prompts}
        for step in range(STEPS):
            for name, conditioning in given.items():
                with token_cache_context(model, name):
                    outputs[name].append(call(model, family, step, conditioning))
        for name, own in prompts.items():
            wanted = run(alone, family, prompt + own)
            torch.testing.assert_close(torch.stack(outputs[name]), wanted, rtol=0, atol=0)

    assert len(calls) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_other_conditioning_begins_a_new_run_at_any_step(family):
    model, plain = make(family), make(family, precomputed=False)
    first, second = family.conditioning(0), family.conditioning(3)

    for step in range(STEPS):
        conditioning = first if step < 2 else second
        out, wanted = (call(one, family, step, conditioning) for one in (model, plain))
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


def test_each_sample_may_have_a_timestep_of_its_own():
    family = DiT()
    model, plain = make(family), make(family, precomputed=False)
    inputs = family.inputs(0) | {"timestep": family.times()[[4, 1]]} | family.conditioning()

    with torch.no_grad():
        out, wanted = model(**inputs).sample, plain(**inputs).sample

    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


def test_sigmas_are_timesteps_but_for_their_rounding():
    """As they are handed over by samplers that divide no timestep."""
    family = Flux()
    model, plain = make(family, precomputed=False), make(family, precomputed=False)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(50)
    precompute_modulation(model, scheduler)
    conditioning = family.conditioning()
    rounded = scheduler.timesteps / 1000 != scheduler.sigmas[:-1]
    assert rounded.any()

    for sigma in scheduler.sigmas[:-1][rounded][:3]:
        inputs = family.inputs(0) | {"timestep": sigma.expand(family.batch)} | conditioning
        with torch.no_grad():
            out, wanted = model(**inputs).sample, plain(**inputs).sample
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)


def test_one_row_of_conditioning_serves_every_batch():
    model, plain = make(DiT()), make(DiT(), precomputed=False)
    labels = DiT(batch=1).conditioning(4)

    for batch in (3, 1, 2):
        out, wanted = (call(one, DiT(batch), 0, labels) for one in (model, plain))
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


def test_layers_that_stand_in_for_others_are_called_as_they_are():
    """LoRA that is loaded after the modulation was precomputed."""

    class Adapted(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x) + 0.3 * x.mean(dim=1, keepdim=True)

    family = Flux()
    model, plain = make(family, POLICY), make(family, POLICY, precomputed=False)
    run(model, family)
    for one in (model, plain):
        for norm in family.norms(one):
            norm.linear = Adapted(norm.linear)

    torch.testing.assert_close(run(model, family), run(plain, family), rtol=1e-5, atol=1e-5)


# --- never stale ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", [None, POLICY], **IDS)
def test_a_timestep_that_is_not_the_schedulers_gives_nan(device, family, policy):
    model = make(family, policy, device=device)
    conditioning = family.conditioning(device=device)
    call(model, family, 0, conditioning)
    inputs = family.inputs(1, device)
    inputs["timestep"] = inputs["timestep"].clone()
    inputs["timestep"][0] -= 1

    with torch.no_grad():
        out = model(**inputs, **conditioning).sample

    assert out[0].isnan().all()
    assert not out[1:].isnan().any()


@pytest.mark.parametrize("family", FAMILIES)
def test_conditioning_written_in_place_gives_nan_until_the_next_run(family):
    model, plain = make(family), make(family, precomputed=False)
    for name, given in family.conditioning().items():
        if given is None:
            continue
        conditioning = family.conditioning() | {name: given}
        call(model, family, 0, conditioning)

        given[0] += 1
        out = call(model, family, 1, conditioning)
        reset_token_cache(model)
        again, wanted = (call(one, family, 1, conditioning) for one in (model, plain))

        assert out[0].isnan().all()
        assert not out[1:].isnan().any()
        torch.testing.assert_close(again, wanted, rtol=1e-5, atol=1e-5)
        reset_token_cache(model)


def test_conditioning_written_in_place_between_runs_is_seen():
    family = DiT()
    model, plain = make(family), make(family, precomputed=False)
    labels = family.conditioning()
    for step in range(STEPS):
        call(model, family, step, labels)

    labels["class_labels"] += 1
    out, wanted = (call(one, family, 0, labels) for one in (model, plain))

    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


def test_another_schedule_begins_a_new_run():
    family = DiT()
    scheduler = DDIMScheduler()
    model, plain = make(family, precomputed=False), make(family, precomputed=False)
    precompute_modulation(model, scheduler)
    labels = family.conditioning()

    for num_steps in (4, 7):
        # the first run is broken off
        scheduler.set_timesteps(num_steps)
        for timestep in scheduler.timesteps[:3]:
            inputs = family.inputs(0) | {"timestep": timestep.expand(family.batch)} | labels
            with torch.no_grad():
                out, wanted = model(**inputs).sample, plain(**inputs).sample
            torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_that_breaks_off_leaves_nothing_behind(family, error):
    model, plain = make(family), make(family, precomputed=False)
    conditioning = family.conditioning()
    call(model, family, 0, conditioning)

    def break_off(*_):
        raise error

    last = family.norms(model)[-1]
    with last.norm.register_forward_hook(break_off), pytest.raises(error):
        call(model, family, 1, conditioning)

    # torch ends no call that is interrupted
    assert read_modulation(last) is None or error is KeyboardInterrupt
    torch.testing.assert_close(run(model, family, 3), run(plain, family, 3), rtol=1e-5, atol=1e-5)


# --- captured steps -------------------------------------------------------------------------------


@pytest.mark.parametrize("comes_first", [True, False])
def test_captured_steps_read_the_vectors_of_their_call(monkeypatch, comes_first):
    """A tape stands for CUDA; whichever of the two is applied first, it captures no table."""
    monkeypatch.setattr(apply, "CudaCapture", Tape)
    family = Flux() if comes_first else DiT()
    model, uncaptured = make(family, precomputed=comes_first), make(family, POLICY)
    apply_token_cache(model, POLICY, cuda_graphs=True)
    if not comes_first:
        precompute_modulation(model, scheduler_of(family))

    for prompt in range(3):
        out, wanted = (run(one, family, prompt) for one in (model, uncaptured))
        torch.testing.assert_close(out, wanted, rtol=0, atol=0)
    assert count_graph_steps(model).replayed > STEPS

    conditioning = family.conditioning()
    call(model, family, 0, conditioning)
    stray = family.inputs(1)
    stray["timestep"] = stray["timestep"] - 1
    with torch.no_grad():
        assert model(**stray, **conditioning).sample.isnan().all()


def test_nothing_captured_outlives_the_vectors_that_it_reads(monkeypatch):
    monkeypatch.setattr(apply, "CudaCapture", Tape)
    family = DiT()
    model, plain = family.make(), make(family, POLICY, precomputed=False)
    apply_token_cache(model, POLICY, cuda_graphs=True)

    for prompt, is_precomputed in enumerate((False, True, False)):
        if is_precomputed:
            precompute_modulation(model, scheduler_of(family))
        else:
            remove_precomputed_modulation(model)
        run(model, family, prompt)
        # broken off where the next steps would be replayed
        run(model, family, prompt, range(2))
    remove_precomputed_modulation(model)

    torch.testing.assert_close(run(model, family, 5), run(plain, family, 5), rtol=0, atol=0)


# --- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_read_from_the_same_addresses_in_every_run(family):
    """A captured graph relies on it."""
    model = make(family, POLICY)
    addresses = []

    def note(block, _):
        addresses.append(read_modulation(block.norm1)[0].data_ptr())

    for block in model.transformer_blocks:
        block.register_forward_pre_hook(note)

    for prompt in (0, 1):
        run(model, family, prompt)

    assert len(set(addresses)) == len(model.transformer_blocks)
    assert len(addresses) == 2 * STEPS * len(model.transformer_blocks)


def test_the_vectors_of_a_run_take_what_the_docstring_says(caplog):
    family = Flux()
    model = make(family)
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "tokencache_kernels"):
        run(model, family)

    # two double blocks, three single ones, the last norm and the embedding; a row of NaN
    num_vectors = 2 * 12 + 3 * 3 + 2 + 1
    size = (STEPS * family.batch + 1) * num_vectors * 24 * 4
    assert caplog.messages == [
        f"precompute_modulation: {STEPS} steps, batch {family.batch}: {size} bytes"
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_removed_leaves_the_original_bit_for_bit(family):
    model = family.make()
    original = run(model, family)

    precompute_modulation(model, scheduler_of(family))
    run(model, family)
    remove_precomputed_modulation(model)
    calls = count_calls([norm.linear for norm in family.norms(model)])

    torch.testing.assert_close(run(model, family), original, rtol=0, atol=0)
    assert all(len(rows) == STEPS for rows in calls)


@pytest.mark.parametrize("family", FAMILIES)
def test_modulation_and_token_cache_come_and_go_in_any_order(family):
    model = make(family)
    apply_token_cache(model, POLICY)
    remove_token_cache(model)
    calls = count_calls([norm.linear for norm in family.norms(model)])
    dense = run(model, family)
    assert all(len(rows) == 1 for rows in calls)

    apply_token_cache(model, POLICY)
    remove_precomputed_modulation(model)
    precompute_modulation(model, scheduler_of(family))
    cached = run(model, family)

    torch.testing.assert_close(dense, run(make(family), family), rtol=0, atol=0)
    torch.testing.assert_close(cached, run(make(family, POLICY), family), rtol=0, atol=0)


# --- with diffusers' schedulers and pipelines -----------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str
)
def test_flux_with_true_guidance_and_a_schedule_by_size(dtype, tolerance):
    """The calls of ``FluxPipeline``: two contexts, timesteps that are known when the run begins."""
    family = Flux(batch=1, dtype=dtype)
    samples = []
    for is_precomputed in (False, True):
        model = make(family, POLICY, precomputed=False)
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        if is_precomputed:
            precompute_modulation(model, scheduler)
        calls = count_calls([model.norm_out.linear])
        for prompt, mu in ((0, 0.5), (4, 1.15)):
            prompts = {name: family.conditioning(prompt + i) for i, name in enumerate("ab")}
            scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / STEPS, STEPS).tolist(), mu=mu)
            latents = randn(1, 12, 4, dtype=dtype)
            for time in scheduler.timesteps:
                inputs = family.inputs(0) | {"hidden_states": latents}
                inputs["timestep"] = time.expand(1).to(dtype) / 1000
                noise = []
                for name, conditioning in prompts.items():
                    with token_cache_context(model, name), torch.no_grad():
                        noise.append(model(**inputs, **conditioning).sample)
                latents = scheduler.step(2 * noise[0] - noise[1], time, latents).prev_sample
            samples.append(latents)
        assert len(calls[0]) == (4 if is_precomputed else 4 * STEPS)

    plain, precomputed = torch.stack(samples).chunk(2)
    torch.testing.assert_close(precomputed, plain, rtol=tolerance, atol=tolerance)


def test_dit_pipeline():
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=1, latent_channels=2)
    images = []
    for is_precomputed in (False, True):
        transformer = tiny_dit(num_embeds_ada_norm=1000, out_channels=4)
        pipe = DiTPipeline(transformer, vae, DDIMScheduler())
        pipe.set_progress_bar_config(disable=True)
        apply_token_cache(transformer, POLICY)
        if is_precomputed:
            precompute_modulation(transformer, pipe.scheduler)
        generator = torch.Generator().manual_seed(0)
        images.append(
            [
                pipe(labels, num_inference_steps=STEPS, generator=generator, output_type="pt")
                for labels in ([1, 2], [3, 4])
            ]
        )

    for image, wanted in zip(*images, strict=True):
        torch.testing.assert_close(image.images, wanted.images, rtol=1e-4, atol=1e-4)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_cannot_begin_with_another_timestep(family):
    model = make(family)
    inputs = family.inputs(0) | family.conditioning()
    inputs["timestep"] = inputs["timestep"] * 0.7

    with pytest.raises(ValueError, match="timestep must be the scheduler's, as diffusers'"):
        model(**inputs)


def test_training_and_gradients_are_refused():
    family = Flux()
    model = make(family)
    inputs = family.inputs(0) | family.conditioning()

    model.train()
    with pytest.raises(ValueError, match="must be in evaluation mode, got training mode"):
        model(**inputs)
    model.eval().requires_grad_(True)
    with pytest.raises(ValueError, match="must be called without gradients"):
        model(**inputs)
    with torch.no_grad():
        model(**inputs)


def test_autocast_is_refused():
    """FLUX would round its timesteps to a dtype that shows only inside."""
    model = make(Flux())

    refused = pytest.raises(UnsupportedInputError, match=r"called without torch.autocast, got")
    with refused, torch.autocast("cpu", torch.bfloat16):
        run(model, Flux())


def test_missing_conditioning_and_timesteps_that_are_numbers_are_refused():
    model = make(DiT())
    inputs = DiT().inputs(0)

    with pytest.raises(ValueError, match="class_labels must be a tensor, got None"):
        model(**inputs)
    with pytest.raises(ValueError, match="timestep must be a tensor, got 980"):
        model(**inputs | {"timestep": 980})


def test_what_is_no_scheduler_is_refused():
    model = tiny_dit()

    with pytest.raises(ValueError, match="scheduler must have timesteps, got DiTTransformer"):
        precompute_modulation(model, model)
    precompute_modulation(model, SimpleNamespace(timesteps=None))
    with pytest.raises(ValueError, match="must have its timesteps, a tensor, when a run"):
        run(model, DiT())


def test_models_without_described_vectors_are_refused():
    spec = replace(SPECS["PixArtTransformer2DModel"], embedders=())

    with pytest.raises(UnsupportedInputError, match="vectors that are described, got PixArt"):
        precompute_modulation(tiny_pixart(), DDIMScheduler(), spec=spec)
    with pytest.raises(UnsupportedInputError, match=r"must be one of .*, got Linear"):
        precompute_modulation(nn.Linear(2, 2), DDIMScheduler())


def test_other_norms_are_refused():
    class Other(nn.Module):
        pass

    model = tiny_flux()
    model.single_transformer_blocks[1].norm = Other()

    with pytest.raises(UnsupportedInputError, match="got Other"):
        precompute_modulation(model, DDIMScheduler())
    assert read_modulation(model.norm_out) is None


def test_vectors_of_another_dtype_are_refused():
    class Wide(nn.Linear):
        def forward(self, x):
            return super().forward(x).double()

    family = Flux()
    model = make(family)
    model.norm_out.linear = Wide(24, 48)

    with pytest.raises(ValueError, match=r"modulate in torch.float32, got torch.float64"):
        run(model, family)


def test_precomputing_twice_is_refused():
    model = make(DiT())

    with pytest.raises(ValueError, match="call remove_precomputed_modulation first"):
        precompute_modulation(model, DDIMScheduler())
