"""Masks and step types of Learning-to-Cache, its files, and published checkpoints."""

import argparse
import re
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

from tokencache_kernels import models
from tokencache_kernels.policies import Action, Site, Step, make_plan, published_shape
from tokencache_kernels.policies.learning_to_cache import (
    ROUTER_PRESETS,
    CacheRouter,
    LearningToCacheConfig,
    RouterPreset,
    import_router,
    load_router,
    save_router,
)

pytest.importorskip("safetensors")

# counts of the published routers: computed attentions and MLPs, of how many each
PUBLISHED = [
    pytest.param("dit-xl-ddim50", 371, 365, 700, 47.43, id="dit-xl-ddim50"),
    pytest.param("dit-xl-ddim20", 157, 155, 280, 44.29, id="dit-xl-ddim20"),
    pytest.param("uvit-h-dpm50", 47, 41, 696, 93.68, id="uvit-h-dpm50"),
    pytest.param("uvit-h-dpm20", 103, 86, 261, 63.79, id="uvit-h-dpm20"),
]


def make_config(num_steps=6, num_layers=3, seed=0, **options):
    logits = CacheRouter(num_layers, num_steps, seed).stack()
    return LearningToCacheConfig(logits, **{"threshold": 0.5, **options})


def actions(config, index, num_tokens=16):
    """List the work of every sub-layer in a step, in the order in which they run."""
    step = Step(index, config.num_inference_steps)
    return [
        config.decide(Site("main", layer, module), step, num_tokens).action
        for layer in range(config.num_layers)
        for module in ("attn", "mlp")
    ]


def make_published(preset, num_attention, num_mlp):
    """Logits (T, 2L) with as many computed entries in the steps that count; others at random."""
    preset = ROUTER_PRESETS[preset]
    T, L, generator = preset.num_inference_steps, preset.num_layers, torch.Generator()
    logits = torch.randn(T, 2 * L, generator=generator.manual_seed(0))
    # DiT: the even counters, down to 0; U-ViT: the first evaluations but the very first
    rows = list(range(0, T, 2)) if preset.counts_down else list(range(2, T, 2))
    above, below = (torch.logit(torch.tensor(preset.threshold + d)) for d in (0.01, -0.01))
    for first, count in ((0, num_attention), (1, num_mlp)):
        chosen = torch.randperm(len(rows) * L, generator=generator) < count
        logits[rows, first::2] = torch.where(chosen, above, below).view(len(rows), L)
    return logits, rows


@pytest.mark.parametrize(("preset", "num_attention", "num_mlp", "total", "skipped"), PUBLISHED)
def test_a_published_router_skips_what_was_counted_in_it(
    tmp_path, preset, num_attention, num_mlp, total, skipped
):
    logits, rows = make_published(preset, num_attention, num_mlp)
    state = OrderedDict((f"routers.{i}.prob", row.clone()) for i, row in enumerate(logits))
    torch.save({"routers": state, "args": argparse.Namespace(l1=1e-6)}, tmp_path / "a.pt")

    config = import_router(tmp_path / "a.pt", preset)

    assert len(rows) * config.num_layers == total
    assert (config.count_computed("attn"), config.count_computed("mlp")) == (num_attention, num_mlp)
    assert round(100 * config.skipped_share, 2) == skipped
    seen = [Action.FULL if on else Action.REUSE for row in rows for on in config.mask[row]]
    counters = [
        Step(i, config.num_inference_steps).counter(config.counts_down)
        for i in range(config.num_inference_steps)
    ]
    assert seen == [one for row in rows for one in actions(config, counters.index(row))]
    for index, counter in enumerate(counters):
        if counter not in rows:
            assert set(actions(config, index)) == {Action.FULL}


@pytest.mark.parametrize(("preset", "ratio"), [("dit-xl-ddim50", 1.312), ("dit-xl-ddim20", 1.285)])
def test_the_published_routers_save_the_published_arithmetic(tmp_path, preset, ratio):
    counts = {p.values[0]: p.values[1:3] for p in PUBLISHED}[preset]
    logits, _ = make_published(preset, *counts)
    torch.save(logits, tmp_path / "a.pt")

    plan = make_plan(
        import_router(tmp_path / "a.pt", preset), published_shape(models.PUBLISHED["dit-xl"])
    )

    assert abs(plan.flops_ratio - ratio) < 0.003


def test_dit_is_full_in_odd_steps_counting_down_and_in_the_first():
    even, odd = make_config(6), make_config(5)

    is_full = lambda config: [  # noqa: E731
        config.is_full(Step(i, config.num_inference_steps))
        for i in range(config.num_inference_steps)
    ]
    assert is_full(even) == [True, False, True, False, True, False]
    assert is_full(odd) == [True, True, False, True, False]


