import json
import re

import matplotlib.image
import pytest
import torch

from tokencache_kernels.commands.cli import main
from tokencache_kernels.demo import compare, drawing
from tokencache_kernels.demo.data import load_digits
from tokencache_kernels.demo.methods import Method
from tokencache_kernels.policies import TablePredictor, TokenCacheConfig


@pytest.fixture(scope="module")
def digits():
    """Few of the real digits, for speed."""
    return tuple(tensor[:200] for tensor in load_digits())


@pytest.fixture
def run_compare(weights, digits, tmp_path, monkeypatch):
    """Run the command on the untrained model and return its output."""
    monkeypatch.setattr(compare, "load_digits", lambda: digits)
    monkeypatch.setattr(compare, "_RESAMPLES", 3)

    def run(*arguments, out="out", policies=("fora-2",)):
        status = main(
            [
                *("compare", "--weights", str(weights), "--steps", "2", "--batch", "2"),
                *("--samples", "4", "--out", str(tmp_path / out), "--policies", *policies),
                *arguments,
            ]
        )
        assert status == 0
        return json.loads((tmp_path / out / "compare.json").read_text())["records"]

    return run


@pytest.fixture
def drawn(monkeypatch):
    """The seeds and steps drawn, batch by batch, without the warm-up."""
    batches = []
    original = drawing.sample

    def record(model, labels, seeds, **options):
        if "on_step" in options:
            batches.append((options["steps"], list(seeds)))
        return original(model, labels, seeds, **options)

    monkeypatch.setattr(drawing, "sample", record)
    return batches


@pytest.fixture
def one_thread():
    """Torch with one thread, and after the test with as many as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_record_says_what_was_measured_and_where(run_compare, tmp_path, capsys):
    dense, cached, fewer = run_compare(policies=("fora-2", "fewer-1"))

    assert [record["policy"] for record in (dense, cached, fewer)] == ["dense", "fora-2", "fewer-1"]
    assert "psnr_to_dense" not in dense
    assert dense["backend"] is fewer["backend"] is None
    assert cached["backend"] in ("triton", "native", "reference")
    for record in (cached, fewer):
        assert record["flops_ratio"] == 2
        assert abs(record["psnr_to_dense"]) < 100
        assert record["psnr_to_dense_interval"] > 0
        assert record["speedup"] > 0
    for record in (dense, cached, fewer):
        assert 0 <= record["accuracy"] <= 1
        assert record["frechet_distance"] > record["frechet_distance_interval"] > 0
    assert dense["torch"] == torch.__version__
    for fact in ("device", "threads", "python", "git", "weights_sha256", "first_seed", "utc"):
        assert fact in dense
    printed = capsys.readouterr().out
    table = (tmp_path / "out" / "compare.md").read_text()
    assert re.search(r"^\| fora-2 \| 2.00x \| .* ± .*x \| .* dB \|", table, re.MULTILINE)
    assert table.splitlines()[2] in printed
    assert "4 digits each, 2 DDIM steps" in table
    assert matplotlib.image.imread(tmp_path / "out" / "compare.png").shape[0] > 400


def test_every_method_draws_a_chunk_before_the_next_begins(run_compare, drawn):
    run_compare("--samples", "3", policies=("fewer-1",))

    assert drawn == [(2, [0, 1]), (1, [0, 1]), (2, [2]), (1, [2])]


def test_an_interrupted_run_goes_on_where_it_was(run_compare, drawn, monkeypatch):
    whole = run_compare(out="other")
    drawn.clear()
    save = drawing.save_file

    def fail(*arguments, **named):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        save(*arguments, **named)

    monkeypatch.setattr(drawing, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        run_compare()
    monkeypatch.setattr(drawing, "save_file", save)
    drawn.clear()

    resumed = run_compare()

    assert drawn == [(2, [2, 3]), (2, [2, 3])]
    for one, other in zip(resumed, whole, strict=True):
        for name in ("accuracy", "frechet_distance", "frechet_distance_interval"):
            assert one[name] == pytest.approx(other[name], rel=1e-3)


def test_more_samples_and_policies_draw_only_the_new(run_compare, drawn):
    run_compare()
    drawn.clear()

    run_compare("--samples", "5", policies=("fora-2", "fewer-1"))

    assert drawn == [(1, [0, 1]), (1, [2, 3]), (2, [4]), (2, [4]), (1, [4])]


@pytest.mark.parametrize("arguments", [("--guidance", "3"), ("--seeds", "7"), ("--threads", "2")])
def test_other_settings_have_digits_of_their_own(run_compare, drawn, arguments, one_thread):
    run_compare()
    drawn.clear()

    run_compare(*arguments)

    assert len(drawn) == 4
    first = 7 if "--seeds" in arguments else 0
    assert drawn[0] == (2, [first, first + 1])


# CPU memory that numpy knows nothing of stands for a GPU's
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_digits_have_a_place_by_what_the_predictor_says(weights, tmp_path, dtype):
    predictor = TablePredictor(6, 256, 2).to(dtype)
    predictor.importance.zero_()
    method = Method("tokencache", "TokenCache", 2, 2, TokenCacheConfig(predictor, 2))
    place = drawing.Drawing(4, 0, 2, 2, 1.5, torch.device("cpu"), weights, tmp_path)

    paths = []
    for value in (0, 0, 1):
        predictor.logits.data.fill_(value)
        paths.append(place.path(method, range(2)))

    assert paths[0] == paths[1] != paths[2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--policies", "tuca-3"), "toca-<interval>[-<percent>], .*, got 'tuca-3'"),
        (("--policies", "l2c", "--steps", "7"), "hold a router with num_inference_steps = 7"),
        (("--samples", "1"), "--samples must be at least 2, got 1"),
        (("--batch", "0"), "batch must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_drawn(
    arguments, sentence, capsys, tmp_path, drawn
):
    status = main(["compare", *arguments, "--out", str(tmp_path / "out")])

    assert status == 1
    assert re.search(sentence.replace("[", r"\[").replace("]", r"\]"), capsys.readouterr().err)
    assert drawn == []


def test_every_default_policy_is_known_for_the_steps_that_it_is_trained_for(capsys):
    methods = compare.parse_those_trained(compare.POLICIES, 50)

    left_out = set(compare.POLICIES) - {method.name for method in methods}
    assert all(name.startswith(("tokencache", "calibrated")) for name in left_out)
    assert all(method.flops_ratio > 1 for method in methods)
