"""The training loop: its results, its interruptions, and its refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tokencache_kernels.errors import DivergedError
from tokencache_kernels.learn.training import (
    FORMAT,
    TrainingSettings,
    load_safetensors,
    replace_file,
    train_module,
)

pytest.importorskip("tqdm")
save_file = pytest.importorskip("safetensors.torch").save_file

SETTINGS = TrainingSettings(num_steps=20, learning_rate=0.05, weight_decay=0.1, save_every=6)
FACTS = {"task": "lines"}


def make_module():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def fit_lines(module, on_step=lambda step: None):
    """A loss whose inputs come from the generator."""

    def compute_loss(step, generator):
        on_step(step)
        x = torch.randn(8, 3, generator=generator)
        loss = (module(x) - x[:, :2]).square().mean()
        return loss, {"step_twice": 2.0 * step}

    return compute_loss


def train(path, settings=SETTINGS, module=None, facts=FACTS, on_step=lambda step: None, **options):
    module = make_module() if module is None else module
    history = train_module(
        module, fit_lines(module, on_step), settings, path, facts=facts, **options
    )
    return module, history


def assert_same(module, other):
    for value, wanted in zip(module.state_dict().values(), other.state_dict().values(),
                             strict=True):  # fmt: skip
        torch.testing.assert_close(value, wanted, rtol=0, atol=0)


def test_the_loss_falls_and_the_history_tells_how(tmp_path):
    _, history = train(tmp_path / "a.safetensors", replace(SETTINGS, num_steps=100))

    assert [row["step"] for row in history] == [*range(6, 100, 6), 100]
    assert history[-1]["loss"] < history[0]["loss"] / 10
    assert history[1]["step_twice"] == 2 * (6 + 7 + 8 + 9 + 10 + 11) / 6


@pytest.mark.parametrize("stop", [6, 12, 20])
def test_a_run_in_two_parts_gives_the_same_bits(tmp_path, stop):
    whole, history = train(tmp_path / "whole.safetensors")

    train(tmp_path / "parts.safetensors", replace(SETTINGS, num_steps=stop))
    parts, resumed = train(tmp_path / "parts.safetensors")

    assert_same(parts, whole)
    assert [(row["step"], row["loss"]) for row in resumed] == [
        (row["step"], row["loss"]) for row in history
    ]


class Stop(Exception):
    pass


def test_a_run_broken_off_between_saves_repeats_the_steps_since(tmp_path):
    path = tmp_path / "a.safetensors"
    whole, _ = train(tmp_path / "whole.safetensors")
    steps = []

    def on_step(step):
        steps.append(step)
        if len(steps) == 11:
            raise Stop

    with pytest.raises(Stop):
        train(path, on_step=on_step)
    again, _ = train(path, on_step=on_step)

    assert steps == [*range(11), *range(6, 20)]
    assert_same(again, whole)


def steps_done(path):
    _, metadata = load_safetensors(path, "test", "checkpoint", FORMAT)
    return int(json.loads(metadata["history"])[-1]["step"])


def test_a_process_killed_twice_leaves_a_file_that_resumes_to_the_same_bits(tmp_path):
    path = tmp_path / "killed.safetensors"
    code = f"""
