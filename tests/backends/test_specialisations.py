"""Whole runs compile each kernel once: values that change from step to step are not specialised."""

from collections import defaultdict

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("diffusers")

from tokencache_kernels.backends import triton
from tokencache_kernels.integrations.diffusers import apply_token_cache
from tokencache_kernels.policies import DuCaConfig, ToCaConfig
from tokencache_kernels.testing import randn, tiny_dit, tiny_flux, tiny_pixart
from tokencache_kernels.testing.counting import record_specialisations

# 64 channels: like those of real models, their rows begin at multiples of 16 bytes
WIDE = {"num_attention_heads": 4, "attention_head_dim": 16}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _can_run(device):
    reason = triton.unavailable(torch.device(device), torch.float32)
    if reason is not None or device != "cpu":
        pytest.skip(f"triton: {reason or 'compiled kernels are not recorded'}")


def run_dit(policy):
    model = tiny_dit(num_layers=4, **WIDE)
    apply_token_cache(model, policy, backend="triton")
    labels = torch.arange(2)
    for step in range(policy.num_inference_steps):
        timestep = torch.full((2,), 900 - step)
        model(randn(2, 2, 8, 8, seed=step), timestep=timestep, class_labels=labels)


def run_pixart(policy):
    model = tiny_pixart(num_layers=4, cross_attention_dim=64, **WIDE)
    apply_token_cache(model, policy, backend="triton")
    text, mask = randn(2, 7, 10), torch.ones(2, 7, dtype=torch.int64)
    sizes = {"resolution": None, "aspect_ratio": None}
    for step in range(policy.num_inference_steps):
        model(
            randn(2, 2, 8, 8, seed=step),
            encoder_hidden_states=text,
            timestep=torch.full((2,), 900 - step),
            added_cond_kwargs=sizes,
            encoder_attention_mask=mask,
        )


def run_flux(policy):
    model = tiny_flux(num_double=2, num_single=3, attention_head_dim=32, axes_dims_rope=(8, 12, 12))
    apply_token_cache(model, policy, backend="triton")
    text, pooled = randn(1, 6, 10), randn(1, 6)
    places = torch.zeros(25, 3)
    places[:, 1:] = torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0))
    for step in range(policy.num_inference_steps):
        model(
            hidden_states=randn(1, 25, 4, seed=step),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=torch.full((1,), 1 - step / 1000),
            img_ids=places,
            txt_ids=torch.zeros(6, 3),
            guidance=torch.full((1,), 3.5),
        )


RUNS = [
    pytest.param(run_dit, ToCaConfig.preset("dit-xl-ddim50", num_layers=4), id="dit-xl-ddim50"),
    pytest.param(run_dit, ToCaConfig.preset("dit-xl-ddpm250", num_layers=4), id="dit-xl-ddpm250"),
    pytest.param(run_pixart, ToCaConfig.preset("pixart-alpha", num_layers=4), id="pixart-alpha"),
    pytest.param(run_flux, ToCaConfig.preset("flux-1-dev", num_layers=5), id="flux-1-dev"),
    pytest.param(run_dit, DuCaConfig.preset("dit-xl-ddim50", num_layers=4), id="duca-dit"),
]


def changing(seen):
    """Name the arguments in which specialisations of one kernel differ."""
    common = set.intersection(*map(set, seen))
    return {name for one in seen for name, _ in set(one) - common}


@pytest.mark.parametrize(("run", "policy"), RUNS)
def test_no_specialisation_changes_in_mid_run(run, policy):
    with record_specialisations() as found, torch.no_grad():
        run(policy)

    programs = defaultdict(set)
    for kernel, fixed, seen in found:
        programs[kernel, fixed].add(seen)
    assert len({kernel for kernel, _ in programs}) >= 3
    assert {kernel: changing(seen) for (kernel, _), seen in programs.items() if len(seen) > 1} == {}


def test_a_stride_that_is_specialised_is_seen():
    from tokencache_kernels.backends.triton import rows

    x = randn(2, 40, 16)
    kernel = rows._gather_rows_kernel
    kept = kernel.kwargs["do_not_specialize"]
    kernel.kwargs["do_not_specialize"] = ["B", "N", "S"]
    try:
        with record_specialisations() as found:
            for max_fresh in (32, 31):
                rows.gather_rows(x, torch.zeros(2, max_fresh, dtype=torch.int32))
    finally:
        kernel.kwargs["do_not_specialize"] = kept

    assert len(found) == 2
