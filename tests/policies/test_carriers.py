"""Carriers against formulas of their own: numpy's polynomials and the differences kept."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokencache_kernels.cache import FeatureCache, Trend
from tokencache_kernels.policies import Chebyshev, Hermite, Newton, Taylor
from tokencache_kernels.policies.carriers import (
    describe_carrier,
    make_carrier,
    to_factors,
    to_weights,
)

STEPS = st.lists(st.integers(0, 60), min_size=1, max_size=4, unique=True).map(sorted)


def keep(stored, values, order):
    """The differences that the cache keeps of ``values`` stored at ``stored``."""
    cache = FeatureCache()
    for place, value in enumerate(values):
        gap = stored[place] - stored[place - 1] if place else 0
        cache.store("site", value, Trend(min(place, order), gap))
    kept = cache.differences("site", (1.0,) * min(len(stored), 1 + order))
    return [cache.load("site"), *(difference for difference, _ in kept)]


def foretell(carrier, stored, values, index):
    differences = keep(stored, values, carrier.order)
    factors = carrier.factors(stored, index)
    assert len(factors) == len(differences)
    return sum(f * d for f, d in zip(factors, differences, strict=True))


def cubes(stored, degree=3):
    """Values of four polynomials of a degree at the stored steps, and the polynomials."""
    coefficients = np.random.default_rng(0).normal(size=(degree + 1, 4)) / 10.0 ** np.arange(
        degree + 1
    ).reshape(-1, 1)
    at = np.polynomial.polynomial.polyval
    values = [torch.tensor(at(step, coefficients)) for step in stored]
    return values, lambda step: torch.tensor(at(step, coefficients))


@given(stored=STEPS, ahead=st.integers(0, 9), order=st.integers(0, 2))
def test_taylor_has_the_published_factors(stored, ahead, order):
    factors = Taylor(order).factors(stored, stored[-1] + ahead)

    assert factors == (1.0, ahead, ahead**2 / 2)[: min(len(stored), 1 + order)]


@given(stored=STEPS, ahead=st.integers(0, 9))
@pytest.mark.parametrize("make", [Taylor, Newton, Hermite, lambda order: Chebyshev(order, 80)])
def test_every_carrier_keeps_a_constant_as_it_is(make, stored, ahead):
    assert make(3).factors(stored, stored[-1] + ahead)[0] == 1


@pytest.mark.parametrize("carrier", [Taylor(2), Newton(1), Hermite(3, 0.3), Chebyshev(2, 50, 1)])
def test_a_described_carrier_is_made_again(carrier):
    assert make_carrier(json.loads(json.dumps(describe_carrier(carrier)))) == carrier


@given(stored=STEPS, ahead=st.integers(0, 9), order=st.integers(0, 3))
def test_newton_continues_a_polynomial_exactly_on_uneven_steps(stored, ahead, order):
    degree = min(order, len(stored) - 1)
    values, polynomial = cubes(stored, degree)

    out = foretell(Newton(order), stored, values, stored[-1] + ahead)

    torch.testing.assert_close(out, polynomial(stored[-1] + ahead), rtol=1e-6, atol=1e-6)


def test_newton_and_taylor_agree_at_order_1_and_not_at_order_2():
    stored = (2, 5, 9)

    first = [carrier(1).factors(stored, 12) for carrier in (Newton, Taylor)]
    assert first[0] == pytest.approx(first[1])
    second = [carrier(2).factors(stored, 12) for carrier in (Newton, Taylor)]
    assert second[0] != pytest.approx(second[1])


@pytest.mark.parametrize("scale", [0.3, 0.5, 0.5**0.5, 1.0])
@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_hermite_has_the_published_polynomials(scale, ahead):
    factors = Hermite(3, scale).factors((0, 2, 3, 7), 7 + ahead)

    x = ahead
    wanted = (
        1.0,
        scale * 2 * (scale * x),
        scale**2 * (4 * (scale * x) ** 2 - 2) / 2,
        scale**3 * (8 * (scale * x) ** 3 - 12 * scale * x) / 6,
    )
    assert factors == pytest.approx(wanted)


def test_hermite_of_scale_root_one_half_is_taylor_at_order_1():
    stored = (0, 4)

    assert Hermite(1, 0.5**0.5).factors(stored, 7) == pytest.approx(Taylor(1).factors(stored, 7))


@pytest.mark.parametrize(("order", "degree"), [(2, 2), (3, 2), (5, 1), (0, 2), (1, 3)])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_chebyshev_is_numpys_ridge_regression(order, degree, ridge):
    stored = (0, 3, 4, 9, 11, 16)[: order + 2]
    values, _ = cubes(stored)

    out = foretell(Chebyshev(order, 50, degree, ridge), stored, values, stored[-1] + 3)

    used = np.array(stored[-1 - order :])
    degree = min(degree, len(used) - 1)
    basis = np.polynomial.chebyshev.chebvander(2 * used / 49 - 1, degree)
    point = np.polynomial.chebyshev.chebvander([2 * (stored[-1] + 3) / 49 - 1], degree)
    fit = np.linalg.solve(
        basis.T @ basis + ridge * np.eye(degree + 1),
        basis.T @ np.stack([(value - values[-1]).numpy() for value in values[-1 - order :]]),
    )
    wanted = values[-1] + torch.tensor(point @ fit)[0]
    torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-6)


@given(stored=STEPS, seed=st.integers(0, 9))
def test_weights_and_factors_are_one_another(stored, seed):
    weights = np.random.default_rng(seed).normal(size=len(stored))
    values, _ = cubes(stored)

    factors = to_factors(weights, stored)

    assert to_weights(factors, stored) == pytest.approx(weights, rel=1e-6, abs=1e-6)
    differences = keep(stored, values, len(stored) - 1)
    by_factors = sum(f * d for f, d in zip(factors, differences, strict=True))
    by_weights = sum(w * v for w, v in zip(weights, values, strict=True))
    torch.testing.assert_close(by_factors, by_weights, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("carrier", [Taylor(2), Newton(2), Hermite(2), Chebyshev(2, 50)])
def test_a_value_stored_once_is_reused(carrier):
    assert carrier.factors((0,), 5) == (1.0,)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Taylor(-1), "Taylor: order must be at least 0, got -1"),
        (lambda: Hermite(1, 0.0), r"Hermite: scale must be in \(0, 1\], got 0.0"),
        (lambda: Chebyshev(1, 1), "Chebyshev: total must be at least 2, got 1"),
        (lambda: Chebyshev(1, 9, ridge=-1.0), "ridge must be finite and not negative"),
        (lambda: Newton(1).factors((3, 5), 4), "index must be at least 5, the last full step"),
        (lambda: make_carrier({"kind": "Spline"}), "described must be of kind Taylor, Newton"),
        (lambda: to_factors([1.0], []), "stored must be ascending steps, at least one"),
    ],
)
def test_carriers_that_cannot_be_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
