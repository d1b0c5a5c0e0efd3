import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tokencache_kernels.backends.triton import _launch
from tokencache_kernels.backends.triton._launch import (
    INTERPRETER,
    Device,
    TuneCase,
    choose,
    device_of,
    early_start,
    problem_key,
)
from tokencache_kernels.commands import tune

ROOT = Path(__file__).parents[2]
H200 = Device(arch=90, name="NVIDIA H200", num_sms=132)
PROBLEM = {"R": 500, "D": 1152}


@dataclass(frozen=True)
class Tile:
    block: int = 128
    num_warps: int = 4


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv("TOKENCACHE_LAUNCH_SETTINGS", raising=False)
    # a path of its own for each test, since a file is read once in a process
    monkeypatch.setattr(_launch, "SHIPPED", tmp_path / "shipped")
    _launch.tuned.cache_clear()
    yield
    _launch.tuned.cache_clear()


def write_settings(path, device="NVIDIA H200", **fields):
    key = problem_key("linear", PROBLEM)
    path.parent.mkdir(exist_ok=True)
    fields = {"block": 128, "num_warps": 4} | fields
    path.write_text(json.dumps({"device": device, "settings": {key: fields}}))
    return path


def use_settings(monkeypatch, path):
    monkeypatch.setenv("TOKENCACHE_LAUNCH_SETTINGS", str(path))


# choosing


def test_the_heuristic_holds_where_nothing_was_tuned():
    assert choose("linear", H200, PROBLEM, Tile()) == Tile()


def choose_tile(kernel="linear", device=H200, problem=PROBLEM):
    """Choose among tiles of all sizes."""
    return choose(kernel, device, problem, Tile(), lambda: [Tile(32), Tile(64), Tile(256)])


def test_a_tuned_entry_is_a_whole_setting(monkeypatch, tmp_path):
    use_settings(monkeypatch, write_settings(tmp_path / "mine.json", block=64))

    # whatever the heuristic says to another problem of the bucket
    chosen = choose("linear", H200, PROBLEM, Tile(32, num_warps=8), lambda: [Tile(64)])
    assert chosen == Tile(64, num_warps=4)


def test_a_setting_that_is_no_candidate_is_refused_with_a_warning(monkeypatch, tmp_path, caplog):
    use_settings(monkeypatch, write_settings(tmp_path / "mine.json", block=512))

    assert choose_tile() == choose_tile() == Tile()

    (warning,) = caplog.messages
    assert "linear/D=2048,R=512" in warning
    assert "block=512 num_warps=4) is no candidate here: not used" in warning


def test_what_was_tuned_in_the_process_goes_before_files(monkeypatch, tmp_path):
    use_settings(monkeypatch, write_settings(tmp_path / "mine.json", block=64))
    monkeypatch.setattr(_launch, "_adopted", {})

    _launch.adopt("linear/D=2048,R=512", Tile(256))

    assert choose_tile() == Tile(256)


def test_a_tuned_entry_serves_its_bucket_and_its_kernel_only(monkeypatch, tmp_path):
    use_settings(monkeypatch, write_settings(tmp_path / "mine.json", block=64))

    assert choose_tile(problem={"D": 2048, "R": 512}).block == 64
    assert choose_tile(problem={"D": 2048, "R": 513}).block == 128
    assert choose_tile("linear_scatter_").block == 128


def test_shipped_settings_serve_their_device(tmp_path):
    write_settings(tmp_path / "shipped" / "nvidia-h200.json", block=32)

    assert choose_tile().block == 32
    assert choose_tile(device=INTERPRETER).block == 128


def test_the_users_settings_go_before_the_shipped_ones(monkeypatch, tmp_path):
    write_settings(tmp_path / "shipped" / "nvidia-h200.json", block=32)
    use_settings(monkeypatch, write_settings(tmp_path / "mine.json", block=64))

    assert choose_tile().block == 64


