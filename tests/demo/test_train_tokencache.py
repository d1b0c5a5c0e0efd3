"""``tokencache train tokencache`` on the demo's model, untrained; and the predictor that ships."""

import hashlib
import json

import pytest

from tokencache_kernels.commands.cli import main
from tokencache_kernels.demo.model import SHAPE, WEIGHTS
from tokencache_kernels.demo.train_tokencache import PREDICTOR
from tokencache_kernels.models import PUBLISHED
from tokencache_kernels.policies import TokenCacheConfig, load_predictor, make_plan, published_shape


def train(weights, out, steps, *options):
    return main(
        [
            *("train", "tokencache", "--steps", str(steps), "--batch", "1", "--sampler-steps", "3"),
            *("--save-every", "2", "--device", "cpu", "--weights", str(weights)),
            *("--out", str(out), *options),
        ]
    )


@pytest.mark.parametrize(
    ("kind", "rate", "what"),
    [("table", 0.1, "TablePredictor"), ("content", 2e-3, "ContentPredictor")],
)
def test_a_predictor_is_written_with_its_record(weights, tmp_path, capsys, kind, rate, what):
    out = tmp_path / "folder" / "predictor.safetensors"

    status = train(weights, out, 4, "--predictor", kind, "--lambda", "0.5")

    predictor = load_predictor(out)
    record = json.loads(out.with_suffix(".json").read_text())
    assert status == 0
    assert type(predictor).__name__ == what
    assert (predictor.num_layers, predictor.num_tokens, predictor.num_steps) == (6, 256, 3)
    assert record["predictor"] == repr(predictor)
    assert record["learning_rate"] == rate
    assert [row["step"] for row in record["history"]] == [2, 4]
    assert record["importance_by_step"] == pytest.approx(predictor.step_importance(), abs=1e-3)
    assert f"Written to {out}" in capsys.readouterr().out


def test_a_state_of_another_predictor_is_refused_and_nothing_is_written(weights, tmp_path, capsys):
    out = tmp_path / "predictor.safetensors"
    train(weights, out, 2)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}

    status = train(weights, out, 4, "--predictor", "content", "--learning-rate", "0.1")

    told = capsys.readouterr().err.splitlines()[-1]
    assert status == 1
    assert "checkpoint must be of a run with predictor ContentPredictor(num_layers=6, " in told
    assert "with predictor TablePredictor(num_layers=6, num_tokens=256, num_steps=3)" in told
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_the_predictor_that_ships_is_for_the_model_that_ships():
    predictor = load_predictor(PREDICTOR)

    record = json.loads(PREDICTOR.with_suffix(".json").read_text())
    assert record["weights_sha256"] == hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert predictor.num_layers == SHAPE["num_layers"]
    # tokens of late steps matter more, and those in the middle more than the empty corners
    importance = predictor.step_importance()
    assert sum(importance[25:]) > 1.5 * sum(importance[:25])
    scores = predictor.logits.sigmoid().mean(dim=(0, 1)).unflatten(0, (16, 16))
    assert scores[5:11, 5:11].mean() > 1.5 * scores[[0, 0, -1, -1], [0, -1, 0, -1]].mean()
    policy = TokenCacheConfig(predictor, 50)
    assert make_plan(policy, published_shape(PUBLISHED["demo"])).flops_ratio > 1.4
