"""The report, on made-up records: every figure comes from one, and the right ones count."""

import pytest

pd = pytest.importorskip("pandas")

from benchmarks import report  # noqa: E402

GPU, CPU = "Made-up H200, sm_90, 1 GiB", "Made-up processor, 2 cores"


def make_record(backend, milliseconds, **fields):
    """A record that was never measured."""
    return {
        "case": "layer", "shape": "made-up", "dtype": "bfloat16", "backend": backend,
        "mode": "graph", "baseline": backend not in ("auto", "native"), "median_ms": milliseconds,
        "share_of_ceiling": 0.5, "device": GPU, "git": "a" * 40, "dirty": False,
        "utc": "2000-01-01T00:00:00+00:00", "rehearsal": False, **fields,
    }  # fmt: skip


def make_frame(*records):
    return report.keep_current(pd.DataFrame(records))


def test_a_layer_is_compared_with_every_other_way():
    records = make_frame(
        make_record("auto", 0.02),
        make_record("eager", 0.13, mode="stream"),
        make_record("eager", 0.05, mode="compiled"),
        make_record("dense", 0.01),
        make_record("products", 0.001),
    )

    (row,) = report.write_layers(records).splitlines()[4:]

    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "layer, made-up, bfloat16", "0.02 ms (auto, graph)", "6.50x", "-", "2.50x", "0.50x"
    ]  # fmt: skip


def test_an_op_shows_the_fastest_of_each_side_and_its_roofline():
    records = make_frame(
        make_record("native", 2.0, case="linear", mode="stream", device=CPU),
        make_record("eager", 6.0, case="linear", mode="stream", device=CPU),
        make_record("addmm", 1.0, case="linear", mode="stream", device=CPU),
    )

    written = report.write_ops(records)

    assert "| 3.00x | 1 ms (addmm) | 0.50x | 50% |" in written
    assert f"**{CPU}**" in written


def test_a_run_is_compared_with_the_fastest_dense_run():
    def run(policy, milliseconds, mode="graph"):
        return make_record(
            "torch" if policy == "dense" else "auto", milliseconds, case="model", part="toca",
            policy=policy, modulation="per-step", what="run", flops_ratio=2.5, mode=mode,
        )  # fmt: skip

    records = make_frame(run("dense", 100.0), run("dense", 120.0, "stream"), run("toca", 50.0))

    assert "| 50 ms (auto, graph) | 2.00x | 2.50x |" in report.write_models(records)


def test_the_commit_measured_last_counts_and_a_dry_run_never():
    later = {"utc": "2000-01-02T00:00:00+00:00"}
    records = make_frame(
        make_record("auto", 9.0),
        make_record("eager", 7.0),
        make_record("auto", 1.0, git="b" * 40, **later),
        make_record("eager", 2.0, git="b" * 40, **later),
        make_record("auto", 0.1, git="b" * 40, rehearsal=True, **later),
    )

    assert sorted(records.median_ms) == [1.0, 2.0]


def test_an_error_takes_the_place_of_an_earlier_time():
    records = make_frame(
        make_record("auto", 1.0),
        make_record("auto", None, error="lost", utc="2000-01-02T00:00:00+00:00"),
    )

    assert report.write_layers(records) == report.NOTHING


def test_a_dirty_tree_is_marked():
    assert "1 ms† (auto, graph)" in report.write_layers(
        make_frame(make_record("auto", 1.0, dirty=True))
    )


def test_every_table_stands_on_a_page():
    pages = "".join(page.read_text() for page in report.PAGES)

    for name in report.make_tables(report.read_results()):
        assert f"<!-- table: {name} -->" in pages


def test_layers_are_drawn_where_there_are_records(tmp_path):
    pytest.importorskip("matplotlib")
    report.draw_layers(report.read_results(), tmp_path / "layers.png")

    assert (tmp_path / "layers.png").stat().st_size > 10_000
