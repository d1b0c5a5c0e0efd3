"""The choice of a backend: a named one runs or raises; only auto may pass one over."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from tokencache_kernels import backends, ops
from tokencache_kernels.backends import native, reference
from tokencache_kernels.errors import BackendUnavailableError
from tokencache_kernels.testing import randn, random_indices

CPU = torch.device("cpu")


def test_a_backend_asked_for_by_name_never_falls_back():
    # in a process of its own: here Triton's kernels may have been loaded for the interpreter
    code = """
import torch
from tokencache_kernels import BackendUnavailableError, gather_rows
try:
    gather_rows(torch.ones(1, 4, 8), torch.zeros(1, 2, dtype=torch.int32), backend="triton")
except BackendUnavailableError as error:
    print(error)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )

    assert out.stdout.strip() == (
        "gather_rows: backend 'triton' cannot run here: it needs a CUDA device "
        "(or TRITON_INTERPRET=1), got cpu"
    )


def test_a_backend_named_in_the_environment_never_falls_back_either(monkeypatch):
    monkeypatch.setenv("TOKENCACHE_BACKEND", "library")

    with pytest.raises(
        BackendUnavailableError,
        match=r"^gather_rows: backend 'library' cannot run here: it has no gather_rows$",
    ):
        ops.gather_rows(randn(1, 4, 8), random_indices(1, 4, 2))


def test_an_argument_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv("TOKENCACHE_BACKEND", "library")

    chosen = backends.resolve("gather_rows", CPU, torch.float32, "reference")

    assert chosen is reference.gather_rows


def test_a_wrong_name_in_the_environment_is_an_error(monkeypatch):
    monkeypatch.setenv("TOKENCACHE_BACKEND", "cuda")

    with pytest.raises(ValueError, match=r"TOKENCACHE_BACKEND must be one of auto, triton, native"):
        ops.gather_rows(randn(1, 4, 8), random_indices(1, 4, 2))


def test_auto_says_what_it_passed_over(caplog, monkeypatch):
    monkeypatch.setattr(native, "unavailable", lambda device, dtype: "it is tired")
    with caplog.at_level(logging.DEBUG, logger="tokencache_kernels.backends"):
        chosen = backends.resolve("gather_rows", CPU, torch.float32)

    assert chosen is reference.gather_rows
    assert "passing over backend 'native': it is tired" in caplog.text


def test_float64_runs_on_the_reference():
    hidden_states = randn(1, 4, 8, dtype=torch.float64)

    out = ops.add_branches(hidden_states, [hidden_states], [None])

    torch.testing.assert_close(out, 2 * hidden_states)
