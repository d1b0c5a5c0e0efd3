"""A call of an op costs little in Python: counted in calls, since times vary by machine."""

import importlib
import os
import sys

import pytest
import torch

from tokencache_kernels import ops
from tokencache_kernels.testing import randn, random_indices

B, N, S, D = 2, 9, 4, 16


@pytest.fixture
def calls(device):
    """A call of each of the ops of a partial layer."""
    x, cache, branch = (randn(B, N, D, device=device, seed=seed) for seed in range(3))
    rows, weight = randn(B, S, D, device=device), randn(D, D, device=device)
    gate, bias = randn(B, D, device=device), randn(D, device=device)
    indices = random_indices(B, N, S, device=device)
    positions = ops.invert_indices(indices, N)
    scores = randn(3, B, N, device=device)
    staleness = torch.zeros(3, B, N, dtype=torch.int32, device=device)
    return {
        "gather_rows": lambda: ops.gather_rows(x, indices),
        "scatter_rows_": lambda: ops.scatter_rows_(cache, indices, rows),
        "linear": lambda: ops.linear(rows, weight, bias, activation="gelu_tanh"),
        "linear_scatter_": lambda: ops.linear_scatter_(cache, indices, rows, weight, bias),
        "row_pass_": lambda: ops.row_pass_(
            x, [branch, branch], [gate, gate], indices, gate, gate, positions=positions
        ),
        "select_tokens_": lambda: ops.select_tokens_(scores, staleness, S),
    }


def count_python_calls(function):
    """Count the Python functions that a call enters."""
    count = 0

    def notice(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(notice)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


# a third more than the calls took when this was written
MOST = {
    "gather_rows": 36,
    "scatter_rows_": 44,
    "linear": 40,
    "linear_scatter_": 60,
    "row_pass_": 100,
    "select_tokens_": 50,
}


@pytest.mark.parametrize("op", MOST)
def test_a_call_enters_few_python_functions(calls, op):
    with torch.no_grad():
        calls[op]()
        assert count_python_calls(calls[op]) <= MOST[op]


def test_a_call_imports_nothing_and_reads_no_environment(calls):
    def refuse(*arguments, **named):
        raise AssertionError(f"asked for {arguments}")

    with torch.no_grad():
        for call in calls.values():
            call()
        # not by the fixture's setattr, after which settings would be read again
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(importlib, "import_module", refuse)
            patch.setattr(type(os.environ), "__getitem__", refuse)
            patch.setattr(type(os.environ), "get", refuse)
            for call in calls.values():
                call()


def test_an_environment_read_again_chooses_again(calls, monkeypatch):
    calls["gather_rows"]()

    monkeypatch.setenv("TOKENCACHE_BACKEND", "library")

    with pytest.raises(RuntimeError, match="it has no gather_rows"):
        calls["gather_rows"]()
