"""The README and the pages: their tables come from the records, and their examples run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
OPS = (ROOT / "docs" / "ops.md").read_text()


def read_code(text, start):
    """The Python block that begins with ``start``."""
    return re.search(rf"```python\n({re.escape(start)}.*?)```", text, re.DOTALL)[1]


def test_the_front_page_is_short():
    assert len(README.splitlines()) <= 120


def test_the_number_of_models_is_right():
    from tokencache_kernels.models import SPECS

    assert f"describes {len(SPECS)} classes of models" in README


def test_the_tables_are_those_of_the_records():
    pytest.importorskip("pandas")
    from benchmarks import report

    tables = report.make_tables(report.read_results())

    for page in report.PAGES:
        text = page.read_text()
        assert report.fill(text, tables) == text, f"run python -m benchmarks.report for {page}"


def test_the_op_example_runs():
    names = {}
    exec(read_code(OPS, "import torch"), names)

    assert names["cached_mlp"].isfinite().all()
    assert (names["positions"] >= 0).sum() == 2 * 64


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_example_draws_digits(capsys):
    pytest.importorskip("diffusers")
    names = {}
    exec(read_code(README, "import torch").replace("50", "4"), names)

    assert names["digits"].shape == (2, 1, 32, 32)
    assert names["digits"].isfinite().all()
    assert "steps: 3 full, 1 reused" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_pipeline_example_runs_on_a_tiny_model():
    pytest.importorskip("diffusers")
    import tokencache_kernels as tck
    from tokencache_kernels.integrations.diffusers import apply_token_cache
    from tokencache_kernels.testing import tiny_flux

    class Pipe:
        transformer = tiny_flux()

    apply, call = read_code(README, "apply_token_cache(pipe").splitlines()
    assert call.startswith("image = pipe(")
    exec(apply, {"pipe": Pipe, "tck": tck, "apply_token_cache": apply_token_cache})
    assert tck.ToCaConfig.preset("flux-1-dev") is not None
