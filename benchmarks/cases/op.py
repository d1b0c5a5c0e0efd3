"""A timed op: our call, its baselines, and its least bytes and products.

A timed function names the inputs that it wants as its parameters, as a pytest test does.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from typing import Any

import torch

from .inputs import make_inputs
from .shapes import Shape

# rotating over more than the caches of today's GPUs finds them cold, as the layers of a model do
COLD_BYTES = 128 * 2**20

Inputs = dict[str, Any]
Function = Callable[..., Any]


@dataclass(frozen=True)
class Op:
    """An op, or one use of it, against the published way and against others.

    Attributes:
        name: of the case.
        ours: takes a ``backend`` as well; returns the results of ``published``, and perhaps more.
        published: the published way, in eager PyTorch.
        count_bytes: of a shape and the size of an element: each input read once, each output
            written once.
        count_flops: of matrix products alone.
        fits: the shapes that it is timed at.
        backends: those of ours that it is timed on; ``auto`` only where it is more than one op.
        op: its name in the backends; the case's name if not given.
        eager: the name of the paper's composition in records.
        others: the other choices of a user.
        on_cuda: others, of which there is nothing on a CPU.
        dense: the same for all tokens.
        compiled: the baseline that ``torch.compile`` is given; the published way if not named.
        max_sets: how many sets of inputs to rotate over, at most.
    """

    name: str
    ours: Function
    published: Function
    count_bytes: Callable[[Shape, int], int]
    count_flops: Callable[[Shape], int] = lambda shape: 0
    fits: Callable[[Shape], bool] = lambda shape: True
    backends: tuple[str, ...] = ("triton", "native")
    op: str = ""
    eager: str = "eager"
    others: Mapping[str, Function] = field(default_factory=dict)
    on_cuda: Mapping[str, Function] = field(default_factory=dict)
    dense: Function | None = None
    compiled: str = ""
    max_sets: int = 256

    @property
    def backend_op(self) -> str:
        """The op's name in the backends."""
        return self.op or self.name

    def baselines(self, device_type: str) -> dict[str, Function]:
        """List the baselines on such a device, the paper's composition first."""
        on_cuda = self.on_cuda if device_type == "cuda" else {}
        dense = {} if self.dense is None else {"dense": self.dense}
        return {self.eager: self.published, **self.others, **on_cuda, **dense}

    def make_inputs(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int
    ) -> Inputs:
        """Random inputs, all that ``ours`` and the baselines name."""
        functions = (self.ours, *self.baselines(device.type).values())
        names = set().union(*map(wanted_inputs, functions))
        return make_inputs(names, shape, dtype, device, seed)

    def num_sets(self, shape: Shape, dtype: torch.dtype) -> int:
        """Count the sets of inputs to rotate over."""
        num_bytes = self.count_bytes(shape, dtype.itemsize)
        return min(max(ceil(COLD_BYTES / num_bytes), 2), self.max_sets)


def bind(function: Function, inputs: Inputs, **options: Any) -> partial:
    """The call of ``function`` on those of the inputs that it names."""
    return partial(function, **{name: inputs[name] for name in wanted_inputs(function)}, **options)


def wanted_inputs(function: Function) -> set[str]:
    """The names of a timed function's inputs."""
    return set(inspect.signature(function).parameters) - {"backend"}