def test_another_file_is_honoured_in_the_same_process(monkeypatch, tmp_path):
    use_settings(monkeypatch, write_settings(tmp_path / "one.json", block=64))
    first = choose_tile()
    use_settings(monkeypatch, write_settings(tmp_path / "two.json", block=256))

    assert (first.block, choose_tile().block) == (64, 256)


def test_settings_of_another_device_are_ignored(monkeypatch, tmp_path):
    path = write_settings(tmp_path / "mine.json", device="NVIDIA A10", block=64)
    use_settings(monkeypatch, path)

    assert choose("linear", H200, PROBLEM, Tile()) == Tile()


@pytest.mark.parametrize("fields", [{"blok": 64}, {"block": "64"}, {"block": None}], ids=str)
def test_a_field_that_does_not_fit_is_named(monkeypatch, tmp_path, fields):
    path = write_settings(tmp_path / "mine.json", **fields)
    use_settings(monkeypatch, path)

    with pytest.raises(ValueError) as error:
        choose("linear", H200, PROBLEM, Tile())

    ((name, _),) = fields.items()
    got = {"block": 128, "num_warps": 4} | fields
    assert str(error.value) == (
        f"linear: the launch settings in {path} must give all fields of a setting such as "
        f"block=128 num_warps=4, got {got} for linear/D=2048,R=512: see {name!r}"
    )


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"device": "x"}', '{"device": "x", "settings": {"a": 1}}', None]
)
def test_a_file_that_is_none_is_named(monkeypatch, tmp_path, text):
    path = tmp_path / "mine.json"
    if text is not None:
        path.write_text(text)
    use_settings(monkeypatch, path)

    with pytest.raises(ValueError, match=r"launch settings: .*mine\.json must be a JSON file"):
        choose("linear", H200, PROBLEM, Tile())


def test_every_shipped_file_can_be_read(monkeypatch):
    monkeypatch.undo()
    for path in _launch.SHIPPED.glob("*.json"):
        device = json.loads(path.read_text())["device"]
        assert path.stem == _launch.file_name(device)
        assert _launch.read_settings(path, device)


def test_a_launch_on_the_cpu_is_the_interpreters():
    assert device_of(torch.device("cpu")) == INTERPRETER


# tuning


def launches(kernel, times, tried):
    """A launcher that returns the time of the setting it chooses."""

    def run():
        setting = choose(kernel, H200, PROBLEM, Tile())
        tried.append(setting)
        return times[setting.block]

    return run


def outcome_of(times, candidates):
    tried = []
    case = TuneCase("linear", "", candidates, launches("linear", times, tried))
    return tune.try_settings(case, lambda run: next(run())), tried


def test_every_candidate_is_launched_in_every_round():
    outcome, tried = outcome_of({128: repeat(2.0), 64: repeat(1.0)}, [Tile(64)])

    # the first launch finds the problem and the heuristic's setting
    assert tried == [Tile(), *[Tile(), Tile(64)] * tune.ROUNDS]
    assert outcome.key == "linear/D=2048,R=512"
    assert (outcome.heuristic, outcome.best) == (Tile(), Tile(64))


def test_a_setting_that_wins_beyond_the_scatter_is_kept():
    outcome, _ = outcome_of({128: repeat(2.0), 64: repeat(1.0)}, [Tile(64)])

    assert outcome.is_gain
    assert tune.gains([outcome]) == {outcome.key: {"block": 64, "num_warps": 4}}


def test_a_setting_that_wins_within_the_scatter_is_not_kept():
    scattered = iter([2.0, 2.5, 3.0])
    outcome, _ = outcome_of({128: scattered, 64: repeat(1.9)}, [Tile(64)])

    assert outcome.best == Tile(64)
    assert not outcome.is_gain
    assert tune.gains([outcome]) == {}


