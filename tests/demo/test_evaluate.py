import json

import pytest
import torch

from tokencache_kernels.cli import main
from tokencache_kernels.demo import evaluate
from tokencache_kernels.demo.data import load_digits


@pytest.fixture(scope="module")
def digits():
    """Few of the real digits, for speed."""
    return tuple(tensor[:200] for tensor in load_digits())


@pytest.fixture
def run_evaluate(weights, digits, tmp_path, monkeypatch):
    """Run the command on the untrained model and return the records that it wrote."""
    monkeypatch.setattr(evaluate, "load_digits", lambda: digits)

    def run(*arguments, name="out.jsonl", state="state"):
        out = tmp_path / name
        status = main(
            [
                *("evaluate", "--weights", str(weights), "--steps", "2", "--batch", "2"),
                *("--state", str(tmp_path / state), "--out", str(out), *arguments),
            ]
        )
        assert status == 0
        return [json.loads(line) for line in out.read_text().splitlines()]

    return run


@pytest.fixture
def drawn(monkeypatch):
    """The seeds drawn, batch by batch, without the warm-up."""
    batches = []
    original = evaluate.sample

    def record(model, labels, seeds, **options):
        if "on_step" in options:
            batches.append(list(seeds))
        return original(model, labels, seeds, **options)

    monkeypatch.setattr(evaluate, "sample", record)
    return batches


def test_a_record_says_what_was_measured_and_where(run_evaluate):
    dense, cached = run_evaluate("--policy", "dense", "fora-2", "--samples", "3")

    assert (dense["policy"], cached["policy"]) == ("dense", "fora-2")
    assert dense["psnr_to_dense"] is None
    assert dense["backend"] is None
    assert cached["backend"] in ("triton", "native", "reference")
    assert 0 < cached["psnr_to_dense"] < 100
    assert cached["flops_ratio"] == 2
    assert cached["speedup"] > 0
    assert 0 <= dense["accuracy"] <= 1
    assert dense["frechet_distance"] > 0
    assert dense["frechet_distance_of_real"] > 0
    assert dense["torch"] == torch.__version__
    assert dense["command"].startswith("tokencache evaluate --policy dense --samples 3")
    for fact in ("device", "threads", "python", "git", "weights_sha256", "backend", "utc"):
        assert fact in dense


def test_without_dense_samples_there_is_nothing_to_compare_with(run_evaluate):
    (record,) = run_evaluate("--policy", "fewer-1", "--samples", "2")

    assert record["psnr_to_dense"] is None
    assert record["speedup"] is None
    assert record["steps"] == 1


def test_an_interrupted_run_goes_on_where_it_was(run_evaluate, drawn, monkeypatch):
    (whole,) = run_evaluate("--samples", "5", state="other")
    assert drawn == [[0, 1], [2, 3], [4]]
    drawn.clear()
    save = evaluate.save_file
    monkeypatch.setattr(
        evaluate, "save_file", lambda *args, **kwargs: _fail_at(len(drawn), 2, save, args, kwargs)
    )
    with pytest.raises(KeyboardInterrupt):
        run_evaluate("--samples", "5")
    monkeypatch.setattr(evaluate, "save_file", save)
    drawn.clear()

    (resumed,) = run_evaluate("--samples", "5", name="second.jsonl")

    assert drawn == [[2, 3], [4]]
    assert resumed["frechet_distance"] == pytest.approx(whole["frechet_distance"], rel=1e-3)
    assert resumed["accuracy"] == whole["accuracy"]


def _fail_at(count, last, save, args, kwargs):
    if count == last:
        raise KeyboardInterrupt
    save(*args, **kwargs)


def test_more_samples_of_a_finished_run_draw_only_the_new(run_evaluate, drawn):
    run_evaluate("--samples", "4")
    drawn.clear()

    run_evaluate("--samples", "6")

    assert drawn == [[4, 5]]


def test_other_settings_have_samples_of_their_own(run_evaluate, drawn):
    run_evaluate("--samples", "2")
    drawn.clear()

    run_evaluate("--samples", "2", "--guidance", "3")

    assert drawn == [[0, 1]]


def test_an_unknown_policy_is_refused_before_anything_is_drawn(capsys, tmp_path, drawn):
    status = main(["evaluate", "--policy", "dense", "tuca-3", "--state", str(tmp_path)])

    assert status == 1
    assert "toca-<interval>[-<percent>], got 'tuca-3'" in capsys.readouterr().err
    assert drawn == []
