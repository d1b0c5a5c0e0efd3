"""Graphs without a model: the tape that stands for CUDA, the inputs, and the failures."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from tokencache_kernels import ops
from tokencache_kernels.blocks import (
    CudaCapture,
    GraphCounts,
    Runner,
    StaticInputs,
    StepGraphs,
    describe_arguments,
)
from tokencache_kernels.errors import CacheMissError, UnsupportedInputError
from tokencache_kernels.policies import fora
from tokencache_kernels.testing import Tape, randn

CPU = torch.device("cpu")


def test_a_capture_has_no_effect_and_a_replay_has_it_once():
    counter, given = torch.zeros(3), randn(3)

    def launch():
        counter[1:].add_(1)
        return (given * 2).view(3, 1)

    replay = Tape().capture(launch, CPU)

    assert counter.tolist() == [0, 0, 0]
    for count in (1, 2):
        given.copy_(randn(3, seed=count))
        assert torch.equal(replay(), 2 * given.view(3, 1))
        assert counter.tolist() == [0, count, count]


def test_a_replay_writes_what_an_op_writes():
    features, indices = torch.zeros(1, 4, 2), torch.tensor([[0, 3]], dtype=torch.int32)
    rows = randn(1, 2, 2)
    replay = Tape().capture(lambda: ops.scatter_rows_(features, indices, rows + 1), CPU)

    indices.copy_(torch.tensor([[1, 2]]))
    replay()

    assert torch.equal(features[:, 1:3], rows + 1)
    assert features[:, ::3].eq(0).all()


def test_what_is_kept_from_a_capture_does_not_hold():
    kept, given = [], randn(3)

    def launch():
        kept.append(given + 1)
        return kept[0] * 2

    replay = Tape().capture(launch, CPU)

    assert kept[0].isnan().all()
    assert torch.equal(replay(), (given + 1) * 2)
    assert kept[0].isnan().all()


@pytest.mark.parametrize(
    "wait",
    [
        lambda values: values.sum().item(),
        lambda values: values[values > 0],
        lambda values: values.nonzero(),
        lambda values: values + torch.tensor([1.0, 2.0]),
        lambda values: values + torch.rand(2),
    ],
    ids=["item", "mask", "nonzero", "from the host", "random"],
)
def test_what_a_graph_cannot_hold_is_an_error(wait):
    with pytest.raises(RuntimeError, match="operation not permitted when stream is capturing"):
        Tape().capture(lambda: wait(torch.ones(2)), CPU)


def test_inputs_stay_where_they_are_in_containers_of_their_own():
    inputs = StaticInputs({"x": randn(2), "nested": {"y": [randn(3)], "scale": 0.5}})
    first = inputs.fill_({"x": randn(2, seed=1), "nested": {"y": [randn(3, seed=1)], "scale": 0.5}})
    # as a model may
    first["nested"].pop("scale")

    second = inputs.fill_(
        {"x": randn(2, seed=2), "nested": {"y": [randn(3, seed=2)], "scale": 0.5}}
    )

    assert second["nested"]["scale"] == 0.5
    assert second["x"] is first["x"]
    assert second["nested"]["y"][0] is first["nested"]["y"][0]
    assert torch.equal(second["x"], randn(2, seed=2))
    assert torch.equal(second["nested"]["y"][0], randn(3, seed=2))


def test_arguments_are_described_by_name():
    arguments = {"x": randn(2, 3), "kwargs": {"ids": [torch.arange(2)], "scale": 0.5}, "mask": None}

    assert describe_arguments(arguments, CPU) == {
        "x": "a tensor of shape (2, 3) and torch.float32",
        "kwargs['ids'][0]": "a tensor of shape (2,) and torch.int64",
        "kwargs['scale']": "0.5",
        "mask": "None",
    }


class FakeGraph:
    """A CUDA graph that holds nothing."""

    def __init__(self):
        self.num_replays = 0

    def pool(self):
        return self.of

    def replay(self):
        self.num_replays += 1


def test_cuda_graphs_share_a_pool_and_a_stream_while_one_of_them_lives(monkeypatch):
    """Checks of the dozen lines that need a GPU."""
    entered = []

    @contextmanager
    def enter(graph, pool, stream, capture_error_mode):
        graph.of = pool or f"pool {len(entered)}"
        entered.append((graph.of, stream))
        yield

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(torch.cuda, "graph", enter)
    streams = ["current"]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[0])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    capture, device, output = CudaCapture(), torch.device("cuda:1"), torch.zeros(2)

    replays = [capture.capture(lambda: (output,), device) for _ in range(2)]
    output += 1
    (copied,) = replays[0]()
    replays.clear()
    capture.capture(lambda: output, device)

    assert torch.equal(copied, output)
    assert copied is not output
    assert [pool for pool, _ in entered] == ["pool 0", "pool 0", "pool 2"]
    assert all(stream is entered[0][1] and stream.device == device for _, stream in entered)
    # torch would leave the capture's own behind where the end of a capture fails
    assert streams == 4 * ["current"]
    assert capture.refusal(device) is None


class Failing:
    """Ends a capture with an error of its own if there was one inside, as CUDA does."""

    def refusal(self, device):
        return None

    def capture(self, launch, device):
        try:
            return launch()
        except Exception as error:
            raise RuntimeError("capture was invalidated") from error


@pytest.mark.parametrize(
    ("error", "caught", "sentence"),
    [
        pytest.param(
            RuntimeError("the device is waited for\nhere"),
            UnsupportedInputError,
            "^cuda_graphs: a step must be such that it can be captured, got RuntimeError: the "
            "device is waited for$",
            id="theirs",
        ),
        pytest.param(CacheMissError("load: gone"), CacheMissError, "^load: gone$", id="ours"),
    ],
)
def test_the_first_error_of_a_capture_is_the_one_told(error, caught, sentence):
    runner, graphs = Runner(fora(2, 4)), StepGraphs(Failing(), CPU, GraphCounts())

    def launch():
        runner.begin_step((), 1, CPU)
        if runner.step.index == 1:
            raise error
        runner.end_step()

    graphs.run(runner, launch)

    with pytest.raises(caught, match=sentence):
        graphs.run(runner, launch)
