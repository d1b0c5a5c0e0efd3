"""Steps that are captured once, as CUDA graphs, and replayed from then on."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._pytree import KeyPath, keystr, tree_flatten_with_path, tree_map, tree_unflatten

from ..errors import TokenCacheError, UnsupportedInputError
from .runner import Runner

_CONSTANTS = (bool, int, float, str, type(None))
T = TypeVar("T")


class Capture(Protocol):
    """The capture backend: CUDA, or its substitute on a machine without a GPU."""

    def refusal(self, device: torch.device) -> str | None:
        """Why nothing can be captured on ``device``, or None."""

    def capture(self, launch: Callable[[], T], device: torch.device) -> Callable[[], T]:
        """Call ``launch`` once, and let nothing run that it launches on ``device``.

        The result replays the launches. It returns a copy of the result of ``launch``, whose own
        memory is shared by all graphs.
        """


class CudaCapture:
    """CUDA graphs in one pool of memory: no two of them may run at a time."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            refuse("the machine", "have a CUDA device", "one without")
        # A memory pool lives as long as its last graph. Its free blocks are reusable only on the
        # stream that freed them.
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._stream: torch.cuda.Stream | None = None

    def refusal(self, device: torch.device) -> str | None:
        """See ``Capture``."""
        return None if device.type == "cuda" else f"{device}"

    def capture(self, launch: Callable[[], T], device: torch.device) -> Callable[[], T]:
        """See ``Capture``."""
        if self._stream is None or self._stream.device != device:
            self._stream = torch.cuda.Stream(device)
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other in self._graphs), None)
        # other threads may allocate meanwhile
        mode = "thread_local"
        current = torch.cuda.current_stream(device)
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode=mode):
                output = launch()
        finally:
            # a capture that fails would stay on its own
            torch.cuda.set_stream(current)
        self._graphs.add(graph)

        def replay() -> T:
            graph.replay()
            return copy_tensors(output)

        return replay


@dataclass
class GraphCounts:
    """Counts of the steps that ran as they are, were captured, or were replayed.

    Attributes:
        uncaptured: the model's own code, kernel by kernel: the first of each kind.
        captured: into a graph, which then ran.
        replayed: a graph of an earlier step.
    """

    uncaptured: int = 0
    captured: int = 0
    replayed: int = 0


class StaticInputs:
    """The arguments of a call, its tensors copied to addresses that stay."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        leaves, self._structure = tree_flatten_with_path(dict(arguments))
        # a later run may be outside of the inference mode of this one
        with torch.inference_mode(False):
            self._leaves = [
                leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for _, leaf in leaves
            ]

    def fill_(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Copy the tensors in, and return the arguments with the copies in their place."""
        leaves, _ = tree_flatten_with_path(dict(arguments))
        for mine, (_, given) in zip(self._leaves, leaves, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(given)
        filled: dict[str, Any] = tree_unflatten(self._leaves, self._structure)
        return filled


def describe_arguments(arguments: Mapping[str, Any], device: torch.device) -> dict[str, str]:
    """A graph's assumptions on each argument and its parts, by name.

    Raises:
        UnsupportedInputError: one is a tensor on another device, or neither a tensor nor a number,
            a string or None.
    """
    leaves, _ = tree_flatten_with_path(dict(arguments))
    return {_name(path): _describe(_name(path), leaf, device) for path, leaf in leaves}


def _name(path: KeyPath) -> str:
    argument, *inside = path
    return f"{argument.key}{keystr(tuple(inside))}"  # type: ignore[attr-defined]


def _describe(name: str, leaf: object, device: torch.device) -> str:
    if isinstance(leaf, Tensor):
        if leaf.device != device:
            refuse(name, f"be on {device} like the model", f"a tensor on {leaf.device}")
        return f"a tensor of shape {tuple(leaf.shape)} and {leaf.dtype}"
    if not isinstance(leaf, _CONSTANTS):
        refuse(name, "hold tensors, numbers, strings and None alone", type(leaf).__name__)
    return repr(leaf)


class StepGraphs:
    """The steps of runs whose arguments are alike: each kind is captured once.

    The first step of a kind runs uncaptured, which allocates lasting buffers, compiles kernels and
    loads libraries. The second is captured, and its graph replayed from then on.
    """

    def __init__(self, capture: Capture, device: torch.device, counts: GraphCounts) -> None:
        self._capture = capture
        self._device = device
        self._counts = counts
        # by kind: None once it has run; then its replay, and the constants known behind it
        self._graphs: dict[Hashable, tuple[Callable[[], Any], frozenset[Hashable]] | None] = {}

    def run(self, runner: Runner, launch: Callable[[], T]) -> T:
        """Run the step under way.

        Args:
            runner: of the context; all that it and ``launch`` read lies at fixed addresses.
            launch: the model's own call, which begins and ends the step.

        Returns: The result of ``launch``, or its result at the time of the capture.

        Raises:
            UnsupportedInputError: the step cannot be captured; the message says why.
        """
        # without a step behind it, a runner does not know the sizes
        kind = runner.prepare_step() if self._graphs else None
        if kind not in self._graphs:
            output = launch()
            self._graphs[runner.kind] = None
            self._counts.uncaptured += 1
            return output
        graph = self._graphs[kind]
        if graph is None:
            replay = self._capture_step(launch)
            self._graphs[kind] = replay, runner.known
            self._counts.captured += 1
            return replay()
        replay, known = graph
        replayed: T = replay()
        runner.finish_step(known)
        self._counts.replayed += 1
        return replayed

    def _capture_step(self, launch: Callable[[], T]) -> Callable[[], T]:
        errors: list[Exception] = []

        def launch_and_tell() -> T:
            try:
                return launch()
            except Exception as error:
                errors.append(error)
                raise

        try:
            return self._capture.capture(launch_and_tell, self._device)
        except Exception as error:
            # the end of a capture that has failed may fail in turn
            cause = errors[0] if errors else error
            if isinstance(cause, TokenCacheError):
                raise cause from None
            got = f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"
            refuse("a step", "be such that it can be captured", got, cause)


def copy_tensors(tree: T) -> T:
    """Copy the tensors in an output of a model."""
    copied: T = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)
    return copied


def refuse(name: str, wanted: str, got: str, cause: Exception | None = None) -> NoReturn:
    """Refuse graphs with one sentence on the obstacle."""
    raise UnsupportedInputError(f"cuda_graphs: {name} must {wanted}, got {got}") from cause
