"""The feature cache copies into buffers that stay where they are."""

import pytest
import torch

from tokencache_kernels.cache import FeatureCache
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

    with pytest.raises(CacheMissError, match=r"^load: site must fit .* got \(2, 3, 4\)"):
        cache.load("site", like=like)


def test_what_was_never_stored_is_a_miss():
    with pytest.raises(CacheMissError, match="must be stored by a full step first, got nothing"):
        FeatureCache().load("site", like=randn(1, 1, 1))


def test_differences_of_a_line_foretell_it():
    cache = FeatureCache(forecast_order=1)
    start, slope = randn(2, 3, 4), randn(2, 3, 4, seed=1)
    for step in (0, 3, 5):
        cache.begin_step(step)
        cache.store("site", start + step * slope)

    cache.begin_step(9)

    torch.testing.assert_close(forecast(cache, start), start + 9 * slope)


def test_differences_are_the_published_ones():
    cache = FeatureCache(forecast_order=2)
    values = [randn(2, 3, 4, seed=seed) for seed in range(3)]
    for step, value in zip((1, 3, 6), values, strict=True):
        cache.begin_step(step)
        cache.store("site", value)

    cache.begin_step(8)

    first = (values[2] - values[1]) / 3
    second = (first - (values[1] - values[0]) / 2) / 3
    assert [factor for _, factor in cache.differences("site")] == [2, 2]
    for (difference, _), wanted in zip(cache.differences("site"), (first, second), strict=True):
        torch.testing.assert_close(difference, wanted)


def test_a_new_run_knows_no_differences_and_keeps_the_addresses():
    cache = FeatureCache(forecast_order=1)
    value = randn(2, 3, 4)
    addresses = []
    for run in range(2):
        for step in (0, 2):
            cache.begin_step(step)
            cache.store("site", (run + step) * value)
            if step == 0:
                assert cache.differences("site") == []
        addresses.append([difference for difference, _ in cache.differences("site")])

    assert addresses[0][0] is addresses[1][0]
    torch.testing.assert_close(addresses[1][0], value)


def forecast(cache, like):
    terms = cache.differences("site")
    return cache.load("site", like) + sum(factor * difference for difference, factor in terms)
