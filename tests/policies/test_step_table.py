import json

import pytest

from tokencache_kernels.models import PUBLISHED
from tokencache_kernels.policies import (
    Action,
    LearningToCacheConfig,
    Newton,
    Site,
    Step,
    StepTable,
    Taylor,
    load_policy,
    load_table,
    make_plan,
    published_shape,
    save_router,
    save_table,
)

DEMO = published_shape(PUBLISHED["demo"])

SITE = Site("main", 0, "mlp")


def make_table(**changes):
    table = StepTable.from_carrier((0, 2, 5), Newton(1), 6)
    names = [name for name, field in table.__dataclass_fields__.items() if field.init]
    facts = {name: getattr(table, name) for name in names}
    return StepTable(**{**facts, **changes})


def test_a_carrier_gives_a_table_its_weights():
    table = StepTable.from_carrier((0, 2, 5), Newton(1), 7)

    assert table.weights[0] == table.weights[1] == (1.0,)
    assert table.weights[2] == table.weights[5] == (0.0, 1.0)
    assert table.weights[4] == pytest.approx((-1.0, 2.0))
    assert table.weights[6] == pytest.approx((-1 / 3, 4 / 3))
    assert table.input_weights == (0.0,) * 7
    assert table.stored(1) == (0,)
    assert table.stored(6) == (2, 5)


def test_tables_of_other_weights_have_other_names():
    one, other = (StepTable.from_carrier((0, 2), rule, 4) for rule in (Newton(1), Taylor(0)))

    assert one.fingerprint != other.fingerprint
    assert repr(one) != repr(other)


def test_reuse_is_a_carrier_of_order_0():
    assert set(StepTable.from_carrier((0, 3), Taylor(0), 6).weights) == {(1.0,)}


def test_a_table_is_a_policy_that_plans_can_count():
    table = make_table()

    actions = [table.decide(SITE, Step(index, 6), 64).action for index in range(6)]
    assert [action is Action.FULL for action in actions] == [
        index in table.full_steps for index in range(6)
    ]
    assert set(actions) == {Action.FULL, Action.SKIP}
    assert make_plan(table, DEMO).flops_ratio == table.flops_ratio == 2


def test_a_table_is_the_same_after_a_file(tmp_path):
    table = make_table(facts={"psnr": 4.5})

    save_table(table, tmp_path / "table.json")

    read = load_policy(tmp_path / "table.json")
    assert isinstance(read, StepTable)
    assert read.facts == {"psnr": 4.5}
    assert read.full_steps == table.full_steps
    for one, other in zip(read.weights, table.weights, strict=True):
        assert one == pytest.approx(other, rel=1e-8)


def test_a_router_is_a_policy_in_a_file_too(tmp_path):
    import torch

    router = LearningToCacheConfig(torch.zeros(4, 2))
    save_router(router, tmp_path / "router.safetensors")

    assert load_policy(tmp_path / "router.safetensors") == router


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "\x00", json.dumps({"format": "another"}), json.dumps([1])]
)
def test_files_that_hold_no_table_are_refused(tmp_path, content):
    (tmp_path / "table.json").write_text(content)

    with pytest.raises(ValueError, match=r"load_table: path must hold a step table, got .*table"):
        load_policy(tmp_path / "table.json")


def test_a_table_with_unknown_names_is_refused(tmp_path):
    save_table(make_table(), tmp_path / "table.json")
    content = json.loads((tmp_path / "table.json").read_text())
    (tmp_path / "table.json").write_text(json.dumps({**content, "more": 1}))

    with pytest.raises(ValueError, match="must hold a step table"):
        load_table(tmp_path / "table.json")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"full_steps": (1, 2)}, "StepTable: steps must ascend from 0"),
        ({"history": 0}, "history must be at least 1, got 0"),
        ({"weights": ((1.0,),)}, "weights must have 6 steps, got 1"),
        ({"history": 3}, "weights must have 3 numbers for step 5, got 2"),
        ({"input_weights": (0.0,)}, "input_weights must have 6 steps, got 1"),
        ({"input_weights": (0.0,) * 5 + (float("nan"),)}, "must be finite, got others at step 5"),
    ],
)
def test_tables_that_cannot_be_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_table(**changes)


def test_a_table_for_another_number_of_steps_is_refused():
    with pytest.raises(ValueError, match="full_steps must be for 5 steps, got one for 6"):
        make_table().decide(SITE, Step(0, 5), 64)