def test_uvit_is_full_in_the_second_evaluation_of_an_outer_step():
    config = make_config(8, counts_down=False)

    full = [config.is_full(Step(index, 8)) for index in range(8)]

    # outer steps:  first              second             ...
    assert full == [True, True] + [False, True] * 3
    assert config.cached_counters == [2, 4, 6]


def test_an_entry_decides_for_its_own_sublayer():
    logits = torch.full((4, 6), -5.0)
    logits[2, 3] = 5.0  # block 1, MLP
    logits[0, 4] = 5.0  # block 2, attention
    config = LearningToCacheConfig(logits)
    full, reuse = Action.FULL, Action.REUSE

    assert actions(config, 1) == [reuse, reuse, reuse, full, reuse, reuse]
    assert actions(config, 3) == [reuse, reuse, reuse, reuse, full, reuse]
    assert config.decide(Site("main", 1, "mlp"), Step(1, 4), 16).num_fresh == 16
    assert config.decide(Site("main", 0, "mlp"), Step(1, 4), 16).num_fresh == 0


def test_the_weight_must_exceed_the_threshold():
    config = LearningToCacheConfig(torch.zeros(2, 2), threshold=0.5)

    assert config.mask == ((False, False), (False, False))
    assert replace(config, threshold=0.499).mask == ((True, True), (True, True))


def test_a_higher_threshold_skips_more():
    shares = [
        make_config(20, 8, threshold=threshold).skipped_share for threshold in (0.1, 0.5, 0.9)
    ]

    assert shares == sorted(shares)
    assert shares[0] < shares[2]


def test_configs_of_other_logits_can_be_told_apart():
    assert make_config(seed=0) == make_config(seed=0)
    assert repr(make_config(seed=0)) != repr(make_config(seed=1))
    assert make_config(seed=0) != make_config(seed=1)


def test_a_saved_router_is_loaded_as_it_was(tmp_path):
    config = make_config(8, threshold=0.3, counts_down=False, model="tiny", name="mine")

    save_router(config, tmp_path / "sub" / "a.safetensors")
    loaded = load_router(tmp_path / "sub" / "a.safetensors", num_layers=3, num_inference_steps=8)

    assert loaded == config
    torch.testing.assert_close(loaded.logits, config.logits, rtol=0, atol=0)


def as_list(logits, rows):
    return [row.clone() for row in logits]


def as_parameters(logits, rows):
    return nn.ParameterList(row.clone() for row in logits).state_dict()


def as_columns(logits, rows):
    return {"state_dict": {f"module.{i}.weight": row[:, None] for i, row in enumerate(logits)}}


def out_of_order(logits, rows):
    return {f"router{i}": logits[i].clone() for i in reversed(range(len(logits)))}


def only_the_used(logits, rows):
    return {str(i): logits[i].clone() for i in rows}


def only_the_used_as_table(logits, rows):
    return logits[rows]


def beside_an_optimizer(logits, rows):
    state = {i: {"exp_avg": torch.zeros_like(row)} for i, row in enumerate(logits)}
    return {"model": {"prob": logits}, "opt": {"state": state}, "step": torch.tensor(3.0)}


def in_half(logits, rows):
    return logits.half()


def transposed(logits, rows):
    return logits.t().contiguous().t()


def beside_a_list_of_itself(logits, rows):
    content = [logits]
    content.append(content)
    return content


def beside_what_is_not_stored(logits, rows):
    return {"a": logits, "b": logits.to_sparse(), "c": logits.to("meta")}


@pytest.mark.parametrize(
    "layout",
    [
        as_list, as_parameters, as_columns, out_of_order, only_the_used, only_the_used_as_table,
        beside_an_optimizer, in_half, transposed, beside_a_list_of_itself,
        beside_what_is_not_stored,
    ],
)  # fmt: skip
@pytest.mark.parametrize("counts_down", [True, False])
def test_routers_are_found_in_any_layout(tmp_path, layout, counts_down):
    preset = RouterPreset(24, 2, 0.3, counts_down)
    logits = CacheRouter(2, 24, seed=3).stack()
    wanted = LearningToCacheConfig(logits, 0.3, counts_down)
    torch.save(layout(logits, wanted.cached_counters), tmp_path / "a.pt")

    config = import_router(str(tmp_path / "a.pt"), preset)
    save_router(config, tmp_path / "a.safetensors")

    assert load_router(tmp_path / "a.safetensors") == config
    for counter in wanted.cached_counters:
        assert config.mask[counter] == wanted.mask[counter]


