"""A dry run of graph capture without a GPU: calls of ops are recorded, and run again."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..blocks import copy_tensors

T = TypeVar("T")
# calls that wait for the device, copy from the host or draw there: a graph cannot hold them
_FORBIDDEN = (
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "lift_fresh",
    "_pin_memory", "rand", "randn", "randint", "randperm", "bernoulli", "uniform_", "normal_",
)  # fmt: skip


class Tape:
    """Stands for ``blocks.CudaCapture`` on the CPU; all its recordings share one memory.

    As with CUDA, a capture has no effect: its writes to outside tensors are undone. A replay runs
    the recorded calls of ops, on the very tensors of the capture, and no Python of the model.
    Behind it everything that was allocated inside is overwritten, by NaN or -1, since other
    graphs use the same memory: whoever keeps such a tensor finds that.

    Attributes:
        num_replays: how often something was replayed.
    """

    def __init__(self) -> None:
        self.num_replays = 0

    def refusal(self, device: torch.device) -> str | None:
        """See ``blocks.Capture``."""
        return None if device.type == "cpu" else f"{device}"

    def capture(self, launch: Callable[[], T], device: torch.device) -> Callable[[], T]:
        """See ``blocks.Capture``."""
        recorder = _Recorder()
        try:
            with recorder:
                output = launch()
        finally:
            recorder.undo()
            recorder.poison()

        def replay() -> T:
            recorder.replay()
            copied = copy_tensors(output)
            recorder.poison()
            self.num_replays += 1
            return copied

        return replay


class _Recorder(TorchDispatchMode):
    """The ops of one capture in their order, with their tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        # by address of the storage: tensors allocated inside, and former values of outside tensors
        self._inside: dict[int, Tensor] = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an op, and note it."""
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        by_mask = name.startswith("index") and any(
            tensor.dtype == torch.bool for tensor in _tensors(args[1:2])
        )
        if name in _FORBIDDEN or by_mask:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        for tensor in _written(func, args, kwargs):
            where = _address(tensor)
            if where not in self._inside and where not in self._before:
                whole = _whole(tensor)
                self._before[where] = whole, whole.clone()
        given = {_address(tensor) for tensor in _tensors((args, kwargs))}
        output = func(*args, **kwargs)
        for tensor in _tensors(output):
            if _address(tensor) not in given:
                self._inside[_address(tensor)] = _whole(tensor)
        # a view of a recorded tensor stays one
        if func._schema.is_mutable or any(_address(one) not in given for one in _tensors(output)):
            self._calls.append((func, args, kwargs, output))
        return output

    def undo(self) -> None:
        """Restore the former values of outside tensors."""
        for tensor, before in self._before.values():
            tensor.copy_(before)
        self._before.clear()

    # a graph writes whatever mode its tensors were made in
    @torch.inference_mode()
    def replay(self) -> None:
        """Run the ops again, and copy their results into the tensors of the capture."""
        for func, args, kwargs, output in self._calls:
            again = func(*args, **kwargs)
            for mine, new in zip(_tensors(output), _tensors(again), strict=True):
                if _address(mine) != _address(new):
                    mine.copy_(new)

    @torch.inference_mode()
    def poison(self) -> None:
        """Overwrite everything that was allocated inside."""
        for tensor in self._inside.values():
            tensor.fill_(255)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _whole(tensor: Tensor) -> Tensor:
    """All bytes of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that an op writes to, as its schema says."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from _tensors(given)
