"""Fixtures for every test: the backends that can run here, the device, and poisoned memory."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # before any kernel module is imported: run the real kernel sources in Triton's interpreter
    os.environ["TRITON_INTERPRET"] = "1"
else:
    # before the first product: cuBLAS would be called indeterminate, in a warning
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with warnings.catch_warnings():
        # some versions of torch would rather have it set otherwise
        warnings.simplefilter("ignore")
        # convolutions are as exact as products, which are no TF32 by default
        torch.backends.cudnn.allow_tf32 = False

from tokencache_kernels import backends, settings  # noqa: E402


@pytest.fixture
def device() -> str:
    """The device under test."""
    return DEVICE


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that can run here; a test of an op that it lacks skips with its reason."""
    family = getattr(request.module, "OPS", ())
    for op in family:
        reason = backends.unavailable(request.param, op, torch.device(DEVICE), torch.float32)
        if reason is not None:
            pytest.skip(f"{request.param}: {reason}")
    return str(request.param)


@pytest.fixture
def monkeypatch(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Pytest's own; settings are read anew after each of its changes, and a backend chosen anew."""

    def noticed(change: Callable[..., None]) -> Callable[..., None]:
        def change_and_reread(*arguments: Any, **named: Any) -> None:
            change(*arguments, **named)
            settings.reread()

        return change_and_reread

    with pytest.MonkeyPatch.context() as patch:
        for name in ("setenv", "delenv", "setattr", "undo"):
            patch.setattr(monkeypatch, name, noticed(getattr(monkeypatch, name)), raising=False)
        yield monkeypatch
        monkeypatch.undo()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill fresh memory with NaN (integers: their maximum), so that an unwritten element shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def rehearse(tmp_path: Path) -> Callable[[str, str], list[dict[str, Any]]]:
    """Rehearse some cases of a stage of the run book; returns its records."""

    def run(stage: str, only: str) -> list[dict[str, Any]]:
        command = [
            *(sys.executable, "-m", "benchmarks.gpu", "--stage", stage, "--rehearse"),
            *("--only", only, "--out", str(tmp_path)),
        ]
        done = subprocess.run(
            command,
            cwd=Path(__file__).resolve().parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        lines = (tmp_path / f"{stage}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return run
