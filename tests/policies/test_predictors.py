import pickle

import pytest
import torch

from tokencache_kernels.policies import (
    ContentPredictor,
    TablePredictor,
    load_predictor,
    rank_scores,
    save_predictor,
)
from tokencache_kernels.testing import randn

safetensors = pytest.importorskip("safetensors.torch")
L, N, T, D = 3, 10, 4, 12


def table():
    predictor = TablePredictor(L, N, T)
    predictor.logits.data = randn(T, L, N)
    predictor.importance.copy_(randn(T, L, N).sigmoid())
    return predictor


def content(width=8):
    predictor = ContentPredictor(L, N, T, hidden=D, width=width, num_heads=2)
    for index, parameter in enumerate(predictor.parameters()):
        parameter.data = 0.3 * randn(*parameter.shape, seed=index)
    predictor.importance.copy_(randn(T, L, N).sigmoid())
    return predictor


PREDICTORS = pytest.mark.parametrize(
    "build", [table, content, lambda: content(width=D)], ids=["table", "content", "full-width"]
)


@PREDICTORS
def test_scores_lie_between_0_and_1_and_have_a_gradient(build):
    predictor = build()

    scores = predictor(randn(2, N, D), randn(2, D), step=1)

    assert scores.shape == (L, 2, N)
    assert scores.dtype == torch.float32
    assert ((scores > 0) & (scores < 1)).all()
    scores.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in predictor.parameters())
    assert any(parameter.grad.abs().max() > 0 for parameter in predictor.parameters())


@PREDICTORS
def test_samples_at_different_steps_are_those_samples_alone(build):
    predictor = build()
    hidden_states, conditioning = randn(2, N, D), randn(2, D)

    together = predictor(hidden_states, conditioning, torch.tensor([3, 1]))

    for sample, step in enumerate((3, 1)):
        pick = slice(sample, sample + 1)
        alone = predictor(hidden_states[pick], conditioning[pick], step)
        torch.testing.assert_close(together[:, pick], alone)


def test_the_table_knows_the_step_and_nothing_of_the_sample():
    predictor = table()

    scores = predictor(randn(2, N, D), randn(2, D), step=2)

    for sample in range(2):
        assert torch.equal(scores[:, sample], predictor.logits[2].sigmoid())


def test_the_content_predictor_sees_tokens_and_conditioning():
    predictor = content()
    hidden_states, conditioning = randn(1, N, D), randn(1, D)
    scores = predictor(hidden_states, conditioning, 0)

    assert not torch.allclose(predictor(hidden_states.flip(1), conditioning, 0), scores)
    assert not torch.allclose(predictor(hidden_states, conditioning + 1, 0), scores)
    # it has no positions of its own: they are in the tokens
    flipped = predictor(hidden_states.flip(1), conditioning, 0).flip(-1)
    torch.testing.assert_close(flipped, scores)


def test_a_new_predictor_prefers_no_token():
    for predictor in (TablePredictor(L, N, T), ContentPredictor(L, N, T, D, 8, 2)):
        scores = predictor(randn(2, N, D), randn(2, D), step=0)
        assert torch.equal(scores, torch.full((L, 2, N), 0.5))


def test_a_bfloat16_stream_is_scored_in_the_predictors_own_dtype():
    predictor = content()
    hidden_states, conditioning = randn(1, N, D).bfloat16(), randn(1, D).bfloat16()

    scores = predictor(hidden_states, conditioning, 0)

    assert torch.equal(scores, predictor(hidden_states.float(), conditioning.float(), 0))


def test_ranks_are_averaged_over_the_samples():
    scores = torch.tensor([[[0.1, 0.9, 0.5], [0.7, 0.3, 0.2]]])

    torch.testing.assert_close(rank_scores(scores), torch.tensor([[0.8, 0.4, 0.15]]))


def test_the_importance_of_a_step_is_the_mean_over_its_blocks_and_tokens():
    predictor = table()

    wanted = [step.double().mean().item() for step in predictor.importance]
    assert predictor.step_importance() == pytest.approx(wanted, rel=1e-12)


@PREDICTORS
def test_a_predictor_comes_back_as_it_was_saved(build, tmp_path):
    predictor = build()
    path = tmp_path / "folder" / "predictor.safetensors"

    save_predictor(predictor, path)
    loaded = load_predictor(str(path))

    assert repr(loaded) == repr(predictor)
    assert loaded.state_dict().keys() == predictor.state_dict().keys()
    for name, value in predictor.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def truncated(path):
    save_predictor(table(), path)
    path.write_bytes(path.read_bytes()[:-5])


def without_metadata(path):
    save_predictor(table(), path)
    safetensors.save_file(safetensors.load_file(path), path)


def of_another_shape(path):
    save_predictor(table(), path)
    text = path.read_bytes().replace(b'\\"num_layers\\": 3', b'\\"num_layers\\": 2')
    path.write_bytes(text)


@pytest.mark.parametrize(
    ("spoil", "wanted"),
    [
        (truncated, "be a whole safetensors file"),
        (without_metadata, "be a tokencache_kernels predictor 1"),
        (of_another_shape, "hold the predictor that its metadata describes"),
        (lambda path: path.write_bytes(pickle.dumps(Trap())), "be a whole safetensors file"),
        (lambda path: torch.save({"logits": torch.zeros(3)}, path), "be a whole safetensors file"),
        (lambda path: path.write_bytes(b""), "be a whole safetensors file"),
    ],
    ids=["truncated", "no-metadata", "another-shape", "pickle", "torch", "empty"],
)
def test_a_file_that_is_not_a_whole_predictor_is_refused_in_a_sentence(spoil, wanted, tmp_path):
    path = tmp_path / "predictor.safetensors"
    spoil(path)

    with pytest.raises(
        ValueError, match=f"load_predictor: path must {wanted}, got {path}"
    ) as error:
        load_predictor(path)

    assert "\n" not in str(error.value)


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        load_predictor(tmp_path / "nowhere.safetensors")


def test_the_flops_are_those_of_the_counted_matrix_products():
    from torch.utils.flop_counter import FlopCounterMode

    for predictor in (content(), content(width=D)):
        with FlopCounterMode(display=False) as counter:
            predictor(randn(1, N, D), torch.zeros(1, D), 0)
        modulation = 2 * predictor.width * 6 * predictor.width
        if predictor.width != D:
            modulation += 2 * D * predictor.width

        # attention on the CPU is not counted by torch
        attention = 4 * N * N * predictor.width
        counted = counter.get_total_flops()
        assert predictor.flops in (counted - modulation, counted - modulation + attention)
