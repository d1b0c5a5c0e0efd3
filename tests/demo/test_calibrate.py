import json

import pytest

from tokencache_kernels.commands.cli import main
from tokencache_kernels.policies import load_policy


@pytest.fixture
def run_calibrate(weights, tmp_path):
    """Run the command on the untrained model, for few digits, steps and trials."""

    def run(*arguments):
        path = tmp_path / "table.json"
        fixed = ("--weights", str(weights), "--steps", "4", "--samples", "2", "--unseen", "2")
        return main(["calibrate", *fixed, "--trials", "3", "--out", str(path), *arguments]), path

    return run


def test_a_table_is_found_written_and_told(run_calibrate, capsys):
    status, path = run_calibrate("--ratio", "2")

    printed = capsys.readouterr().out
    table = load_policy(path)
    assert status == 0
    assert len(table.full_steps) == 2
    assert "2 of 4 steps run the model: 2.00 times fewer FLOPs" in printed
    assert "of 2 unseen digits" in printed
    assert table.facts["seeds"] == [100000, 100001]
    assert len(path.with_suffix(".state").read_text().splitlines()) == 3
    assert len(table.facts["weights_sha256"]) == 64


def test_a_budget_of_time_is_measured(run_calibrate, capsys):
    status, path = run_calibrate("--speed-up", "1.2")

    assert status == 0
    assert "A carried step takes" in capsys.readouterr().out
    assert len(load_policy(path).full_steps) < 4


def test_a_table_goes_on_from_its_state(run_calibrate):
    _, path = run_calibrate("--full-steps", "2")
    lines = path.with_suffix(".state").read_text().splitlines()
    first = path.read_text()

    run_calibrate("--full-steps", "2")

    assert path.with_suffix(".state").read_text().splitlines() == lines
    assert json.loads(path.read_text())["weights"] == json.loads(first)["weights"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--ratio", "0.5"), r"the budget must be in [1, 4], got 0.5"),
        (("--full-steps", "9"), r"num_full must be in [1, 4], got 9"),
        (("--ratio", "2", "--samples", "1"), "--samples must be at least 2, got 1"),
    ],
)
def test_what_cannot_be_is_refused(run_calibrate, arguments, sentence, capsys):
    status, path = run_calibrate(*arguments)

    assert status == 1
    assert sentence in capsys.readouterr().err
    assert not path.exists()
