"""The stage ``layers``, rehearsed: every contender does the same work, and leaves its records."""

from dataclasses import replace

import pytest
import torch

from benchmarks import layers
from benchmarks.kernels import Ceilings
from benchmarks.stages import Journal

FIELDS = {
    "case", "shape", "sizes", "dtype", "backend", "mode", "baseline", "median_ms", "p20_ms",
    "p80_ms", "runs", "input_sets", "bytes", "flops", "share_of_ceiling", "ceiling_gbps_measured",
    "ceiling_tflops_measured", "git", "dirty", "device", "driver", "torch", "triton", "cuda", "utc",
    "command", "rehearsal",
}  # fmt: skip


def test_a_rehearsal_records_every_contender(rehearse):
    records = rehearse("layers", "layer/tiny/")
    records = [record for record in records if record["case"] == "layer"]
    expected = {"eager", "auto", "auto-selecting-by-layer", "triton", "library", "dense"}
    assert expected <= {record["backend"] for record in records}
    for record in records:
        assert record.keys() >= FIELDS
        assert 0 < record["p20_ms"] <= record["median_ms"] <= record["p80_ms"]


@pytest.mark.parametrize("place", range(3), ids=["selecting", "single", "given"])
def test_every_way_leaves_what_the_published_way_leaves(device, place):
    case = layers.list_cases(torch.device(device), rehearse=True)[place]

    for way in layers.list_ways(case):
        if way.is_comparable:
            layers.check_result(case, way.make_run())


def test_a_way_that_leaves_something_else_is_not_timed(device):
    case = layers.list_cases(torch.device(device), rehearse=True)[0]

    with pytest.raises(ValueError, match="the result is off by"):
        layers.check_result(case, layers.run_dense)


@pytest.mark.parametrize("shape", [layers.TINY, layers.TINY_SINGLE], ids=lambda shape: shape.name)
def test_what_is_compiled_is_one_graph_and_timed(device, shape, monkeypatch, tmp_path):
    # all of the compiler but its last and slow part
    monkeypatch.setattr(
        layers,
        "_compile",
        lambda function, *_: torch.compile(
            function, backend="aot_eager", dynamic=False, fullgraph=True
        ),
    )
    case = layers.Case(shape, torch.bfloat16, torch.device(device), is_compiled=True)
    ceilings = {torch.bfloat16: Ceilings(bytes=1e9, flops=1e12)}
    journal = Journal(tmp_path, "layers", {"session": None, "git": None})

    graph = "graph" if device == "cuda" else "stream"

    records = list(layers.time_case(case, ceilings, journal, rehearse=True))

    assert [record["error"] for record in records if "error" in record] == []
    found = {(record["backend"], record["mode"]) for record in records}
    assert found >= {("eager", "compiled"), ("dense", "compiled"), ("library", graph)}


@pytest.mark.parametrize("shape", [layers.TINY, layers.TINY_SINGLE], ids=lambda shape: shape.name)
def test_bytes_are_those_of_the_tensors(shape):
    shape = replace(shape, L=1)
    case = layers.Case(shape, torch.bfloat16, torch.device("cpu"))
    work = layers.make_work(shape, torch.bfloat16, torch.device("cpu"))
    (layer,) = work.layers
    share = shape.S / shape.N

    read_and_written = [work.x, work.x, work.before, work.staleness, work.staleness]
    read = [
        layer.fc1,
        layer.fc2,
        work.scores,
        *([] if layer.attention is None else [layer.attention]),
    ]
    fresh = [layer.cache, *([] if layer.attended is None else [layer.attended])]
    selected = 4 * shape.B * (shape.N + shape.S)

    total = sum(tensor.nbytes for tensor in (*read_and_written, *read)) + selected
    assert case.bytes == total + sum(share * tensor.nbytes for tensor in fresh)


def test_the_arithmetic_is_that_of_the_layers():
    gigaflops = {
        shape.name: layers.Case(shape, torch.bfloat16, torch.device("cpu")).flops / 1e9
        for shape in layers.LEADING
    }

    # 16 R D^2, and the attention that fc2 reads
    assert gigaflops["dit-xl-256px-16-10%"] == pytest.approx(8.83, rel=0.01)
    assert gigaflops["flux-1024px-10%"] == pytest.approx(69.5, rel=0.01)
    assert gigaflops["flux-1024px-single"] == pytest.approx(104, rel=0.01)


def test_a_processor_is_asked_for_the_products_alone_too(device):
    if device != "cpu":
        pytest.skip("the CPU's cases")

    cases = layers.list_cases(torch.device(device), rehearse=False)

    assert {(case.shape.B, case.shape.S) for case in cases} == {
        (B, S) for B in (2, 8) for S in (26, 64, 128)
    }
    assert {case.dtype for case in cases} == {torch.bfloat16, torch.float32}
    names = [way.name for way in layers.list_ways(cases[0])]
    assert names == ["eager", "native", "dense", "products", "eager-products"]
