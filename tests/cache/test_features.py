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
