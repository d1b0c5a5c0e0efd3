"""A dry run of the run book for a GPU: its records, its resumption, its failures."""

import contextlib
import faulthandler
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import attention, cases, gpu, install, kernels, published, stages, tune
from benchmarks.records import describe_run, read_records
from tokencache_kernels import backends
from tokencache_kernels.backends.triton._launch import SHIPPED, TuneCase, choose
from tokencache_kernels.backends.triton._tiles import TileSetting
from tokencache_kernels.commands import info
from tokencache_kernels.commands import tune as tuning
from tokencache_kernels.testing.counting import count_launches

ROOT = Path(__file__).resolve().parents[2]
# of benchmarks/README.md
FIELDS = {
    "case", "shape", "sizes", "dtype", "backend", "mode", "baseline", "median_ms", "p20_ms",
    "p80_ms", "runs", "input_sets", "bytes", "flops", "share_of_ceiling", "ceiling_gbps_measured",
    "ceiling_tflops_measured", "peak_bytes", "git", "dirty", "device", "driver", "torch",
    "triton", "cuda", "utc", "command", "environment", "session", "rehearsal",
}  # fmt: skip
GATHER = {"case": "gather_rows", "shape": "tiny", "dtype": "bfloat16"}


@pytest.fixture
def options(tmp_path, device):
    """Those of a rehearsal of one quick case, as a stage's own process sees them."""
    return Namespace(
        out=tmp_path, device=torch.device(device), only="gather_rows/tiny", commit="one",
        rehearse=True, session="first", no_compiled=False, no_tuning=False,
    )  # fmt: skip


@pytest.fixture
def journal(options):
    facts = describe_run(options.device, options.commit, options.session)
    return stages.Journal(options.out, "stage", {**facts, "rehearsal": True})


def soon():
    return time.monotonic() + 60


# the whole way, by the command


