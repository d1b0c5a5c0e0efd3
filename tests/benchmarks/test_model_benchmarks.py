"""The stage ``models``, rehearsed; and the published way, which must do the same work as ours."""

import sys
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks import models, stages, subjects
from benchmarks.published_models import apply_published
from tokencache_kernels.integrations.diffusers import (
    apply,
    apply_token_cache,
    count_graph_steps,
    reset_token_cache,
)
from tokencache_kernels.models import PUBLISHED
from tokencache_kernels.policies import ToCaConfig, make_plan, published_shape
from tokencache_kernels.testing import Tape

CPU = torch.device("cpu")
# full-size, but without any memory
NOWHERE = torch.device("meta")


@pytest.fixture
def case():
    """A tiny DiT under every policy."""
    return models.Case("dit-xl-256px", 2, "policies", CPU, rehearse=True)


def test_a_rehearsal_records_runs_and_steps(rehearse):
    records = rehearse("models", "dit-xl-256px-2/bfloat16/toca")
    found = {(r["policy"], r["backend"], r["modulation"]) for r in records}
    assert found == {
        ("dense", "torch", "per-step"),
        ("toca", "auto", "per-step"),
        ("toca", "auto", "precomputed"),
        ("toca", "published", "per-step"),
    }
    # graphs where there is a GPU
    ours = {"backend": "auto", "modulation": "per-step", "mode": records[0]["mode"]}.items()
    ours = [record for record in records if ours <= record.items()]
    by_kind = {r["what"]: r for r in ours}
    assert by_kind.keys() == {
        "first_run", "run", "run_with_scheduler", "full_step", "partial_step", "reuse_step"
    }  # fmt: skip
    run = by_kind["run"]
    assert len(run["steps_ms"]) == len(run["steps_flops"]) == run["steps"]
    assert run["flops"] == sum(run["steps_flops"])
    assert sum(run["steps_ms"]) == pytest.approx(run["median_ms"], rel=0.5)
    places = [place for r in ours for place in r.get("places", ())]
    assert sorted(places) == list(range(run["steps"]))


# diffusers' scheduler of PixArt, and NumPy 2
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "batch", "preset"),
    [
        ("make_dit", 4, "dit-xl-ddim50"),
        ("make_pixart", 4, "pixart-alpha"),
        ("make_flux", 1, "flux-1-dev"),
    ],
)
def test_the_published_way_computes_what_ours_does(make, batch, preset, monkeypatch):
    monkeypatch.setattr(subjects, "DTYPE", torch.float32)
    subject = getattr(subjects, make)(batch, CPU, is_tiny=True)
    # of DiT, the step 3 is full in the first block alone
    policy = ToCaConfig.preset(preset, num_inference_steps=8, fresh_ratio=0.3, mixed_steps=True)
    ours, published = subject.copy_transformer(), subject.copy_transformer()
    apply_token_cache(ours, policy)
    apply_published(published, policy)
    dense = subject.bind(subject.transformer)

    partial = [not step.is_full for step in make_plan(policy, subject.shape).steps]
    differs = []
    latents = subject.latents
    for index, timestep in enumerate(subject.begin_run(8)):
        wanted = subject.bind(published)(latents, timestep)
        torch.testing.assert_close(
            subject.bind(ours)(latents, timestep), wanted, rtol=1e-4, atol=1e-4
        )
        differs.append(not torch.allclose(dense(latents, timestep), wanted, rtol=1e-3, atol=1e-4))
        latents = subject.advance(wanted, index, latents)

    assert differs == partial


@pytest.mark.parametrize(
    ("make", "name", "parameters"),
    # the last is a paper's count; diffusers embeds the timestep in every block of a DiT anew
    [
        ("make_dit", "dit-xl", 0.75e9),
        ("make_pixart", "pixart-alpha", 0.61e9),
        ("make_flux", "flux-1-dev", 11.9e9),
    ],
)
def test_the_models_are_of_full_size(make, name, parameters):
    subject = getattr(subjects, make)(2, NOWHERE, is_tiny=False)

    weights = list(subject.transformer.parameters())
    assert sum(weight.numel() for weight in weights) == pytest.approx(parameters, rel=0.01)
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in weights)
    assert subject.shape == published_shape(PUBLISHED[name], batch=2)
    assert subject.published_shape == published_shape(PUBLISHED[name], batch=2, as_published=True)


def test_copies_share_weights_but_not_hooks(case):
    subject = case.make_subject()

    first, second = subject.copy_transformer(), subject.copy_transformer()
    apply_token_cache(first, case.make_policy("toca", subject))

    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert one is other
    apply_token_cache(second, case.make_policy("toca", subject))
    assert not any(hasattr(module, "_diffusers_hook") for module in subject.transformer.modules())


def test_a_captured_call_is_replayed_on_other_inputs(case, monkeypatch):
    # no graph on a CPU: the run in place of a replay
    monkeypatch.setattr(models, "capture", lambda run: run)
    subject = case.make_subject()
    call = subject.bind(subject.transformer)
    early, late = subject.begin_run(2)

    captured = models.capture_call(call, subject.latents, early)

    for latents, timestep in ((2 * subject.latents, late), (subject.latents, early)):
        torch.testing.assert_close(
            captured(latents, timestep), call(latents, timestep), rtol=0, atol=0
        )