import sys, dataclasses, pathlib
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_training as t
t.train(pathlib.Path({str(path)!r}), dataclasses.replace(t.SETTINGS, num_steps=10**6, save_every=2))
"""
    done = 0
    for steps in (2, 25):
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        try:
            while not path.exists() or steps_done(path) < done + steps:
                assert process.poll() is None
                time.sleep(0.003)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        done = steps_done(path)

    settings = replace(SETTINGS, num_steps=done + 5)
    resumed, _ = train(path, settings)
    whole, _ = train(tmp_path / "whole.safetensors", replace(settings, save_every=10**6))

    assert_same(resumed, whole)


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "a"
    replace_file(path, b"old")

    def stop(*_):
        raise Stop

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(Stop):
        replace_file(path, b"new")

    assert path.read_bytes() == b"old"


def test_what_is_not_trained_is_kept_too(tmp_path):
    path = tmp_path / "a.safetensors"

    def run(num_steps):
        module = nn.ModuleDict({"model": make_module(), "average": make_module()})
        module["average"].requires_grad_(False)

        @torch.no_grad()
        def average(step):
            for kept, new in zip(module["average"].parameters(), module["model"].parameters(),
                                 strict=True):  # fmt: skip
                kept.lerp_(new, 0.1)

        train_module(
            module, fit_lines(module["model"]), replace(SETTINGS, num_steps=num_steps), path,
            facts=FACTS, after_step=average,
        )  # fmt: skip
        return module

    run(9)
    parts = run(20)
    path.unlink()
    whole = run(20)

    assert_same(parts, whole)
    assert not torch.equal(whole["average"].weight, whole["model"].weight)


def test_the_rate_is_scaled_step_by_step(tmp_path):
    still, _ = train(tmp_path / "a.safetensors", rate_factor=lambda step: 0.0)
    one, _ = train(tmp_path / "b.safetensors", rate_factor=lambda step: float(step == 3))

    assert_same(still, make_module())
    assert not torch.equal(one.weight, still.weight)


def test_long_gradients_are_shortened(tmp_path):
    module = make_module()
    norms = []

    def after_step(step):
        norms.append(torch.cat([p.grad.flatten() for p in module.parameters()]).norm().item())

    train(
        tmp_path / "a.safetensors", replace(SETTINGS, max_grad_norm=0.01), module,
        after_step=after_step,
    )  # fmt: skip

    assert max(norms) <= 0.01 * 1.001


@pytest.mark.parametrize(
    ("breaks", "sentence"),
    [
        (lambda loss: loss * torch.nan, "must be finite, got nan and nan in step 15"),
        (lambda loss: loss * torch.inf, "must be finite, got inf and nan in step 15"),
        (lambda loss: loss + (loss * 0).sqrt(), r"must be finite, got 0\.\d+ and nan in step 15"),
    ],
    ids=["nan", "infinite", "gradient"],
)
def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(tmp_path, breaks, sentence):
    path = tmp_path / "a.safetensors"
    module = make_module()
    good = fit_lines(module)

    def compute_loss(step, generator):
        loss, figures = good(step, generator)
        return (breaks(loss) if step == 14 else loss), figures

    with pytest.raises(DivergedError, match=sentence) as raised:
        train_module(module, compute_loss, SETTINGS, path, facts=FACTS)

    assert str(raised.value).endswith(f"the last good checkpoint is {path}, of step 12")
    assert steps_done(path) == 12


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    path = tmp_path / "a.safetensors"
    module = make_module()

    def after_step(step):
        if step == 11:
            nn.init.constant_(module.bias, torch.inf)

    with pytest.raises(
        DivergedError, match=r"parameters must be finite, .* in step 12; "
    ) as raised:
        train(path, module=module, after_step=after_step)

    assert str(raised.value).endswith(f"the last good checkpoint is {path}, of step 6")
    assert steps_done(path) == 6


def test_a_loss_that_is_never_finite_leaves_no_checkpoint(tmp_path):
    module = make_module()

    with pytest.raises(DivergedError, match="in step 1; the last good checkpoint is none"):
        train_module(
            module, lambda step, generator: (module.weight.sum() * torch.nan, {}), SETTINGS,
            tmp_path / "a.safetensors", facts=FACTS,
        )  # fmt: skip

    assert list(tmp_path.iterdir()) == []


def spoil_by_truncation(path):
    path.write_bytes(path.read_bytes()[:-100])


def spoil_with_pickle(path):
    torch.save({"weight": torch.zeros(2)}, path)


def spoil_with_foreign_tensors(path):
    save_file({"weight": torch.zeros(2)}, path)


def rewrite(change):
    def spoil(path):
        tensors, metadata = load_safetensors(path, "test", "checkpoint", FORMAT)
        change(tensors, metadata)
        save_file(tensors, path, metadata)

    return spoil


def spoil_by_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (spoil_by_truncation, "checkpoint must be a whole safetensors file, got"),
        (spoil_with_pickle, "checkpoint must be a whole safetensors file, got"),
        (spoil_with_foreign_tensors, "checkpoint must be a tokencache_kernels training checkpoint"),
        (spoil_by_folder, "checkpoint must be a whole safetensors file, got"),
        (rewrite(lambda tensors, _: tensors.pop("generator")), "checkpoint must hold a whole run"),
        (rewrite(lambda _, metadata: metadata.pop("facts")), "checkpoint must hold a whole run"),
        (
            rewrite(lambda _, metadata: metadata.update(history="[]")),
            "checkpoint must hold a whole run",
        ),
        (
            rewrite(lambda tensors, _: tensors.update({"optimizer/0/exp_avg": torch.zeros(2)})),
            "checkpoint must hold the optimizer's state of the module",
        ),
    ],
)
def test_a_checkpoint_that_is_none_is_refused_and_left_alone(tmp_path, spoil, sentence):
    path = tmp_path / "a.safetensors"
    train(path)
    spoil(path)
    before = path.read_bytes() if path.is_file() else None

    with pytest.raises(ValueError, match=sentence) as raised:
        train(path)

    assert "\n" not in str(raised.value)
    assert (path.read_bytes() if path.is_file() else None) == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"facts": {"task": "circles"}}, "of a run with task circles, got .* with task lines"),
        ({"facts": {"task": "lines", "size": "3"}}, "of a run with size 3, got .* without size"),
        ({"settings": replace(SETTINGS, seed=1)}, "of a run with seed 1, got .* with seed 0"),
        ({"settings": replace(SETTINGS, learning_rate=1.0)}, "learning_rate 1.0, got .* 0.05"),
        ({"settings": replace(SETTINGS, num_steps=19)}, "num_steps must be at least 20, as in"),
        ({"module": nn.Linear(3, 4)}, "checkpoint must hold the tensors of the module"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, sentence):
    path = tmp_path / "a.safetensors"
    train(path)
    before = path.read_bytes()

    with pytest.raises(ValueError, match=sentence):
        train(path, **change)

    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"save_every": 0}, "save_every must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive and finite, got nan"),
        ({"learning_rate": float("inf")}, "learning_rate must be positive and finite, got inf"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be positive, got -1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(SETTINGS, **change)
