import math

import numpy
import pytest
import scipy.linalg
import torch

from tokencache_kernels.demo.metrics import frechet_distance, psnr
from tokencache_kernels.testing import randn


def test_psnr_is_that_of_a_known_error_image_by_image():
    reference = randn(2, 1, 8, 8)
    offset = torch.tensor([0.02, 0.2]).reshape(2, 1, 1, 1)

    decibels = psnr(reference + offset, reference)

    # 20 log10(2 / 0.02) and 20 log10(2 / 0.2)
    torch.testing.assert_close(decibels, torch.tensor([40.0, 20.0]).double(), rtol=0, atol=1e-4)


def test_psnr_of_equal_images_is_infinite():
    images = randn(1, 1, 8, 8)

    assert psnr(images, images.clone()).item() == math.inf


def test_frechet_distance_equals_the_matrix_square_root_of_scipy():
    features, reference = randn(200, 7), randn(150, 7, seed=1) @ randn(7, 7) + 0.5

    distance = frechet_distance(features, reference)

    a, b = features.double().numpy(), reference.double().numpy()
    covariances = [numpy.cov(x, rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + numpy.trace(sum(covariances) - 2 * root)
    assert distance == pytest.approx(wanted, rel=1e-6)


def test_frechet_distance_of_a_shift_is_its_square_and_of_a_set_with_itself_nothing():
    features = randn(100, 5)

    # one feature is constant, as a dead ReLU is: the covariance is singular
    features[:, 4] = 0.0

    assert frechet_distance(features, features) == pytest.approx(0.0, abs=1e-6)
    assert frechet_distance(features + 2.0, features) == pytest.approx(5 * 4.0, rel=1e-5)