@pytest.mark.parametrize("modulation", ["per-step", "precomputed"])
@pytest.mark.parametrize("policy", ["toca", "duca", "l2c", "tokencache"])
def test_cached_steps_are_timed_as_replayed_graphs(case, monkeypatch, policy, modulation):
    # a tape stands for CUDA
    monkeypatch.setattr(apply, "CudaCapture", Tape)
    subject = case.make_subject()
    contender = models.Contender(policy, "auto", "graph", modulation)

    with torch.no_grad():
        call, _ = models.prepare_call(contender, case, subject)
        before = count_graph_steps(call.transformer)
        for step in models.list_steps(call, subject, case.model.num_steps):
            step()

    after = count_graph_steps(call.transformer)
    assert after == replace(before, replayed=before.replayed + case.model.num_steps)


def test_graphs_that_are_not_replayed_are_not_timed(case, monkeypatch):
    monkeypatch.setattr(apply, "CudaCapture", Tape)
    monkeypatch.setattr(models, "list_calls", forget_and_list_calls(models.list_calls))
    contender = models.Contender("toca", "auto", "graph")

    with torch.no_grad(), pytest.raises(ValueError, match="all steps of a run must be replayed"):
        models.prepare_call(contender, case, case.make_subject())


def forget_and_list_calls(list_calls):
    def forget_first(call, *arguments):
        reset_token_cache(call.transformer, release_memory=True)
        return list_calls(call, *arguments)

    return forget_first


def test_a_contender_that_gives_something_else_is_not_timed(case, monkeypatch):
    subject = case.make_subject()
    contender = replace(case.contenders[0], mode="graph")
    monkeypatch.setattr(models, "capture_call", lambda call, *_: lambda *given: 1.1 * call(*given))

    with pytest.raises(ValueError, match=r"the result is off by 0\.1"):
        models.prepare_call(contender, case, subject)


def test_every_policy_is_timed_by_its_plan(case):
    subject = case.make_subject()
    num_steps = case.model.num_steps
    kinds = {}
    for contender in case.contenders:
        records = models.make_records(
            case, contender, subject, runs=2 * [num_steps * [0.5]], pipelines=[]
        )
        run, *steps = records
        kinds[contender.policy] = {record["what"] for record in steps}

        assert run["median_ms"] == pytest.approx(num_steps * 500)
        mean = sum(len(step["places"]) * step["flops"] for step in steps) / num_steps
        assert mean * num_steps == pytest.approx(run["flops"])

    assert kinds["dense"] == {"dense_step"}
    assert kinds["toca-unmixed"] == {"full_step", "partial_step", "reuse_step"}
    assert kinds["fora"] == {"full_step", "reuse_step"}
    assert kinds["duca"] >= {"full_step", "partial_step", "skipped_step"}
    assert kinds["l2c"] == kinds["tokencache"] == {"full_step", "partial_step"}


def test_the_router_skips_half_early_more_than_late():
    router = models.make_router(50, 28)

    assert router.skipped_share == pytest.approx(0.5, abs=0.03)
    early, late = (sum(router.mask[counter]) for counter in (46, 2))
    assert early < 0.2 * 56 < 0.8 * 56 < late


def test_a_case_that_time_is_too_short_for_is_left_for_another_call(case, monkeypatch):
    monkeypatch.setattr(stages.time, "monotonic", lambda: 100.0)
    case = replace(case, rehearse=False)

    def take(seconds, records):
        journal = Namespace(facts={"session": "this"}, records=records)
        return list(stages.in_time(lambda case: ["timed"], journal, 100.0 + seconds)(case))

    begun = [{"session": "this", "backend": "torch"}]
    assert take(case.seconds + 1, begun) == ["timed"]
    assert take(case.seconds - 1, begun) == []
    # the first of a call is begun in any case, or none would ever be
    assert take(case.seconds - 1, [{**begun[0], "session": "another"}]) == ["timed"]
    assert take(case.seconds - 1, [{"session": "this", "case": "ceilings"}]) == ["timed"]


def test_what_has_failed_is_not_tried_again(case):
    first, second = case.contenders[:2]
    records = [{**case.key, **first.fields, "error": "the process ended with SIGSEGV"}]
    records.append({**case.key, **second.fields, "median_ms": 1.0})

    assert models.has_failed_before(first, records)
    assert not models.has_failed_before(second, records)


def test_the_stage_says_what_it_lacks(case, capsys, monkeypatch, tmp_path):
    options = Namespace(device=CPU, rehearse=False, out=tmp_path)
    assert models.run_stage(options, 0.0) == 1
    assert "the device must be cuda" in capsys.readouterr().out

    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "benchmarks.subjects")
    assert models.run_stage(options, 0.0) == 1
    assert "diffusers must be installed" in capsys.readouterr().out
