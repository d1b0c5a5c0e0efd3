import pytest
import torch

from tokencache_kernels.demo.methods import applied, parse_method, parse_those_trained
from tokencache_kernels.demo.model import SHAPE, load_model
from tokencache_kernels.demo.sampling import sample
from tokencache_kernels.models import PUBLISHED
from tokencache_kernels.policies import Action, Site, Step, published_shape

DEMO = published_shape(PUBLISHED["demo"])


@pytest.mark.parametrize(
    "name", ["", "tocca-3", "toca", "toca-0", "toca-3-101", "fewer-0", "dense-3", "taylor3-3"]
)
def test_an_unknown_name_is_answered_with_the_known(name):
    with pytest.raises(ValueError, match=r"must be dense, fewer-<steps>, .*toca-<interval>.*, got"):
        parse_method(name, 50)


def test_a_number_behind_a_family_is_the_order_of_its_forecast():
    methods = [parse_method(name, 50) for name in ("toca-3-20", "toca1-3-20", "taylor2-4")]

    assert [method.policy.carrier.order for method in methods] == [0, 1, 2]
    assert [method.family for method in methods] == ["toca", "toca1", "taylor2"]
    assert methods[0].flops_ratio == methods[1].flops_ratio


def test_a_ratio_of_fewer_steps_is_that_of_the_steps():
    assert parse_method("dense", 50).flops_ratio == 1
    assert parse_method("fewer-20", 50).flops_ratio == 2.5


def test_fresh_tokens_cost_flops_and_a_longer_interval_saves_them():
    ratios = [
        parse_method(name, 50).flops_ratio for name in ("toca-3-20", "toca-3", "toca-5", "dense")
    ]

    assert ratios[0] < ratios[1] < ratios[2]
    assert parse_method("random-3", 50).flops_ratio == ratios[1]
    # FORA computes the first of every three steps, 17 of 50, and nothing else
    assert parse_method("fora-3", 50).flops_ratio == pytest.approx(50 / 17)


@pytest.mark.parametrize("percent", [0, 30, 57, 100])
def test_a_uniform_router_skips_its_share_of_all_sub_layers_in_turn(percent):
    policy = parse_method(f"uniform-{percent}", 50).policy

    assert policy.skipped_share == pytest.approx(percent / 100, abs=0.01)
    skipped = [
        sum(not policy.mask[counter][entry] for counter in policy.cached_counters)
        for entry in range(12)
    ]
    assert max(skipped) - min(skipped) <= 1


def test_the_shipped_router_and_its_thresholds_cost_what_they_compute():
    ratios = [parse_method(name, 50).flops_ratio for name in ("dense", "l2c", "l2c-90")]

    assert 1 == ratios[0] < ratios[1] < ratios[2] < 2


def test_what_is_trained_for_other_steps_is_refused_or_left_out(capsys):
    with pytest.raises(ValueError, match="num_inference_steps = 20"):
        parse_method("l2c", 20)

    methods = parse_those_trained(["dense", "l2c", "fora-3"], 20)

    assert [method.name for method in methods] == ["dense", "fora-3"]
    assert capsys.readouterr().out.startswith("Without l2c: load_router: path must hold a router")


def test_the_shape_that_flops_are_counted_for_is_the_models():
    stack = DEMO.stacks[0]

    assert stack.num_layers == SHAPE["num_layers"]
    assert DEMO.hidden == SHAPE["num_attention_heads"] * SHAPE["attention_head_dim"]
    assert stack.modules[0].num_tokens == (SHAPE["sample_size"] // SHAPE["patch_size"]) ** 2


def test_a_method_applies_inside_its_block_only(weights):
    model = load_model(weights)
    dense = sample(model, [1], [0], steps=4)

    with applied(model, parse_method("fora-4", 4)):
        cached = sample(model, [1], [0], steps=4)
    after = sample(model, [1], [0], steps=4)

    assert not cached.equal(dense)
    assert after.equal(dense)


def test_an_interval_of_one_is_dense(weights):
    model = load_model(weights)

    with applied(model, parse_method("fora-1", 3)):
        cached = sample(model, [1], [0], steps=3)

    assert cached.equal(sample(model, [1], [0], steps=3))


@pytest.mark.parametrize("name", ["even1-17", "even2-12", "carried2-12", "carried0-5"])
def test_even_steps_end_in_a_full_one_and_cost_their_number(name):
    policy = parse_method(name, 50).policy

    full = [
        index
        for index in range(50)
        if policy.decide(Site("main", 0, "mlp"), Step(index, 50), 256).action is Action.FULL
    ]
    assert (full[0], full[-1], len(full)) == (0, 49, int(name.split("-")[1]))
    assert parse_method(name, 50).flops_ratio == pytest.approx(50 / len(full))


def test_the_router_ends_in_a_full_step_by_name():
    last = Step(49, 50)

    actions = [
        {
            parse_method(name, 50).policy.decide(Site("main", layer, module), last, 256).action
            for layer in range(6)
            for module in ("attn", "mlp")
        }
        for name in ("l2c", "l2c-last")
    ]

    assert actions[0] != actions[1] == {Action.FULL}


@pytest.mark.parametrize("name", ["jit", "hsa"])
def test_methods_of_the_samplers_level_are_policies_like_others(name):
    method = parse_method(name, 12)

    assert method.policy.num_inference_steps == 12
    assert method.flops_ratio == method.policy.flops_ratio > 1
    model = load_model()
    with applied(model, method):
        assert "forward" in vars(model)
    assert "forward" not in vars(model)


def test_the_trained_policies_forecast_by_name_and_reuse_by_default():
    methods = [parse_method(name, 50) for name in ("tokencache", "l2c", "tokencache1", "l2c2")]

    assert [method.policy.carrier.order for method in methods] == [0, 0, 1, 2]
    assert methods[3].flops_ratio == methods[1].flops_ratio


def test_a_method_that_carries_the_output_is_applied_and_taken_off_again():
    model = load_model()
    dense = sample(model, [3], [0], steps=4)
    calls = []
    hook = model.transformer_blocks[0].register_forward_hook(lambda *_: calls.append(1))

    with applied(model, parse_method("carried1-3", 4)):
        carried = sample(model, [3], [0], steps=4)

    hook.remove()
    assert len(calls) == 3
    assert not torch.equal(carried, dense)
    assert torch.equal(sample(model, [3], [0], steps=4), dense)
