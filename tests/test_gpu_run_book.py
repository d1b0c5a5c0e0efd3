"""The run book for a GPU, rehearsed: what it writes, where it goes on, what it refuses to time."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import cases, kernels
from tokencache_kernels import backends
from tokencache_kernels.backends.triton._counting import count_launches

ROOT = Path(__file__).resolve().parents[1]
# of benchmarks/README.md
FIELDS = {
    "case", "shape", "sizes", "dtype", "backend", "mode", "baseline", "median_ms", "p20_ms",
    "p80_ms", "runs", "input_sets", "bytes", "flops", "share_of_ceiling", "ceiling_gbps_measured",
    "ceiling_tflops_measured", "git", "dirty", "device", "driver", "torch", "triton", "cuda", "utc",
    "command", "rehearsal",
}  # fmt: skip


@pytest.fixture
def rehearse(tmp_path):
    """Run the stage ``kernels`` on its quickest case; return what it says and all records."""

    def run(*arguments):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "benchmarks.gpu", "--stage", "kernels", "--rehearse"),
                *("--only", "gather_rows/tiny", "--out", tmp_path, *arguments),
            ],
            cwd=ROOT,
            # no git history, so that the commit is the one named in the arguments
            env={**os.environ, "GIT_DIR": str(tmp_path / "none")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        path = tmp_path / "kernels.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return done.stdout, [json.loads(line) for line in lines]

    return run


def test_a_rehearsal_records_every_contender_and_is_not_repeated(rehearse):
    out, records = rehearse("--commit", "one")

    assert "1 cases to time" in out
    assert {"triton", "eager"} <= {record["backend"] for record in records}
    for record in records:
        assert record.keys() >= FIELDS
        assert 0 < record["p20_ms"] <= record["median_ms"] <= record["p80_ms"]
        assert record["git"] == "one"
        assert record["rehearsal"]

    out, again = rehearse("--commit", "one")
    assert "0 cases to time, 1 done before" in out
    assert again == records

    _, more = rehearse("--commit", "two")
    assert more[: len(records)] == records
    assert {record["git"] for record in more[len(records) :]} == {"two"}


def test_a_spent_budget_starts_no_case(rehearse):
    out, records = rehearse("--budget", "0")

    assert "the budget is spent: 1 cases are left" in out
    assert records == []


def test_a_wrong_result_is_recorded_and_not_timed(device):
    op = replace(cases.OPS["gather_rows"], ours=lambda x, indices, backend: x[:, :4] + 1)

    records = list(kernels.time_case(op, cases.TINY, torch.device(device), rehearse=True))

    wrong = [record for record in records if "error" in record]
    assert [record["backend"] for record in wrong] == [
        name
        for name in kernels.BACKENDS
        if backends.unavailable(name, op.name, torch.device(device), kernels.DTYPE) is None
    ]
    assert all("the result is off by" in record["error"] for record in wrong)
    assert {record["backend"] for record in records if "median_ms" in record} == {"eager"}


def test_the_persistent_contender_is_one_launch(device):
    (way,) = (
        way
        for way in kernels.list_ways(cases.OPS["mlp_"], torch.device(device), with_compiled=False)
        if way.name == "triton-persistent"
    )
    inputs = cases.OPS["mlp_"].make_inputs(cases.TINY, kernels.DTYPE, torch.device(device), seed=0)
    call = way.bind(inputs)

    with count_launches() as names:
        call()

    assert names == ["_mlp_kernel"]


@pytest.mark.parametrize("op", cases.OPS.values(), ids=cases.OPS)
def test_ours_and_the_published_way_do_the_same_work(op, device):
    reference = kernels.Way("reference", partial(cases.bind, op.ours, backend="reference"), ())

    def make_inputs(seed):
        return op.make_inputs(cases.TINY, kernels.DTYPE, torch.device(device), seed)

    kernels.check_result(reference, op, make_inputs)


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
