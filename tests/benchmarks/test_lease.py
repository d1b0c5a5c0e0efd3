"""The two calls for fifteen minutes with a GPU: their steps, their budgets, their failures."""

import argparse
import sys
import time

import pytest

from benchmarks import gpu, lease
from benchmarks.lease import LEASES, SECONDS, Step, command_of, take
from benchmarks.stages import FIRST_RUN, Journal, is_wanted


@pytest.fixture
def options(tmp_path):
    return argparse.Namespace(out=tmp_path, commit=None, rehearse=True)


@pytest.mark.parametrize("call", LEASES)
def test_the_steps_of_a_call_fit_its_time(call):
    assert sum(step.budget for step in LEASES[call]) <= SECONDS[call] <= 600
    assert all(
        step.stage in (*gpu.STAGES, *gpu.EXTRA_STAGES, "test", "sanitize") for step in LEASES[call]
    )


def test_the_first_two_calls_take_at_most_six_minutes_each():
    assert SECONDS["first"] <= 360
    assert SECONDS["second"] <= 360


def test_a_step_is_a_call_of_the_run_book(options):
    options.rehearse = False

    command = command_of(Step("layers", 70, "dit,flux"), 70.0, options)

    assert command[:5] == [sys.executable, "-m", "benchmarks.gpu", "--stage", "layers"]
    assert command[command.index("--budget") + 1] == "58"
    assert command[command.index("--only") + 1] == "dit,flux"
    assert {"--no-compiled", "--no-tuning"} <= {*command}


def test_a_step_of_tests_is_a_call_of_pytest_with_a_report(options):
    options.rehearse = False

    command = command_of(Step("test", 100, "ops/test_rows,ops/test_select"), 90.0, options)

    assert command[:5] == ["timeout", "90", sys.executable, "-m", "pytest"]
    assert command[-3].startswith("--junitxml=")
    assert command[-2:] == ["tests/ops/test_rows.py", "tests/ops/test_select.py"]


def test_a_step_that_fails_or_takes_all_its_time_leaves_the_others_theirs(
    options, monkeypatch, capsys
):
    programs = {"fails": "raise SystemExit(3)", "works": "pass"}
    monkeypatch.setattr(
        lease, "command_of", lambda step, budget, _: [sys.executable, "-c", programs[step.stage]]
    )
    started = time.monotonic()

    status = take([Step("fails", 20), Step("works", 20)], 60, options)

    said = capsys.readouterr().out
    assert status == 1
    assert "== fails : status 3" in said
    assert "== works : status 0" in said
    assert "failed: fails" in said
    assert time.monotonic() - started < 60


def test_budgets_that_are_not_used_go_to_later_steps(options, monkeypatch):
    given = []
    monkeypatch.setattr(
        lease,
        "command_of",
        lambda step, budget, _: given.append(budget) or [sys.executable, "-c", "pass"],
    )

    take([Step("one", 50), Step("two", 50)], 110, options)

    assert 50 <= given[0] <= 60
    assert given[1] > 95


def test_one_of_several_words_takes_a_case():
    key = {"case": "linear", "shape": "flux", "dtype": "bfloat16"}

    assert is_wanted(key, "")
    assert is_wanted(key, "mlp_,linear/flux")
    assert not is_wanted(key, "mlp_,dit")


def test_a_first_run_alone_does_not_make_a_case_done(tmp_path):
    journal = Journal(tmp_path, "models", {"session": "one"})
    key = {"case": "model", "shape": "flux", "dtype": "bfloat16", "part": "toca"}

    journal.write({**key, "backend": "auto", "what": FIRST_RUN, "median_ms": 1.0})
    assert not journal.is_done(key)

    journal.write({**key, "backend": "auto", "what": "run", "median_ms": 1.0})
    assert journal.is_done(key)