def test_a_rehearsal_is_recorded_and_logged_and_not_repeated(tmp_path):
    def rehearse():
        command = [
            *(sys.executable, "-m", "benchmarks.gpu", "--stage", "kernels", "--rehearse"),
            *("--only", "gather_rows/tiny", "--commit", "one", "--out", tmp_path),
        ]
        done = subprocess.run(
            # no git history, so that the commit is the one named
            command, cwd=ROOT, env={**os.environ, "GIT_DIR": str(tmp_path / "none")},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, read_records(tmp_path / "kernels.jsonl")

    out, records = rehearse()

    assert "1 cases measured, 0 done before" in out
    assert all(line in (tmp_path / "kernels.log").read_text() for line in out.splitlines())
    timed = [record for record in records if record["case"] == "gather_rows"]
    assert {"triton", "eager"} <= {record["backend"] for record in timed}
    for record in timed:
        assert record.keys() >= FIELDS
        assert 0 < record["p20_ms"] <= record["median_ms"] <= record["p80_ms"]
        assert (record["git"], record["rehearsal"]) == ("one", True)
    assert [r["dtype"] for r in records if r["case"] == "ceilings"] == ["bfloat16"]

    out, again = rehearse()
    assert "0 cases measured, 1 done before" in out
    assert [record for record in again if record["case"] == "gather_rows"] == timed


def test_pytest_benchmark_times_the_same_cases(tmp_path):
    file = tmp_path / "benchmark.json"
    command = [
        *(sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-k", "gather_rows-"),
        f"--benchmark-json={file}",
    ]

    # a worker of pytest-xdist would time nothing
    env = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout
    timed = json.loads(file.read_text())["benchmarks"]
    assert "eager" in {found["extra_info"]["backend"] for found in timed}
    assert len(timed) > 1
    for found in timed:
        assert found["stats"]["rounds"] == 30
        assert found["extra_info"].keys() >= {"bytes", "flops", "device", "torch", "input_sets"}


# the process above, which sees to it that work goes on


def test_a_death_is_recorded_and_another_process_goes_on(monkeypatch, tmp_path):
    begun = {"path": str(tmp_path / "kernels.jsonl"), "record": {**GATHER, "backend": "triton"}}
    lives = []

    def live(command, log, deadline):
        lives.append(command)
        if len(lives) == 1:
            (tmp_path / "at.json").write_text(json.dumps(begun))
            return -11
        return (gpu.GO_ON, 0)[len(lives) - 2]

    monkeypatch.setattr(gpu, "run_logged", live)
    options = Namespace(out=tmp_path, stage="kernels", budget=60, grace=20)

    assert gpu.supervise(options) == 0

    assert len(lives) == 3
    (record,) = read_records(tmp_path / "kernels.jsonl")
    assert record["backend"] == "triton"
    assert record["error"] == "the process ended with SIGSEGV"
    assert not (tmp_path / "at.json").exists()


def test_work_that_is_not_done_in_time_is_left_for_another_call(monkeypatch, tmp_path):
    lives = []

    def live(command, log, deadline):
        lives.append(command)
        if len(lives) == 1:
            (tmp_path / "at.json").write_text("{}")

    monkeypatch.setattr(gpu, "run_logged", live)

    assert gpu.supervise(Namespace(out=tmp_path, stage="kernels", budget=0, grace=20)) == 0
    assert len(lives) == 1
    assert not (tmp_path / "at.json").exists()


def test_a_command_is_logged_and_ends_in_time_with_all_it_started(tmp_path):
    child = "import time; print('a child', flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.monotonic()
    with (tmp_path / "log").open("w") as log:
        status = gpu.run_logged([sys.executable, "-c", parent], log, started + 2)
        assert gpu.run_logged([sys.executable, "-c", "import os; os.abort()"], log, soon()) == -6

    assert status is None
    assert time.monotonic() - started < 30
    assert (tmp_path / "log").read_text().startswith("a child\n")


def test_both_sides_mean_the_same_by_an_exit_status():
    assert gpu.GO_ON == stages.GO_ON


# a stage's own process


def test_a_spent_budget_starts_no_case(options, capsys):
    assert kernels.run_stage(options, deadline=0) == 0

    assert "the budget is spent" in capsys.readouterr().out
    assert not (options.out / "kernels.jsonl").exists()


def test_another_commit_is_measured_again(journal):
    done = [kernels.Case(cases.OPS["gather_rows"], cases.TINY, torch.bfloat16, is_leading=False)]
    measured = []

    def go(journal):
        stages.work_through(journal, done, lambda case: [{**case.key, "runs": 1}], soon())
        measured.append(len(journal.records))

    clean = {**journal.facts, "dirty": False}
    for change in ({}, {"session": "second"}, {"session": "third", "git": "two"}):
        # records are read anew, as by another process
        go(stages.Journal(journal.path.parent, "stage", {**clean, **change}))

    assert measured == [1, 1, 1]
    assert [r["git"] for r in read_records(journal.path)] == [clean["git"], "two"]


def test_a_line_cut_short_is_passed_over(journal):
    journal.write({**GATHER, "runs": 1})
    with journal.path.open("a") as file:
        file.write('{"case": "gather')

    assert [record["runs"] for record in read_records(journal.path)] == [1]


def test_a_changed_tree_goes_on_within_its_session_alone(journal):
    facts = {**journal.facts, "dirty": True}
    stages.Journal(journal.path.parent, "stage", facts).write({**GATHER, "median_ms": 1})

    same = stages.Journal(journal.path.parent, "stage", facts)
    other = stages.Journal(journal.path.parent, "stage", {**facts, "session": "second"})

    assert same.is_done(GATHER)
    assert not other.is_done(GATHER)


def test_a_case_that_raises_is_recorded_and_the_next_is_measured(journal):
    todo = [
        kernels.Case(cases.OPS[name], cases.TINY, torch.bfloat16, is_leading=False)
        for name in ("gather_rows", "scatter_rows_")
    ]

    def measure(case):
        if case.op.name == "gather_rows":
            try:
                raise MemoryError("too large\n\nfor this machine")
            finally:
                raise RuntimeError("the capture failed")
        yield {**case.key, "runs": 1}

    stages.work_through(journal, todo, measure, soon())

    failed, measured = read_records(journal.path)
    assert failed["error"] == (
        "RuntimeError: the capture failed; after MemoryError: too large for this machine"
    )
    assert measured["case"] == "scatter_rows_"
    assert not journal.at.exists()


def test_a_lost_device_ends_the_process_after_its_record(journal, monkeypatch):
    def synchronize():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    case = kernels.Case(cases.OPS["gather_rows"], cases.TINY, torch.bfloat16, is_leading=False)
    record = {**case.key, "backend": "triton", "error": "an illegal memory access"}

    with pytest.raises(SystemExit) as end:
        stages.work_through(journal, [case], lambda case: [record], soon())

    assert end.value.code == stages.GO_ON
    assert not journal.at.exists()
    # the case is begun again, without the contender
    assert not journal.is_done(case.key)
    assert journal.failed(case.key) == {("triton", None)}


# the stage kernels


def time_case(op, journal, device):
    case = kernels.Case(op, cases.TINY, torch.bfloat16, is_leading=False)
    ceilings = {torch.bfloat16: kernels.Ceilings(1e9, 1e9)}
    try:
        return list(kernels.time_case(case, ceilings, torch.device(device), journal, rehearse=True))
    finally:
        # or it would end this process some minutes later
        faulthandler.cancel_dump_traceback_later()


def test_a_contender_that_failed_is_not_tried_again(journal, device):
    journal.write({**GATHER, "backend": "triton", "mode": "stream", "error": "it hung"})

    records = time_case(cases.OPS["gather_rows"], journal, device)

    assert "eager" in {record["backend"] for record in records}
    assert "triton" not in {record["backend"] for record in records}


def test_a_wrong_result_is_recorded_and_not_timed(journal, device):
    op = replace(cases.OPS["gather_rows"], ours=lambda x, indices, backend: x[:, :5] + 1)

    records = time_case(op, journal, device)

    ours = [record for record in records if not record["baseline"]]
    assert {record["backend"] for record in ours} == {
        name
        for name in op.backends
        if backends.unavailable(name, op.name, torch.device(device), torch.bfloat16) is None
    }
    assert all("the result is off by" in record["error"] for record in ours)
    assert "eager" in {record["backend"] for record in records if "median_ms" in record}


def test_the_persistent_contender_is_one_launch(device):
    op = cases.OPS["mlp_"]
    ways = kernels.list_ways(op, torch.bfloat16, torch.device(device), with_compiled=False)
    (way,) = (way for way in ways if way.name == "triton-persistent")
    inputs = op.make_inputs(cases.TINY, torch.bfloat16, torch.device(device), seed=0)
    call = way.bind(inputs)

    with count_launches() as names:
        call()

    assert names == ["_mlp_kernel"]


@pytest.mark.parametrize("op", cases.OPS.values(), ids=cases.OPS)
def test_ours_and_the_others_do_the_same_work(op, device):
    def make_inputs(seed):
        return op.make_inputs(cases.TINY, torch.float32, torch.device(device), seed)

    reference = kernels.Way("reference", partial(cases.bind, op.ours, backend="reference"), ())
    others = [kernels.Way("", partial(cases.bind, other), ()) for other in op.others.values()]
    for way in (reference, *others):
        # which is how another library refuses a problem
        with contextlib.suppress(NotImplementedError):
            kernels.check_result(way, op, make_inputs)


def test_every_op_of_the_backends_is_timed():
    assert {op.backend_op for op in cases.OPS.values()} >= set(info.OPS) | {"row_pass"}


def test_the_arithmetic_is_that_of_the_layers():
    gigaflops = {
        shape.name: sum(cases.OPS[op].count_flops(shape) for op in ("linear", "linear_scatter_"))
        / 1e9
        for shape in cases.SHAPES
    }

    assert gigaflops["dit-xl-256px-2"] == pytest.approx(1.8, rel=0.02)
    assert gigaflops["flux-1024px-single"] == pytest.approx(104, rel=0.01)
    assert gigaflops["opensora-480p-2"] == pytest.approx(151, rel=0.01)
    for shape in filter(cases.OPS["mlp_"].fits, cases.SHAPES):
        assert cases.OPS["mlp_"].count_flops(shape) == pytest.approx(1e9 * gigaflops[shape.name])


def test_other_shares_of_fresh_tokens_are_for_the_ops_that_they_matter_to():
    named = {(case.op.name, case.shape.name) for case in kernels.list_cases(cuda(), False)}

    assert ("linear", "dit-xl-256px-16-30%") in named
    assert ("blend", "dit-xl-256px-16") in named
    assert ("blend", "dit-xl-256px-16-30%") not in named


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_librarys_gelu_is_told_from_the_other(monkeypatch, dtype, approximate):
    def linear_gelu(rows, weight, bias):
        product = torch.nn.functional.linear(rows, weight, bias)
        return torch.nn.functional.gelu(product, approximate=approximate)

    monkeypatch.setattr(published, "linear_gelu_in_library", linear_gelu)

    found = published.name_library_gelu(dtype, torch.device("cpu"))

    assert found == {"tanh": "tanh", "none": "erf"}[approximate]


def cuda():
    """A device to make plans for, which need not be there."""
    return torch.device("cuda")


# tuning, attention, and the installation of their results


def test_what_wins_is_always_in_the_file_and_not_tried_again(options, monkeypatch, device):
    slow, fast = TileSetting(1, 32, 4), TileSetting(2, 32, 4)
    tried = []

    def find_cases(device):
        for size in (16, 32):
            yield TuneCase("gather_rows", f"D={size}", [fast], partial(launch, device, size))

    def launch(device, size):
        tried.append(choose("gather_rows", device, {"D": size}, slow))

    monkeypatch.setattr(tuning, "find_cases", find_cases)
    monkeypatch.setattr(tuning, "compile_ahead", lambda case: None)
    for name in ("measure_on_cpu", "measure_on_gpu"):
        monkeypatch.setattr(tuning, name, lambda run: run() or 1 + (tried[-1] == slow))
    options.only = "tune"

    assert tune.run_stage(options, soon()) == 0
    settings = json.loads((options.out / "launch-settings.json").read_text())["settings"]
    won = {"rows": 2, "block_d": 32, "num_warps": 4}
    assert settings == {f"gather_rows/D={size}": won for size in (16, 32)}

    num_tried = len(tried)
    assert tune.run_stage(options, soon()) == 0
    assert len(tried) == num_tried


def attention_record(shape, backend, milliseconds, mode="graph", dtype="bfloat16"):
    return {
        "case": "attention", "shape": shape.name, "sizes": vars(shape), "dtype": dtype,
        "backend": backend, "mode": mode, "median_ms": milliseconds, "device": "NVIDIA H200",
        "git": "one", "rehearsal": False,
    }  # fmt: skip


def test_attentions_are_ordered_by_device_time_over_all_problems():
    flux, dit = cases.LEADING[1], cases.LEADING[0]
    records = [
        *(attention_record(flux, "cudnn", 1), attention_record(flux, "triton", 1.2)),
        # as called it is slower, which does not count
        *(attention_record(flux, "cudnn", 9, mode="stream"), attention_record(flux, "sdpa", 0.1)),
        *(attention_record(cases.LEADING[3], "cudnn", 2), attention_record(dit, "triton", 1)),
        attention_record(cases.LEADING[3], "triton", 2.1),
    ]

    rows = attention.order_attentions(records, "sm_90")

    assert [(row["max_head_dim"], row["order"]) for row in rows] == [
        (72, ["triton"]),
        (128, ["cudnn", "triton"]),
    ]
    assert rows[0]["source"].endswith("NVIDIA H200, commit one")


def test_measured_rows_go_first_and_replace_what_they_cover():
    rows = [{"device": "sm_90", "dtypes": ["bfloat16"], "max_head_dim": 128}]
    table = [
        {"device": "sm_90", "dtypes": ["bfloat16"], "max_head_dim": 128},
        {"device": "sm_90", "dtypes": ["bfloat16", "float16"], "max_head_dim": 128},
        {"device": "cuda", "dtypes": ["bfloat16"], "max_head_dim": None},
    ]

    assert attention.merge(rows, table) == [*rows, *table[1:]]


def test_attention_is_rehearsed(options):
    options.only = "attention/tiny"

    assert attention.run_stage(options, soon()) == 0

    table = json.loads((options.out / "attention.json").read_text())
    assert table[0]["source"].startswith(attention.REHEARSED)
    assert table[-1] == json.loads(attention.TABLE.read_text())[-1]


def test_what_was_found_is_taken_over_but_no_rehearsal(options, monkeypatch, tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(install, "RESULTS", package)
    monkeypatch.setattr(install, "SHIPPED", package / SHIPPED.name)
    monkeypatch.setattr(install, "TABLE", package / "attention.json")
    (options.out / "kernels.jsonl").write_text('{"rehearsal": false}\n{"rehearsal": true}\n')
    settings = options.out / "launch-settings.json"

    settings.write_text('{"device": "interpreter"}')
    (options.out / "attention.json").write_text(json.dumps([{"source": attention.REHEARSED}]))
    assert install.run_stage(options, soon()) == 0
    assert [path.name for path in package.iterdir()] == ["kernels.jsonl"]

    settings.write_text('{"device": "NVIDIA H200"}')
    (options.out / "attention.json").write_text("[]")
    assert install.run_stage(options, soon()) == 0
    assert (package / "settings" / "nvidia-h200.json").exists()
    assert (package / "attention.json").read_text() == "[]"
    # appended once
    assert (package / "kernels.jsonl").read_text() == '{"rehearsal": false}\n'
