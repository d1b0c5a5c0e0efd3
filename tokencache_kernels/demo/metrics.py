"""Distances of samples to the dense model's samples, and to the real digits."""

import torch
from torch import Tensor

PEAK = 2.0  # the images lie in [-1, 1]


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """10 log10(peak^2 / mean squared error) of each image, (B,) in dB; infinite where equal."""
    error = (images.double() - reference.double()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(PEAK**2 / error)


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """The Fréchet distance between the normal distributions fitted to two sets of features.

    ``|m1 - m2|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2))``, in float64.

    Args:
        features: (B, F) with B > 1, on the CPU.
        reference: (R, F) with R > 1.
    """
    features, reference = features.double(), reference.double()
    offset = features.mean(dim=0) - reference.mean(dim=0)
    covariance, wanted = torch.cov(features.T), torch.cov(reference.T)
    # C1 C2 has the eigenvalues of the symmetric root(C1) C2 root(C1), whose roots are safe to take
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ wanted @ root).clamp_min(0).sqrt().sum()
    return float(offset.square().sum() + covariance.trace() + wanted.trace() - 2 * cross)