@pytest.mark.parametrize("kind", ["shared memory", "cooperative launch"])
def test_a_setting_too_large_for_the_device_is_passed_over(kind):
    from triton.runtime.errors import OutOfResources

    def measure(run):
        time = run()
        if time < 1:
            raise OutOfResources(2, 1, kind) if kind == "shared memory" else RuntimeError(kind)
        return time

    run = launches("linear", {128: 2.0, 64: 0.5}, [])
    outcome = tune.try_settings(TuneCase("linear", "", [Tile(64)], run), measure)

    assert (outcome.best, outcome.num_failed) == (Tile(), 1)


def test_a_setting_that_is_far_behind_is_timed_once():
    outcome, tried = outcome_of({128: repeat(1.0), 64: repeat(1.3)}, [Tile(64)])

    assert tried.count(Tile(64)) == 1
    assert outcome.best == Tile()


def run_tune(*arguments):
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    return tune.run(parser.parse_args(arguments))


@pytest.fixture
def toy_cases(monkeypatch):
    """One tunable kernel, whose candidate does less than its heuristic."""
    monkeypatch.setattr(_launch, "_adopted", {})

    def work():
        setting = choose("toy", device_of(torch.device("cpu")), {"N": 10}, Tile(block=2000000))
        return sum(range(setting.block))

    case = TuneCase("toy", "N=10", [Tile(block=1)], work)
    monkeypatch.setattr(tune, "find_cases", lambda device: [case])


def test_the_command_writes_settings_that_choose_honours(toy_cases, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "tuned.json"

    status = run_tune("--out", str(path))

    assert status == 0
    record = json.loads(path.read_text())
    assert record["device"] == "interpreter"
    assert record["settings"] == {"toy/N=16": {"block": 1, "num_warps": 4}}
    assert {"versions", "command", "utc"} < record.keys()
    assert "toy (N=10): " in capsys.readouterr().out
    use_settings(monkeypatch, path)
    assert choose("toy", INTERPRETER, {"N": 10}, Tile(), lambda: [Tile(1)]) == Tile(block=1)


def test_the_command_says_when_there_is_nothing_to_tune_on(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert run_tune() == 2
    assert capsys.readouterr().out.startswith("tune: needs a CUDA device")


def test_the_command_knows_its_kernels(toy_cases, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert run_tune("--kernel", "nonsense") == 2
    assert "got 'nonsense'" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="the problems are small on the CPU only")
def test_every_tunable_kernel_runs_in_every_candidate(monkeypatch):
    monkeypatch.setattr(tune, "ROUNDS", 1)
    outcomes = [
        tune.try_settings(case, tune.measure_on_cpu) for case in tune.find_cases(INTERPRETER)
    ]

    kernels = {outcome.key.split("/")[0] for outcome in outcomes}
    assert kernels > {"gather_rows", "row_pass", "linear", "linear_scatter_", "mlp_"}
    assert {outcome.num_failed for outcome in outcomes} == {0}


# a process that compiles for a GPU, whether there is one or not; nothing may be launched in it
COMPILE_AHEAD = """
import importlib
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = get_current_stream = lambda self, device=None: 0

driver.set_active(Driver())
torch.cuda.is_available = lambda: False
linear = importlib.import_module("tokencache_kernels.backends.triton.linear")
from tokencache_kernels.commands import tune
from tokencache_kernels.backends.triton._launch import INTERPRETER
case = next(linear.tune_cases(INTERPRETER))
case.candidates[:] = [setting for setting in case.candidates if not setting.in_library][:2]
tune.compile_ahead(case)
print(len(linear._linear_kernel.device_caches[0][0]))
"""


def test_candidates_are_compiled_ahead_and_not_launched(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE_AHEAD]

    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.stdout == "2\n", done.stderr


# early starts


def test_kernels_start_early_on_request_where_the_device_can(monkeypatch):
    a100 = Device(arch=80, name="NVIDIA A100", num_sms=108)
    assert early_start(H200) == {"STARTS_EARLY": False}

    monkeypatch.setenv("TOKENCACHE_EARLY_START", "1")
    assert early_start(H200) == {"STARTS_EARLY": True, "launch_pdl": True}
    assert early_start(a100) == early_start(INTERPRETER) == {"STARTS_EARLY": False}
