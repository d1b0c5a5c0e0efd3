"""Training the demo's model on the common loop."""

import pytest
import torch

from tokencache_kernels.demo import train


def test_a_finished_training_of_the_model_resumes_to_the_same_average(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(train, "save_weights", lambda model: saved.append(model.state_dict()))

    records = [train.train(3, 2, 1e-3, tmp_path / "state.safetensors", "cpu") for _ in range(2)]

    assert records[0]["loss_by_step"] == records[1]["loss_by_step"]
    assert records[0]["loss_by_step"][0][0] == 3
    for name, value in saved[0].items():
        torch.testing.assert_close(saved[1][name], value, rtol=0, atol=0)


def test_the_rate_rises_then_falls_to_a_hundredth():
    factors = [train.rate_factor(step, 1000) for step in (0, 99, 100, 1000)]

    assert factors == pytest.approx([0.01, 1.0, 1.0, 0.01])