class Bomb:
    """A pickle that would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_checkpoint_is_not_executed(tmp_path):
    torch.save({"router": Bomb(tmp_path / "boom")}, tmp_path / "a.pt")

    with pytest.raises(ValueError, match=r"a whole checkpoint of tensors, got .*something else\)$"):
        import_router(tmp_path / "a.pt", "dit-xl-ddim50")

    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (torch.zeros(50, 48), "with 0 (tables: (50, 48))"),
        (torch.zeros(20, 56), "with 0 (tables: (20, 56))"),
        ({"a": torch.zeros(50, 56), "b": torch.zeros(50, 56)}, "with 2 (tables: (50, 56), (50, 5"),
        ({"weight": torch.zeros(3)}, "with 0 (tables: none)"),
        ([], "with 0 (tables: none)"),
    ],
    ids=["depth", "steps", "two", "foreign", "empty"],
)
def test_a_checkpoint_without_one_router_of_the_size_is_refused(tmp_path, content, got):
    torch.save(content, tmp_path / "a.pt")

    with pytest.raises(ValueError, match=re.escape(got)) as raised:
        import_router(tmp_path / "a.pt", "dit-xl-ddim50")

    assert "path must hold one router of 50 steps and 56 sub-layers, got" in str(raised.value)


@pytest.mark.parametrize("num_bytes", [0, 1, 100, -20])
def test_a_truncated_checkpoint_is_refused(tmp_path, num_bytes):
    torch.save(torch.randn(50, 56), tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:num_bytes])

    with pytest.raises(ValueError, match="path must be a whole checkpoint of tensors") as raised:
        import_router(tmp_path / "a.pt", "dit-xl-ddim50")

    assert "\n" not in str(raised.value)


def test_a_preset_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"preset must be one of dit-xl-ddim50, .* got 'dit-s'"):
        import_router(tmp_path / "a.pt", "dit-s")


@pytest.mark.parametrize("read", [load_router, lambda path: import_router(path, "dit-xl-ddim50")])
def test_a_file_that_is_not_there_is_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"path must be a file, got .*a\.safetensors"):
        read(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"num_layers": 4}, r"hold a router with num_layers = 4, got .*a\.safetensors with 3"),
        ({"num_inference_steps": 7}, "with num_inference_steps = 7, got .* with 6"),
    ],
    ids=["depth", "steps"],
)
def test_a_router_for_another_model_or_sampler_is_refused(tmp_path, wanted, sentence):
    save_router(make_config(), tmp_path / "a.safetensors")

    with pytest.raises(ValueError, match=sentence):
        load_router(tmp_path / "a.safetensors", **wanted)


def test_a_truncated_or_foreign_router_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_router(make_config(), path)
    whole = path.read_bytes()

    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="path must be a whole safetensors file"):
        load_router(path)
    torch.save(make_config().logits, path)
    with pytest.raises(ValueError, match="path must be a whole safetensors file"):
        load_router(path)
    path.write_bytes(whole.replace(b"router 1", b"router 2"))
    with pytest.raises(ValueError, match="path must be a tokencache_kernels router 1, got"):
        load_router(path)
    path.write_bytes(whole.replace(b'num_layers\\": 3', b'num_layers\\": 4'))
    with pytest.raises(ValueError, match="path must hold the router that its metadata describes"):
        load_router(path)


@pytest.mark.parametrize(
    ("logits", "threshold", "sentence"),
    [
        (torch.zeros(4), 0.1, r"logits must have shape \(T, 2L\), got \(4,\)"),
        (torch.zeros(4, 3), 0.1, r"logits must have shape \(T, 2L\), got \(4, 3\)"),
        (torch.full((4, 2), torch.nan), 0.1, "logits must be finite, got some that are not"),
        (torch.zeros(4, 2), 1.0, r"threshold must be in \(0, 1\), got 1.0"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(logits, threshold, sentence):
    with pytest.raises(ValueError, match=sentence):
        LearningToCacheConfig(logits, threshold)


@pytest.mark.parametrize(
    ("site", "step", "sentence"),
    [
        (Site("main", 3, "mlp"), Step(0, 6), "be for a model with a block 3, got some for 3 bl"),
        (Site("main", 0, "mlp"), Step(0, 7), "logits must be for 7 steps, got one for 6"),
        (Site("main", 0, "cross"), Step(0, 6), "site must be the attention or MLP of a model wit"),
        (Site("single", 0, "mlp"), Step(0, 6), "site must be the attention or MLP of a model wit"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(site, step, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_config().decide(site, step, 16)


def test_only_the_step_that_is_used_moves():
    router = CacheRouter(num_layers=2, num_steps=4)
    before = router.stack()
    optimizer = torch.optim.AdamW(router.parameters(), lr=0.1, weight_decay=0.0)
    for counter in (2, 0, 2):
        optimizer.zero_grad()
        router(counter).sum().backward()
        optimizer.step()

    moved = (router.stack() != before).all(dim=1)
    assert moved.tolist() == [True, False, True, False]
    # two steps of Adam against one
    assert (before - router.stack())[2].mean() > 1.5 * (before - router.stack())[0].mean()


def test_logits_are_kept_within_five():
    router = CacheRouter(num_layers=2, num_steps=1)
    with torch.no_grad():
        router.logits[0].copy_(torch.tensor([-9.0, -1.0, 1.0, 9.0]))

    router.clamp_()

    assert router.stack().tolist() == [[-5.0, -1.0, 1.0, 5.0]]
