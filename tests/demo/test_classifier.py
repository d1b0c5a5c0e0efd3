import json

import torch

from tokencache_kernels.demo import classifier
from tokencache_kernels.demo.data import NUM_HELD_OUT, load_digits


def test_the_shipped_classifier_is_as_accurate_as_its_record_says():
    images, labels = load_digits()
    record = json.loads(classifier.WEIGHTS.with_suffix(".json").read_text())

    predicted, features = classifier.classify(classifier.load_classifier(), images[-NUM_HELD_OUT:])

    accuracy = (predicted == labels[-NUM_HELD_OUT:]).float().mean().item()
    assert features.shape == (NUM_HELD_OUT, classifier.NUM_FEATURES)
    # one digit may fall on the other side of a rounding
    assert abs(accuracy - record["held_out_accuracy"]) < 1.5 / NUM_HELD_OUT
    assert accuracy >= 0.95


def test_distorted_digits_keep_their_range_and_their_background():
    images, _ = load_digits()
    torch.manual_seed(0)

    distorted = classifier.distort(images[:20])

    assert distorted.shape == (20, 1, 32, 32)
    assert distorted.min() >= -1.0 - 1e-6
    assert distorted.max() <= 1.0 + 1e-6
    # the corners of a digit are background, wherever the image was moved to
    torch.testing.assert_close(distorted[:, :, 0, 0], torch.full((20, 1), -1.0))
    assert (distorted - images[:20]).abs().mean() > 0.01
