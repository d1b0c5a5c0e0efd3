"""What every benchmark should take on an H200: ``python -m benchmarks.predict``.

The benchmarks' own calls are run on tensors without data, and what they launch (``launches.py``) is
priced by ceilings (``roofline.py``). Writes ``predictions.json``, which the report lays beside what
was measured. Nothing in it is a measurement. ``--only runs`` predicts one kind anew.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import torch

from tokencache_kernels.commands import info
from tokencache_kernels.policies import make_plan

from . import layers, models
from .cases import OPS, SHAPES, Op, Shape, bind
from .launches import trace
from .roofline import H200, Device, Kernel, floor, fuse, list_layer, price

PATH = Path(__file__).parent / "predictions.json"
NO_DATA = torch.device("meta")
# what else a user could pick, of which libraries have no code that runs without data
PREDICTED_OTHERS = ("topk", "addmm", "sdpa")
# by the mode of a record, what a launch costs
PRICES = {"stream": "eager", "graph": "graph"}

Prediction = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=KINDS, help="leave the other kinds as they are")
    only = parser.parse_args().only
    device = H200
    predictions = json.loads(PATH.read_text()) if only else {"device": device.name}
    for kind, predict in KINDS.items():
        if only in (None, kind):
            with without_data():
                found = list(predict(device))
            predictions[kind] = {"git": info.source_facts()["git"], "predictions": found}
    PATH.write_text(write_lines(predictions))


def write_lines(predictions: dict[str, Any]) -> str:
    """JSON with a line for each prediction."""
    kinds = [json.dumps("device") + ": " + json.dumps(predictions["device"])]
    for kind in KINDS:
        lines = ",\n".join(map(json.dumps, predictions[kind]["predictions"]))
        git = json.dumps(predictions[kind]["git"])
        kinds.append(f'"{kind}": {{"git": {git}, "predictions": [\n{lines}\n]}}')
    return "{" + ",\n".join(kinds) + "}\n"


@contextmanager
def without_data() -> Iterator[None]:
    """Let random tensors be asked for on ``meta``, which has no generator of its own."""
    no_autocast = mock.patch.object(torch, "is_autocast_enabled", return_value=False)
    with mock.patch.object(torch, "Generator", _HostGenerator), no_autocast, torch.no_grad():
        yield


class _HostGenerator(torch.Generator):
    def __new__(cls, device: torch.device) -> torch.Generator:
        return super().__new__(cls, "cpu")


def predict_kernels(device: Device) -> Iterator[Prediction]:
    """Every op at every shape."""
    for shape in SHAPES:
        for op in OPS.values():
            if op.fits(shape):
                yield predict_kernel(op, shape, device)


def predict_kernel(op: Op, shape: Shape, device: Device) -> Prediction:
    """Ours, the published way, and PyTorch's own parts."""
    inputs = op.make_inputs(shape, torch.bfloat16, NO_DATA, seed=0)
    others = {name: op.others[name] for name in PREDICTED_OTHERS if name in op.others}
    calls = {
        "auto": bind(op.ours, inputs, backend="auto"),
        **{name: bind(call, inputs) for name, call in {op.eager: op.published, **others}.items()},
    }
    return _describe(op.name, shape, calls, 1, device)


def predict_layers(device: Device) -> Iterator[Prediction]:
    """Every partial layer; times are those of one."""
    for shape in (*layers.LEADING, *layers.GRID):
        work = layers.make_work(shape, torch.bfloat16, NO_DATA)
        calls = {
            "auto": partial(layers.run_ours, work, "auto"),
            "eager": partial(layers.run_published, work),
            "dense": partial(layers.run_dense, work),
        }
        found = _describe("layer", shape, calls, shape.L, device)
        if not shape.extra:
            # a compiler cannot be traced; the design says what it makes of a layer
            compiled = list_layer(shape.B, shape.N, shape.S, shape.D, shape.M, "compiled")
            found["ms"]["eager/compiled"] = 1e3 * price(compiled, device, "graph")
        yield found


def predict_runs(device: Device) -> Iterator[Prediction]:
    """Whole runs of the models: dense, under ToCa, and as published."""
    for name, batch, part in models.PLAN:
        if part == "toca":
            yield from predict_run(models.Case(name, batch, part, NO_DATA, rehearse=False), device)


def predict_run(case: models.Case, device: Device) -> Iterator[Prediction]:
    """Each contender of a case; the dense model with its modulation precomputed too."""
    subject = case.make_subject()
    contenders = [replace(one, mode="stream") for one in case.contenders]
    contenders += [replace(one, policy="dense", backend="torch") for one in contenders]
    for contender in dict.fromkeys(contenders):
        policy = case.make_policy(contender.policy, subject)
        kinds = ["dense_step"] * case.model.num_steps
        if policy is not None:
            kinds = [models.name_step(step) for step in make_plan(policy, subject.shape).steps]
        call = models.make_call(contender, case, subject)
        # the steps of a dense model are all alike but for the first
        num_steps = len(kinds) if policy else 2
        steps = [collect(step) for step in models.list_calls(call, subject, num_steps)]
        steps += steps[1:] * (len(kinds) - num_steps)
        yield {
            **{name: case.key[name] for name in ("case", "shape", "dtype")},
            **{name: getattr(contender, name) for name in ("policy", "backend", "modulation")},
            **_sum_up(steps, kinds, device),
        }


def _sum_up(steps: list[list[Kernel]], kinds: list[str], device: Device) -> Prediction:
    """Of a run, and of the mean step of each kind."""
    times = {
        mode: [1e3 * price(kernels, device, way) for kernels in steps]
        for mode, way in PRICES.items()
    }
    if set(kinds) == {"dense_step"}:
        times["compiled"] = [1e3 * price(fuse(kernels), device, "graph") for kernels in steps]
    return {
        "floor_ms": 1e3 * sum(floor(kernels, device) for kernels in steps),
        "flops": sum(kernel.flops for kernels in steps for kernel in kernels),
        "launches": sum(map(len, steps)),
        "ms": {mode: sum(of_mode) for mode, of_mode in times.items()},
        "steps_ms": {
            kind: mean(t for t, one in zip(times["graph"], kinds, strict=True) if one == kind)
            for kind in dict.fromkeys(kinds)
        },
    }


def _describe(
    case: str, shape: Shape, calls: dict[str, Callable[[], object]], parts: int, device: Device
) -> Prediction:
    launched = {name: collect(call) for name, call in calls.items()}
    return {
        "case": case,
        "shape": shape.name,
        "sizes": vars(shape),
        "dtype": "bfloat16",
        "bytes": sum(kernel.bytes for kernel in launched["auto"]) // parts,
        "floor_ms": 1e3 * floor(launched["auto"], device) / parts,
        "launches": {name: len(kernels) / parts for name, kernels in launched.items()},
        "ms": {
            f"{name}/{mode}": 1e3 * price(kernels, device, way) / parts
            for name, kernels in launched.items()
            for mode, way in PRICES.items()
        },
    }


def collect(call: Callable[[], object]) -> list[Kernel]:
    """What a call launches."""
    with trace() as kernels:
        call()
    return kernels


KINDS = {"kernels": predict_kernels, "layers": predict_layers, "runs": predict_runs}

if __name__ == "__main__":
    main()
