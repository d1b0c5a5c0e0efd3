"""The report, on made-up records: every figure comes from one, and the right ones count."""

import json

import pytest

from benchmarks import report
from benchmarks.report import plots, records, targets, verdicts
from benchmarks.report.words import show_duration, show_number

GPU, CPU = "Made-up H200, sm_90, 1 GiB", "Made-up processor, 2 cores"


def make_record(case, backend, milliseconds, **fields):
    """A record that was never measured."""
    return {
        "case": case, "shape": "made-up", "dtype": "bfloat16", "backend": backend, "mode": "graph",
        "baseline": backend not in ("auto", "triton", "native"), "median_ms": milliseconds,
        "device": GPU, "git": "a" * 40, "dirty": False, "utc": "2000-01-01T00:00:00+00:00",
        "rehearsal": False, **fields,
    }  # fmt: skip


def make_layer(percent=10, **times):
    """A partial layer of DiT, by backend and mode."""
    sizes = {"B": 16, "N": 256, "S": 26 * percent // 10, "D": 1152, "extra": 0}
    return [
        make_record(
            "layer", backend, time, mode=mode, sizes=sizes, shape=f"dit-{percent}%",
            bytes=1, flops=1, share_of_ceiling=0.5,
        )
        for (backend, mode), time in (
            (name.split("_"), time) for name, time in times.items()
        )
    ]  # fmt: skip


def make_run(policy, milliseconds, what="run", **fields):
    return make_record(
        "model",
        "torch" if policy == "dense" else "auto",
        milliseconds,
        **{
            "shape": "dit-xl-256px-16", "part": "toca", "policy": policy, "modulation": "per-step",
            "what": what, "flops_ratio": 1.0 if policy == "dense" else 2.5, "peak_bytes": 3e9,
            "flops": 1, **fields,
        },
    )  # fmt: skip


LAYER = make_layer(
    auto_graph=0.02, auto_stream=0.03, eager_stream=0.13, eager_graph=0.08, eager_compiled=0.05,
    library_graph=0.03, dense_graph=0.01,
)  # fmt: skip
RUNS = [
    make_run("dense", 100.0),
    make_run("dense", 120.0, mode="stream"),
    make_run("dense", 2.0, "dense_step"),
    make_run("toca", 50.0),
    make_run("toca", 2.5, "full_step"),
    make_run("toca", 0.5, "partial_step", flops_ratio=8.0),
]


def make_tables(found, explanations=None):
    predicted = json.loads(report.PREDICTIONS.read_text())
    return report.make_tables(records.keep_current(found), predicted, explanations or {})


def find_row(table, *words):
    """The cells of the one line that has all these words."""
    (line,) = (line for line in table.splitlines() if all(word in line for word in words))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_committed_tables_are_those_of_the_committed_records():
    text = report.PERFORMANCE.read_text()

    assert report.fill(text, report.read_tables()) == text


def test_every_table_stands_somewhere():
    texts = report.README.read_text() + report.PERFORMANCE.read_text()

    for name in report.read_tables():
        assert f"<!-- table: {name} -->" in texts


def test_targets_are_judged_by_records():
    table = make_tables(LAYER)["targets"]

    assert find_row(table, "DiT-XL/2", "over eager")[3] == "6.50x, met"
    rows = [line for line in table.splitlines() if "torch.compile" in line]
    assert "2.50x, met" in rows[0]
    assert "not measured" in rows[1]
    assert "**missed**" in make_tables(make_layer(auto_graph=1.0, eager_stream=2.0))["targets"]


def test_a_layer_is_compared_with_each_other_way():
    row = find_row(make_tables(LAYER)["layers"], "dit-10%")

    assert row[1:] == ["20.0 us (auto, in a graph)", "6.50x", "4.00x", "2.50x", "1.50x", "0.500x"]


def test_models_are_compared_with_the_fastest_dense_run():
    tables = make_tables(RUNS)

    row = find_row(tables["models"], "dit-xl-256px-16")
    assert row[2:] == ["2.00x", "2.50x", "1.25x", "25%", "12%", "3.00 GB (dense 3.00 GB)"]
    assert find_row(tables["targets"], "batch 8")[3] == "2.00x, **missed**"


def test_the_commit_measured_last_counts_and_rehearsals_never():
    old = make_layer(auto_graph=9.0, eager_stream=9.0, eager_graph=9.0)
    new = [{**r, "git": "b" * 40, "utc": "2001"} for r in make_layer(auto_graph=1.0)]
    later = [{**r, "git": "b" * 40, "utc": "2002"} for r in make_layer(auto_graph=2.0)]
    rehearsed = [{**r, "rehearsal": True, "utc": "2003"} for r in make_layer(auto_graph=3.0)]

    kept = records.keep_current([*rehearsed, *later, *old, *new])

    assert [(r["median_ms"], r["git"][0]) for r in kept] == [(2.0, "b")]


def test_an_error_takes_the_place_of_an_earlier_time():
    (timed,) = make_layer(auto_graph=1.0)
    failed = {**timed, "error": "made up", "utc": "2001"}
    del failed["median_ms"]

    (kept,) = records.keep_current([timed, failed])

    assert kept == failed


def test_a_dirty_tree_is_marked():
    table = make_tables([{**r, "dirty": True} for r in LAYER])["targets"]

    assert "6.50x†, met" in table


def test_devices_stand_side_by_side():
    other = [
        {**r, "device": "Another, sm_80"} for r in make_layer(auto_graph=1.0, eager_stream=1.0)
    ]

    table = make_tables([*LAYER, *other])["targets"]

    row = find_row(table, "DiT-XL/2", "over eager")
    assert row[3:] == ["1.00x, **missed**", "6.50x, met"]


def test_processors_have_their_own_targets():
    sizes = {"B": 2, "N": 256, "S": 26, "D": 1152}
    common = {"sizes": sizes, "device": CPU, "mode": "stream"}
    found = [
        make_record("layer-of-given-tokens", name, time, **common)
        for name, time in (("native", 1.0), ("eager", 2.5), ("eager-products", 0.1))
    ]

    tables = make_tables(found)

    assert find_row(tables["targets-cpu"], "26 fresh, bfloat16")[2] == "2.50x, met"
    assert CPU not in tables["targets"]


def test_a_prediction_far_off_wants_an_explanation():
    def find(milliseconds, explanations):
        table = make_tables(make_layer(auto_graph=milliseconds), explanations)["design"]
        return find_row(table, "16 x 256 tokens, 26 fresh, D = 1152: ours")

    key = "layer/16x256/26/1152/ours"

    assert find(0.2, {})[1:] == ["35.0 us", "200 us", verdicts.UNEXPLAINED]
    assert find(0.2, {key: "because"})[-1] == "because"
    assert find(0.02, {})[-1] == verdicts.UNEXPLAINED
    assert find(0.04, {})[-1] == ""


def test_measurements_stand_beside_what_the_roofline_says():
    predicted = json.loads(report.PREDICTIONS.read_text())
    one = predicted["layers"]["predictions"][0]
    time = 2 * one["ms"]["auto/graph"]

    row = find_row(
        make_tables([make_record("layer", "auto", time, shape=one["shape"], sizes={})])[
            "predicted-layers"
        ],
        one["shape"],
    )

    assert row[-2:] == ["2.00x", verdicts.UNEXPLAINED]


def test_an_op_shows_its_share_of_the_ceiling():
    found = [
        make_record("row_pass_", "triton", 0.1, bytes=20_000_000, share_of_ceiling=0.8),
        make_record("row_pass_", "eager", 0.5, mode="stream", bytes=20_000_000),
        make_record("row_pass_", "eager", 0.3, mode="compiled", bytes=20_000_000),
    ]

    tables = make_tables(found)

    assert find_row(tables["kernels"], "row_pass_")[1:] == [
        "100 us (triton, in a graph)", "500 us (eager)", "300 us (eager, compiled)", "5.00x",
        "3.00x", "80%",
    ]  # fmt: skip
    assert find_row(tables["targets"], "row pass")[3] == "80%, met"


def test_plots_are_drawn_where_there_are_records(tmp_path):
    (tmp_path / "roofline.png").touch()
    found = [*LAYER, *make_layer(50, auto_graph=0.02, dense_graph=0.05), *RUNS]

    plots.draw_all(found, tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == {"break-even.png", "speed-flops.png"}
    assert plots.collect_layers(LAYER)[0][2] == pytest.approx(0.5)
    assert "not drawn" in make_tables(RUNS)["plot: roofline"]


def test_every_claim_has_a_name_of_its_own():
    claims = [*targets.ON_GPU, *targets.ON_CPU, *verdicts.design.list_claims()]

    assert len({claim.key for claim in claims}) == len(claims)


def test_figures_are_short():
    assert [show_number(value) for value in (1234.5, 123.4, 12.34, 1.234, 0.1234)] == [
        "1,234", "123", "12.3", "1.23", "0.123",
    ]  # fmt: skip
    assert [show_duration(ms) for ms in (0.0012, 0.9, 12.0, 2500.0)] == [
        "1.20 us", "900 us", "12.0 ms", "2.50 s",
    ]  # fmt: skip
