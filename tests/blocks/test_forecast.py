"""Forecasting: cached outputs move on with their differences, in the row pass."""

from dataclasses import dataclass

import pytest
import torch

from tokencache_kernels import ops
from tokencache_kernels.blocks import ResidualStream, Runner, run_sub_layer
from tokencache_kernels.policies import (
    FactorRouter,
    IntervalSchedule,
    LayerGroup,
    ScoreSelector,
    Site,
    Taylor,
    ToCaConfig,
    taylor_seer,
)
from tokencache_kernels.testing import randn

B, N, D = 2, 6, 8
SITE = Site("main", 0, "mlp")


@dataclass(frozen=True)
class Polynomial:
    """A branch whose output is a polynomial in the step, whatever the stream holds."""

    step: int
    degree: int
    gate: torch.Tensor | None
    site: Site = SITE
    post_norm: ops.RowNorm | None = None

    def compute(self, stream):
        return sum(randn(B, N, D, seed=i) * self.step**i for i in range(self.degree + 1))

    def recompute_(self, cache, stream, indices, positions):
        for sample, tokens in enumerate(indices.long()):
            cache[sample, tokens] = self.compute(stream)[sample, tokens]


def run(policy, degree, gate, norm=None):
    """The term that the branch adds to a stream of zeros in every step."""
    runner = Runner(policy, "reference")
    added = []
    for step in range(policy.num_inference_steps):
        runner.begin_step([LayerGroup((SITE,), N)], B, torch.device("cpu"))
        stream = ResidualStream(torch.zeros(B, N, D), "reference")
        run_sub_layer(stream, runner, Polynomial(step, degree, gate, post_norm=norm))
        added.append(stream.flush())
        runner.end_step()
    return torch.stack(added)


@pytest.mark.parametrize("gate", [None, randn(B, D, seed=9)], ids=["ungated", "gated"])
@pytest.mark.parametrize(("order", "degree"), [(0, 0), (1, 1), (2, 1)])
def test_a_polynomial_is_foretold_exactly(order, degree, gate):
    out = run(taylor_seer(4, 12, order), degree, gate)

    # an interval of 1 computes every step
    torch.testing.assert_close(out, run(taylor_seer(1, 12), degree, gate), rtol=1e-5, atol=1e-4)


def test_the_error_on_a_parabola_is_the_published_formulas():
    """The first difference is the slope half a cycle ago, which explains the error."""
    out = run(taylor_seer(4, 15, 2), 2, None)

    lost = out - run(taylor_seer(1, 15), 2, None)
    curvature = 2 * randn(B, N, D, seed=2)
    for step in (11, 12, 13):
        distance = step - 10
        torch.testing.assert_close(lost[step], -distance * 4 / 2 * curvature, rtol=1e-4, atol=1e-3)


def test_what_does_not_change_is_reused_bit_for_bit():
    gate = randn(B, D)

    forecast, reused = (run(taylor_seer(4, 9, order), 0, gate) for order in (2, 0))

    assert torch.equal(forecast, reused)


def test_what_is_recomputed_is_not_forecast():
    """For a linear feature, fresh rows have the value of their step, and keep it in the cycle."""
    policy = ToCaConfig(
        IntervalSchedule(5, warmup=2),
        FactorRouter(0.5),
        ScoreSelector("none", staleness_weight=1.0),
        num_inference_steps=5,
        carrier=Taylor(1),
    )

    out = run(policy, 1, None)

    start, slope = randn(B, N, D), randn(B, N, D, seed=1)
    # 3 tokens are fresh at 2, the other 3 at 3, the first 3 again at 4
    for step, computed_at in ((2, (2, 2)), (3, (2, 3)), (4, (4, 3))):
        for tokens, at in zip((slice(0, 3), slice(3, 6)), computed_at, strict=True):
            wanted = (start + at * slope)[:, tokens]
            torch.testing.assert_close(out[step][:, tokens], wanted, rtol=1e-5, atol=1e-5)


def test_a_norm_is_of_what_is_foretold():
    norm, gate = ops.RowNorm("rms", randn(D, seed=7)), randn(B, D, seed=9)

    out = run(taylor_seer(4, 12, 1), 1, gate, norm)

    torch.testing.assert_close(out, run(taylor_seer(1, 12), 1, gate, norm), rtol=1e-5, atol=1e-4)
