"""Carriers inside a model, against the model's own modules with outputs put in their place."""

import re

import numpy as np
import pytest
import torch

from tokencache_kernels.integrations.diffusers import apply_token_cache
from tokencache_kernels.policies import (
    REUSE,
    Chebyshev,
    FactorRouter,
    Hermite,
    Newton,
    ScoreSelector,
    StepSchedule,
    Taylor,
    ToCaConfig,
)
from tokencache_kernels.testing.families import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
STEPS = 9
FULL = (0, 2, 3, 6)
# the modules with cached outputs, which the block around them gates anew
KEPT = {
    "DiTTransformer2DModel": r"\.(attn1|ff)$",
    "FluxTransformer2DModel": r"^transformer_blocks\.\d+\.(attn|ff|ff_context)$|\.proj_out$",
}


def differences(steps, values, order):
    """Every order's divided backward difference, as published: by the gap before."""
    known = []
    for place, value in enumerate(values):
        new = [value]
        for i, before in enumerate(known[:order]):
            new.append((new[i] - before) / (steps[place] - steps[place - 1]))
        known = new
    return known


def taylor(order):
    def expect(steps, values, index):
        x = index - steps[-1]
        factors = (1, x, x**2 / 2, x**3 / 6)
        return sum(f * d for f, d in zip(factors, differences(steps, values, order), strict=False))

    return expect


def newton(order):
    def expect(steps, values, index):
        steps, values = steps[-1 - order :], values[-1 - order :]
        powers = np.vander(steps, increasing=True)
        weights = np.linalg.solve(powers.T, [float(index) ** i for i in range(len(steps))])
        return sum(w * v for w, v in zip(weights.tolist(), values, strict=True))

    return expect


def hermite(order, scale):
    def expect(steps, values, index):
        at = [1.0]
        for i in range(1, order + 1):
            point = scale * (index - steps[-1])
            value = np.polynomial.hermite.hermval(point, [0] * i + [1])
            at.append(scale**i * value / (1, 1, 2, 6)[i])
        return sum(f * d for f, d in zip(at, differences(steps, values, order), strict=False))

    return expect


def chebyshev(order, degree, ridge):
    def expect(steps, values, index):
        used = np.array(steps[-1 - order :])
        place = lambda step: 2 * step / (STEPS - 1) - 1  # noqa: E731
        fewer = min(degree, len(used) - 1)
        basis = np.polynomial.chebyshev.chebvander(place(used), fewer)
        point = np.polynomial.chebyshev.chebvander(np.array([place(index)]), fewer)[0]
        fitted = point @ np.linalg.solve(basis.T @ basis + ridge * np.eye(fewer + 1), basis.T)
        changes = [value - values[-1] for value in values[-1 - order :]]
        return values[-1] + sum(w * c for w, c in zip(fitted.tolist(), changes, strict=True))

    return expect


CARRIERS = {
    "reuse": (REUSE, lambda steps, values, index: values[-1]),
    "taylor-2": (Taylor(2), taylor(2)),
    "taylor-3": (Taylor(3), taylor(3)),
    "newton-1": (Newton(1), newton(1)),
    "newton-2": (Newton(2), newton(2)),
    "hermite-2": (Hermite(2, 0.4), hermite(2, 0.4)),
    "chebyshev": (Chebyshev(3, STEPS, 2, 1e-2), chebyshev(3, 2, 1e-2)),
}


def run(model, name, steps=range(STEPS)):
    given = [FAMILIES[name].inputs(step, 0, 2) for step in steps]
    return torch.stack([model(**inputs, return_dict=False)[0] for inputs in given])


def run_by_hand(model, name, expect):
    """Full steps run the model. In others its modules answer with the forecast of their outputs."""
    kept = {}
    now = 0

    def hook(module, given, output):
        parts = output if isinstance(output, tuple) else (output,)
        steps, stored = kept.setdefault(module, ([], []))
        if now in FULL:
            steps.append(now)
            stored.append(parts)
            return output
        answer = tuple(expect(steps, list(values), now) for values in zip(*stored, strict=True))
        return answer if isinstance(output, tuple) else answer[0]

    pattern = KEPT[type(model).__name__]
    hooks = [
        module.register_forward_hook(hook)
        for path, module in model.named_modules()
        if re.search(pattern, path) and "blocks" in path and "to_out" not in path
    ]
    assert len(hooks) >= 4
    outputs = []
    for now in range(STEPS):
        outputs.append(run(model, name, [now])[0])
    for one in hooks:
        one.remove()
    return torch.stack(outputs)


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "FluxTransformer2DModel"])
@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("tier", ["auto", "as_is"])
@torch.no_grad()
def test_a_carrier_gives_what_plain_pytorch_expects(name, carrier, tier):
    own, expect = CARRIERS[carrier]
    model = FAMILIES[name].build()
    wanted = run_by_hand(model, name, expect)

    apply_token_cache(
        model,
        ToCaConfig(
            StepSchedule(FULL, STEPS), FactorRouter(0.0), ScoreSelector("none"), STEPS, carrier=own
        ),
        tier=tier,
    )

    torch.testing.assert_close(run(model, name), wanted, rtol=1e-4, atol=1e-5)
