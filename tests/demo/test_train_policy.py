"""``tokencache train`` on the demo's model, untrained, for a few steps."""

import hashlib
import json

import pytest

from tokencache_kernels.commands.cli import main
from tokencache_kernels.demo.model import SHAPE, WEIGHTS
from tokencache_kernels.demo.train_l2c import ROUTER
from tokencache_kernels.policies import load_router


def train(weights, out, steps, *options):
    return main(
        [
            *("train", "l2c", "--steps", str(steps), "--batch", "1", "--sampler-steps", "4"),
            *("--save-every", "2", "--device", "cpu", "--weights", str(weights)),
            *("--out", str(out), *options),
        ]
    )


def test_a_router_is_written_with_its_record(weights, tmp_path, capsys):
    out = tmp_path / "folder" / "router.safetensors"

    status = train(weights, out, 4, "--lambda", "0.5", "--threshold", "0.3")

    router = load_router(out, num_layers=6, num_inference_steps=4)
    record = json.loads(out.with_suffix(".json").read_text())
    printed = capsys.readouterr().out
    assert status == 0
    assert router.threshold == 0.3
    assert record["skipped_share"] == round(router.skipped_share, 4)
    assert [row["step"] for row in record["history"]] == [2, 4]
    # the table that is printed: one line a step, later steps below
    rows = ["".join("-x"[on] for on in router.mask[counter]) for counter in (2, 0)]
    assert f"   2  {rows[0]}\n   0  {rows[1]}\n" in printed
    assert f"skips {router.skipped_share:.1%} of them; written to {out}" in printed


def test_a_state_of_another_training_is_refused_and_nothing_is_written(weights, tmp_path, capsys):
    out, state = tmp_path / "router.safetensors", tmp_path / "router.state"
    train(weights, out, 2)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}

    status = train(weights, out, 4, "--lambda", "0.5")

    told = capsys.readouterr().err.splitlines()[-1]
    assert status == 1
    assert told.startswith("tokencache train: train_module: checkpoint must be of a run with spars")
    assert str(state) in told
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize(
    ("out", "options", "sentence"),
    [
        ("a.json", (), "--out must be a file that ends in .safetensors, got"),
        ("folder.safetensors", (), "--out must be a file that ends in .safetensors, got"),
        ("a.safetensors", ("--state", "a.safetensors"), "--state must be another file than --out"),
        ("a.safetensors", ("--batch", "0"), "--batch must be at least 1, got 0"),
        ("a.safetensors", ("--sampler-steps", "0"), "--sampler-steps must be at least 1, got 0"),
        ("a.safetensors", ("--weights", "text"), "must hold the weights of the demo's model"),
        ("a.safetensors", ("--weights", str(ROUTER)), "must hold the weights of the demo's model"),
        ("text/a.safetensors", (), "File exists"),
    ],
)
def test_what_would_fail_in_the_end_is_refused_at_the_start(
    weights, tmp_path, monkeypatch, capsys, out, options, sentence
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "text").write_text("some text\n")
    files = sorted(tmp_path.rglob("*"))

    status = train(weights, out, 2, *options)

    told = capsys.readouterr().err.splitlines()
    assert status == 1
    assert len(told) == 1
    assert told[0].startswith("tokencache train: ")
    assert sentence in told[0]
    assert sorted(tmp_path.rglob("*")) == files


def test_a_method_must_be_one_that_there_is(capsys):
    with pytest.raises(SystemExit):
        main(["train", "l2d"])

    assert "invalid choice: 'l2d'" in capsys.readouterr().err


def test_the_router_that_ships_is_for_the_model_that_ships():
    router = load_router(ROUTER, num_layers=SHAPE["num_layers"], num_inference_steps=50)

    record = json.loads(ROUTER.with_suffix(".json").read_text())
    assert record["weights_sha256"] == hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert record["skipped_share"] == round(router.skipped_share, 4)
    assert 0.4 < router.skipped_share < 0.6
    # a worthwhile mask: early steps reuse the step before, late ones compute nearly everything
    early, late = (
        sum(sum(router.mask[counter]) for counter in counters)
        for counters in (range(26, 50, 2), range(0, 16, 2))
    )
    assert early < late / 4
