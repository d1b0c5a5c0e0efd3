"""The feature cache copies into buffers that stay where they are."""

import pytest
import torch

from tokencache_kernels.cache import NO_TREND, FeatureCache, Trend
from tokencache_kernels.errors import CacheMissError
from tokencache_kernels.testing import randn


def test_a_second_store_keeps_the_address():
    cache = FeatureCache()
    first, second = randn(2, 3, 4), randn(2, 3, 4, seed=1)

    cache.store("site", first)
    buffer = cache.load("site", like=first)
    cache.store("site", second)

    assert cache.load("site", like=first) is buffer
    torch.testing.assert_close(buffer, second, rtol=0, atol=0)


def test_the_buffer_is_not_the_callers_tensor():
    cache = FeatureCache()
    value = randn(2, 3, 4)
    cache.store("site", value)

    value.zero_()

    assert cache.load("site", like=value).abs().sum() > 0


@pytest.mark.parametrize("like", [randn(1, 3, 4), randn(2, 3, 4).half()], ids=["batch", "dtype"])
def test_features_that_do_not_fit_are_a_miss(like):
    cache = FeatureCache()
    cache.store("site", randn(2, 3, 4))

    with pytest.raises(CacheMissError, match=r"is \(2, 3, 4\) .* call reset_token_cache"):
        cache.load("site", like=like)


def test_what_was_never_stored_is_a_miss():
    with pytest.raises(CacheMissError, match="no cached output for site; a full step must"):
        FeatureCache().load("site", like=randn(1, 1, 1))


def test_differences_of_a_line_foretell_it():
    cache = FeatureCache()
    start, slope = randn(2, 3, 4), randn(2, 3, 4, seed=1)
    for step, trend in ((0, NO_TREND), (3, Trend(1, 3)), (5, Trend(1, 2))):
        cache.store("site", start + step * slope, trend)

    torch.testing.assert_close(forecast(cache, (1.0, 4.0)), start + 9 * slope)


def test_differences_are_the_published_ones():
    cache = FeatureCache()
    values = [randn(2, 3, 4, seed=seed) for seed in range(3)]
    for value, trend in zip(values, (NO_TREND, Trend(1, 2), Trend(2, 3)), strict=True):
        cache.store("site", value, trend)

    differences = cache.differences("site", (1.0, 0.5, 0.25))

    first = (values[2] - values[1]) / 3
    second = (first - (values[1] - values[0]) / 2) / 3
    assert [factor for _, factor in differences] == [0.5, 0.25]
    for (difference, _), wanted in zip(differences, (first, second), strict=True):
        torch.testing.assert_close(difference, wanted)


def test_what_begins_anew_knows_no_differences_and_keeps_the_addresses():
    cache = FeatureCache()
    value = randn(2, 3, 4)
    addresses = []
    for run in range(2):
        cache.store("site", run * value)
        assert cache.differences("site", (1.0,)) == []
        cache.store("site", (run + 2) * value, Trend(1, 2))
        addresses.append([difference for difference, _ in cache.differences("site", (1.0, 1.0))])

    assert addresses[0][0] is addresses[1][0]
    torch.testing.assert_close(addresses[1][0], value)


def forecast(cache, factors):
    terms = cache.differences("site", factors)
    return cache.load("site") + sum(factor * difference for difference, factor in terms)
