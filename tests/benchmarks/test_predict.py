"""Predictions come from the benchmarks' own calls, run without data."""

import pytest
import torch

from benchmarks import cases, layers, models, predict
from benchmarks.roofline import H200, price
from tokencache_kernels.policies import make_plan


@pytest.fixture(autouse=True)
def _without_data():
    with predict.without_data():
        yield


def test_every_op_can_be_predicted():
    shape = cases.SHAPES[0]
    for op in filter(lambda op: op.fits(shape), cases.OPS.values()):
        found = predict.predict_kernel(op, shape, H200)

        assert 0 < found["floor_ms"] < found["ms"]["auto/graph"]
        assert found["launches"]["auto"] <= found["launches"][op.eager]


def test_a_row_pass_is_one_launch_and_moves_what_its_case_says():
    op, shape = cases.OPS["row_pass_"], cases.SHAPES[0]

    found = predict.predict_kernel(op, shape, H200)

    assert found["launches"]["auto"] == 1
    # the case leaves out indices, gates and modulation
    assert found["bytes"] == pytest.approx(op.count_bytes(shape, 2), rel=0.01)


def test_a_layer_launches_less_than_published():
    shape = layers.LEADING[0]
    work = layers.make_work(shape, torch.bfloat16, predict.NO_DATA)

    ours = predict.collect(lambda: layers.run_ours(work, "auto"))
    published = predict.collect(lambda: layers.run_published(work))

    # three a layer, and one selection
    assert len(ours) <= 3 * shape.L + 2
    assert len(published) > 20 * shape.L
    assert price(ours, H200, "graph") < price(published, H200, "graph")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_run_is_predicted_step_by_step():
    pytest.importorskip("diffusers")
    case = models.Case("dit-xl-256px", 2, "toca", predict.NO_DATA, rehearse=True)

    found = list(predict.predict_run(case, H200))

    by_name = {(one["policy"], one["backend"], one["modulation"]): one for one in found}
    dense, ours, published, precomputed = (
        by_name[name]
        for name in (
            ("dense", "torch", "per-step"),
            ("toca", "auto", "per-step"),
            ("toca", "published", "per-step"),
            ("toca", "auto", "precomputed"),
        )
    )
    subject = case.make_subject()
    plan = make_plan(case.make_policy("toca", subject), subject.shape)
    # a plan leaves out embeddings and modulation, a prediction norms and activations
    assert dense["flops"] == pytest.approx(plan.dense_flops, rel=0.1)
    assert dense["steps_ms"].keys() == {"dense_step"}
    assert ours["flops"] < dense["flops"]
    assert precomputed["launches"] < ours["launches"] < published["launches"]
    assert set(ours["steps_ms"]) >= {"full_step", "partial_step"}
