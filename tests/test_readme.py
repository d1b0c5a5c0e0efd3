"""The README says what is so: its tables come from the records, its example runs."""

import re

import pytest
import torch

from benchmarks import report

TEXT = report.README.read_text()


def test_the_tables_are_those_of_the_records():
    assert report.fill(TEXT, report.read_tables()) == TEXT


def test_the_op_example_runs():
    code = re.search(r"```python\n(import torch.*?)```", TEXT, re.DOTALL)[1]

    names = {}
    exec(code, names)

    assert names["cached_mlp"].isfinite().all()
    assert (names["positions"] >= 0).sum() == 2 * 64


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_diffusers_example_runs_on_a_tiny_model():
    pytest.importorskip("diffusers")
    from tokencache_kernels.testing import tiny_dit

    code = re.search(r"```python\n(import tokencache_kernels.*?)\n\n", TEXT, re.DOTALL)[1]

    class Pipe:
        transformer = tiny_dit()

    exec(code, {"pipe": Pipe})
    labels = torch.tensor([1, 2])
    for step in range(3):
        with torch.no_grad():
            out = Pipe.transformer(
                torch.randn(2, 2, 8, 8), timestep=labels * 0 + 900 - step, class_labels=labels
            )
    assert out.sample.isfinite().all()
