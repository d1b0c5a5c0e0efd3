"""The summary of a cache's work, and the warning where it does none."""

import logging

import pytest
import torch

from tokencache_kernels.integrations.diffusers import apply_token_cache, cache_summary
from tokencache_kernels.policies import DuCaConfig, ToCaConfig, fora
from tokencache_kernels.testing.families import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def run(model, name, steps, prompt=0):
    for step in steps:
        with torch.no_grad():
            model(**FAMILIES[name].inputs(step, prompt, 2))


def test_steps_tokens_bytes_and_tiers_are_counted():
    name = "SD3Transformer2DModel"
    model = FAMILIES[name].build()
    apply_token_cache(model, fora(3, 6))
    run(model, name, range(6))

    summary = cache_summary(model)

    assert summary.steps == {"full": 2, "partial": 0, "reused": 4, "skipped": 0}
    assert summary.fresh_share == pytest.approx(2 / 6)
    assert summary.cache_bytes["features"] > 0
    assert list(summary.tiers.values()) == [
        "as is: the norm before attn2 is not described", "fused",
        "as is: norm1_context makes 2 vectors",
    ]  # fmt: skip
    assert "2 full, 4 reused" in str(summary)


def test_partial_and_skipped_steps_are_told_apart():
    name = "FluxTransformer2DModel"
    model = FAMILIES[name].build()
    toca = ToCaConfig.constant(0.5, 3, 6)
    apply_token_cache(model, DuCaConfig(toca, skips_odd=True))
    run(model, name, range(6))

    assert cache_summary(model).steps == {"full": 2, "partial": 2, "reused": 0, "skipped": 2}


def test_a_cache_that_saves_nothing_warns_once(caplog):
    name = "FluxTransformer2DModel"
    model = FAMILIES[name].build()
    apply_token_cache(model, fora(3, 6))

    with caplog.at_level(logging.WARNING):
        for prompt in range(6):
            run(model, name, [0], prompt=prompt % 2)

    told = [record for record in caplog.records if "nothing is saved" in record.getMessage()]
    assert len(told) == 1


def test_a_transformer_without_a_cache_is_told():
    with pytest.raises(ValueError, match="cache_summary: transformer must have a token cache"):
        cache_summary(FAMILIES["DiTTransformer2DModel"].build())
