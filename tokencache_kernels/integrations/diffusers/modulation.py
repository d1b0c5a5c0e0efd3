"""Compute the modulation of all steps of a run in its first call, and read it in every call.

The adaLN vectors of a block depend on timestep and conditioning, not on the tokens. Made anew in
each step, they cost a pass over all weights of their layers for one row of each sample. The
description says which modules make them, and of which argument of the block.
"""

import logging
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager
from torch import Tensor, nn

from ...cache import FeatureCache
from ...errors import UnsupportedInputError, fail
from ...models import ModelSpec
from . import compat
from .arguments import name_arguments
from .binding import list_blocks, resolve
from .descriptions import find_spec
from .interception import class_of, eager, interceptor_of

logger = logging.getLogger(__name__)

_HOOK_NAME = compat.MODULATION_HOOK
# a division by 1000 may round otherwise on another device, and sigmas are timesteps before it
_SLACK = 4 * torch.finfo(torch.float32).eps


class Contexts(StateManager):  # type: ignore[misc]
    """States by cache context; a call outside any context belongs to one called ``default``."""

    @property
    def context(self) -> CacheContext:
        """The context of the current call."""
        return self._context or CacheContext("default")


class StatefulHook(ModelHook):  # type: ignore[misc]
    """A hook that works on the state of the current cache context."""

    _is_stateful = True

    def __init__(self, contexts: Contexts, end: Callable[[], None] | None = None) -> None:
        super().__init__()
        self._contexts = contexts
        self.end = end

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Forget every context."""
        self._contexts.reset()
        return module

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:
        """Called when the hook is removed: remove its companions."""
        if self.end is not None:
            self.end()
        return module


@dataclass(frozen=True)
class _Source:
    """A module that makes vectors of an embedding.

    Attributes:
        key: its path in the transformer.
        module: a norm with a linear layer (``adaln``, ``own_adaln``), or the module itself.
        kind: see ``Vectors``.
        argument: the block's argument that holds the embedding.
        count: the vectors that the description names.
        gives_embedding: whether the norm's own embedder is answered, too: a model reads the first.
    """

    key: str
    module: Any
    kind: str
    argument: str
    count: int
    gives_embedding: bool = False

    @property
    def weights(self) -> Any:
        """The module whose weights nothing reads between the first calls of two runs."""
        return self.module if self.kind == "call" else self.module.linear

    def compute(self, given: list[dict[str, Any]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The embedding (R, D) of all steps and samples, and the vectors (R, W) of it."""
        if self.kind == "own_adaln":
            times = torch.cat([one["timestep"] for one in given])
            batch = len(times) // len(given)
            labels = torch.cat([one["class_labels"].expand(batch) for one in given])
            embedding = self.module.emb(times, labels, hidden_dtype=dtype)
        else:
            embedding = torch.cat([one[self.argument] for one in given])
        if self.kind == "call":
            return embedding, self.module(embedding)
        return embedding, self.module.linear(self.module.silu(embedding))


def list_sources(spec: ModelSpec, transformer: nn.Module) -> list[_Source]:
    """The modules of a transformer that make vectors of the conditioning alone."""
    sources = []
    for stack in spec.stacks:
        blocks = list_blocks(stack, resolve(transformer, stack.path)) if stack.vectors else ()
        for layer, block in enumerate(blocks):
            for source in stack.vectors:
                module = resolve(block, source.module) if source.module else None
                if source.kind not in ("adaln", "own_adaln", "call") or module is None:
                    continue
                is_first = source.kind == "own_adaln" and layer == 0
                key = f"{stack.path}.{layer}.{source.module}"
                sources.append(
                    _Source(key, module, source.kind, source.argument, source.count, is_first)
                )
    if spec.norm_out:
        norm_out = resolve(transformer, spec.norm_out)
        sources.append(_Source(spec.norm_out, norm_out, "adaln", "temb", 2))
    for one in sources:
        is_norm = hasattr(one.module, "linear") and hasattr(one.module, "silu")
        if one.kind != "call" and not is_norm:
            raise UnsupportedInputError(
                "precompute_modulation: transformer must modulate by norms that have a layer "
                f"'linear', got {type(one.module).__name__}"
            )
    return sources


class _Reached(Exception):
    """Ends a call of the transformer at its first block."""


class _Model:
    """A transformer and the modules that modulate it.

    Attributes:
        spec: its description.
        sources: the modules of its blocks that make vectors.
        embedders: by path, those called before the blocks, on the conditioning alone.
        rest: the device on which the weights of the sources are kept between runs, or None.
    """

    def __init__(self, transformer: Any, spec: ModelSpec, rest: Any) -> None:
        self.spec = spec
        self.sources = list_sources(spec, transformer)
        self.embedders = {path: resolve(transformer, path) for path in spec.embedders}
        self.rest = rest
        if not (self.sources or self.embedders):
            raise UnsupportedInputError(
                f"precompute_modulation: transformer must have adaLN vectors that are described, "
                f"got {spec.transformer} without any"
            )

    def scale_timesteps(self, timesteps: Tensor) -> Tensor:
        """A scheduler's timesteps as pipelines hand them to the model."""
        if self.spec.timestep_divisor != 1:
            timesteps = timesteps / self.spec.timestep_divisor
        return 1 - timesteps if self.spec.time_rises else timesteps

    @eager
    def reach_blocks(self, transformer: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Call the transformer up to its first block; give the block's arguments, by name."""
        block = resolve(transformer, self.spec.stacks[0].path)[0]
        thread = threading.get_ident()
        reached: dict[str, Any] = {}

        @eager
        def stop(block: nn.Module, arguments: Any, named: Any) -> None:
            if threading.get_ident() == thread:
                reached.update(name_arguments(block, arguments, named))
                raise _Reached

        interceptor = interceptor_of(transformer)
        pause = nullcontext() if interceptor is None else interceptor.session.paused()
        handle = block.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
        try:
            with pause:
                class_of(transformer).forward(transformer, **given)
        except _Reached:
            return reached
        finally:
            handle.remove()
        raise UnsupportedInputError(
            f"precompute_modulation: {self.spec.transformer} must call its described blocks, got "
            "one that does not"
        )

    @contextmanager
    def weights_of(self, source: _Source, device: torch.device) -> Iterator[None]:
        """Have the weights of a source on a device for a while."""
        if self.rest is None:
            yield
            return
        source.weights.to(device)
        try:
            yield
        finally:
            source.weights.to(self.rest)


class _ModulationState(BaseState):  # type: ignore[misc]
    """One run of one cache context: the vectors of all its steps, and those of the call under way.

    The row of a call is found on the device, by the values of timestep and conditioning, so that
    the host need not wait; where no row is right, the vectors are NaN. They are copied to where a
    captured graph reads them.
    """

    def __init__(self, model: _Model, scheduler: Any) -> None:
        self._model = model
        self._scheduler = scheduler
        self.reset()

    def reset(self) -> None:
        """Begin a new run."""
        self._inputs: tuple[Tensor, ...] = ()
        self._sizes: tuple[int, torch.dtype] | None = None
        self._tables: dict[torch.dtype, Tensor] = {}
        self._columns: dict[str, Any] = {}
        self._vectors = FeatureCache()
        self._is_serving = False
        self.recorded: dict[str, list[Any]] | None = None

    def begin_call(
        self, transformer: Any, given: dict[str, Any], conditioning: tuple[Tensor, ...]
    ) -> None:
        """Copy the vectors of the call from the table, which the first call of a run makes."""
        # an interrupt leaves a call without an end
        self._is_serving = False
        latents, timestep = given[self._model.spec.latents], given[self._model.spec.timestep]
        timestep = timestep.expand(len(latents))
        timesteps = self._scheduler.timesteps
        if not isinstance(timesteps, Tensor):
            wanted = "have its timesteps, a tensor, when a run begins"
            fail("precompute_modulation", "scheduler", wanted, type(timesteps).__name__)
        inputs = timesteps, *conditioning
        sizes = len(latents), latents[0].dtype
        if not self._tables or sizes != self._sizes or not _are_same(inputs, self._inputs):
            self._tables = {}
            self._make_tables(transformer, given, timestep, conditioning, sizes[1])
            self._inputs, self._sizes, self._num_calls = inputs, sizes, 0
        rows = self._find_rows(timestep, conditioning)
        for dtype, table in self._tables.items():
            self._vectors.store(dtype, table[rows])
        self._num_calls += 1
        self._is_serving = True

    def end_call(self) -> None:
        """Serve nobody until the next call; the last one of a run frees the tables."""
        self._is_serving = False
        if self._tables and self._num_calls == len(self._times):
            self._tables = {}

    def read(self, key: str) -> Any:
        """The vectors of a module in the call under way, (B, W); None outside a call."""
        if not self._is_serving or key not in self._columns:
            return None
        return _map(lambda column: self._read(*column), self._columns[key])

    def _read(self, dtype: torch.dtype, columns: slice, shape: torch.Size) -> Tensor:
        vectors = self._vectors.load(dtype)[:, columns]
        return vectors.unflatten(1, shape) if len(shape) > 1 else vectors

    def _make_tables(
        self,
        transformer: Any,
        given: dict[str, Any],
        timestep: Tensor,
        conditioning: tuple[Tensor, ...],
        dtype: torch.dtype,
    ) -> None:
        """Make all vectors of T * B rows, step by step, and a row of NaN: (T * B + 1, W)."""
        if transformer.training:
            fail("precompute_modulation", "transformer", "be in evaluation mode", "training mode")
        self._times = self._model.scale_timesteps(self._scheduler.timesteps.to(timestep))
        # the one time in a run that the host waits; later calls are told by NaN
        if not self._find_steps(timestep).any(0).all():
            wanted = "be the scheduler's, as diffusers' pipelines hand them over"
            fail("precompute_modulation", "timestep", wanted, timestep.tolist())
        self._conditioning = [value.clone() for value in conditioning]
        T, B = len(self._times), len(timestep)
        self._rows = torch.arange(T * B, device=timestep.device).view(T, B)

        model = self._model
        self.recorded = {}
        try:
            reached = [
                model.reach_blocks(transformer, given | {model.spec.timestep: time.expand(B)})
                for time in self._times
            ]
        finally:
            recorded, self.recorded = self.recorded, None
        made: dict[str, Any] = {
            key: _map(lambda *steps: torch.cat(steps), *outputs)
            for key, outputs in recorded.items()
            if len(outputs) == T
        }
        for source in model.sources:
            made.update(_compute(model, source, reached, dtype, B))

        widths: dict[torch.dtype, int] = {}

        def place(rows: Tensor) -> Any:
            if len(rows) != T * B:
                wanted = "make a row of vectors for each sample"
                fail("precompute_modulation", "transformer", wanted, f"{len(rows)} for {T * B}")
            if rows.requires_grad:
                wanted = "be called without gradients, as under torch.no_grad()"
                fail("precompute_modulation", "transformer", wanted, "a call with gradients")
            first = widths.get(rows.dtype, 0)
            widths[rows.dtype] = first + rows[0].numel()
            return _Column((rows.dtype, slice(first, widths[rows.dtype]), rows.shape[1:]))

        self._columns = {key: _map(place, rows) for key, rows in made.items()}
        device = timestep.device
        self._tables = {
            kind: torch.full((T * B + 1, width), torch.nan, dtype=kind, device=device)
            for kind, width in widths.items()
        }
        for key, rows in made.items():
            _map(self._fill, rows, self._columns[key])
        size = sum(table.nbytes for table in self._tables.values())
        logger.debug("precompute_modulation: %d steps, batch %d: %d bytes", T, B, size)

    def _fill(self, rows: Tensor, column: Any) -> None:
        self._tables[column[0]][:-1, column[1]] = rows.flatten(1)

    def _find_steps(self, timestep: Tensor) -> Tensor:
        """Find the steps of the scheduler with the timestep of each sample, (T, B)."""
        times = self._times[:, None]
        return (times - timestep).abs() <= _SLACK * times.abs()

    def _find_rows(self, timestep: Tensor, conditioning: tuple[Tensor, ...]) -> Tensor:
        """Find the row of each sample in the tables, (B,)."""
        is_right = self._find_steps(timestep)
        for given, known in zip(conditioning, self._conditioning, strict=True):
            is_right = is_right & (given == known).reshape(len(given), -1).all(1)
        return torch.where(is_right, self._rows, self._rows.numel()).amin(0)


class _Column(tuple[torch.dtype, slice, torch.Size]):
    """A tensor's place in the tables: dtype, columns, shape of a row."""


def _compute(
    model: _Model, source: _Source, reached: list[dict[str, Any]], dtype: torch.dtype, batch: int
) -> dict[str, Tensor]:
    """The vectors of one module, and of its embedder if that is answered, too."""
    if source.kind != "own_adaln":
        for given in reached:
            embedding = given.get(source.argument)
            if not isinstance(embedding, Tensor) or embedding.shape[:-1] != (batch,):
                got = tuple(embedding.shape) if isinstance(embedding, Tensor) else embedding
                raise UnsupportedInputError(
                    f"precompute_modulation: {source.argument} of {model.spec.transformer}'s "
                    f"blocks must be one row for each of {batch} samples, got {got}"
                )
    with model.weights_of(source, _device_of(reached)):
        embedding, vectors = source.compute(reached, dtype)
    if vectors.dtype != embedding.dtype:
        wanted = f"modulate in {embedding.dtype}"
        fail("precompute_modulation", "transformer", wanted, vectors.dtype)
    made = {source.key: vectors}
    if source.gives_embedding:
        made[f"{source.key}.emb"] = embedding
    return made


def _device_of(reached: list[dict[str, Any]]) -> torch.device:
    """The device of a block's arguments."""
    return next(one.device for one in reached[0].values() if isinstance(one, Tensor))


def _map(function: Any, *trees: Any) -> Any:
    """Apply a function to the tensors of a module's outputs, which may be tuples of them."""
    first = trees[0]
    if first is None:
        return None
    if isinstance(first, tuple) and not isinstance(first, _Column):
        return tuple(_map(function, *parts) for parts in zip(*trees, strict=True))
    return function(*trees)


class _StandIn:
    """A norm whose linear layer gives vectors that are known already."""

    def __init__(self, norm: Any, vectors: Tensor) -> None:
        self._norm = norm
        self._vectors: Tensor | None = vectors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._norm, name)

    def emb(self, *_: Any, **__: Any) -> Tensor | None:
        """No embedding is needed."""
        return self._vectors

    def silu(self, embedding: Any) -> Any:
        """See ``emb``."""
        return embedding

    def linear(self, _: Any) -> Tensor:
        """The vectors, side by side: (B, W)."""
        vectors, self._vectors = self._vectors, None
        if vectors is None:
            raise UnsupportedInputError(
                "precompute_modulation: a norm must make its vectors of one embedding, got "
                f"{type(self._norm).__name__} with several"
            )
        return vectors


class _VectorsHook(StatefulHook):
    """Modulates by the vectors read, and makes none; the norm's own code does the rest."""

    def __init__(self, contexts: Contexts, source: _Source) -> None:
        super().__init__(contexts)
        self._source = source
        self._key = source.key

    def read(self) -> tuple[Tensor, ...] | None:
        """The module's vectors in the call under way, (B, D) each; None outside a call."""
        vectors = self._contexts.get_state().read(self._key)
        return None if vectors is None else vectors.chunk(self._source.count, dim=1)

    def new_forward(self, module: Any, *arguments: Any, **named: Any) -> Any:
        """Call the module's own forward, with a linear layer that is done."""
        vectors = self._contexts.get_state().read(self._key)
        if vectors is None:
            return self.fn_ref.original_forward(*arguments, **named)
        if self._source.kind == "call":
            return vectors
        return class_of(module).forward(_StandIn(module, vectors), *arguments, **named)


class _EmbedderHook(StatefulHook):
    """Gives the output read."""

    def __init__(self, contexts: Contexts, key: str) -> None:
        super().__init__(contexts)
        self._key = key

    def new_forward(self, embedder: nn.Module, *arguments: Any, **named: Any) -> Any:
        """Answer with the embedder's outputs, or record them."""
        state = self._contexts.get_state()
        known = state.read(self._key)
        if known is not None:
            return known
        output = self.fn_ref.original_forward(*arguments, **named)
        if state.recorded is not None:
            state.recorded.setdefault(self._key, []).append(output)
        return output


class _CallHooks:
    """Begins and ends the calls of a transformer.

    They are hooks of torch's: these run outside of whatever stands in for the forward, such as a
    captured graph, and end a call that breaks off.
    """

    def __init__(self, contexts: Contexts, model: _Model, transformer: nn.Module) -> None:
        self._contexts = contexts
        self._model = model
        self._device = next((one.device for one in transformer.parameters()), None)
        self._handles = (
            transformer.register_forward_pre_hook(self._begin_call, with_kwargs=True),
            transformer.register_forward_hook(self._end_call, always_call=True),
        )
        if model.rest is not None:
            for source in model.sources:
                source.weights.to(model.rest)

    def remove(self) -> None:
        """Take them off, and bring the weights back."""
        for handle in self._handles:
            handle.remove()
        if self._model.rest is not None:
            for source in self._model.sources:
                source.weights.to(self._device)

    def _begin_call(
        self, transformer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        given = name_arguments(transformer, arguments, named)
        spec = self._model.spec
        timestep = given.get(spec.timestep)
        if not isinstance(timestep, Tensor):
            fail("precompute_modulation", spec.timestep, "be a tensor", timestep)
        if timestep.dim() > 1:
            wanted = "be one for each sample"
            fail("precompute_modulation", spec.timestep, wanted, f"shape {tuple(timestep.shape)}")
        if torch.is_autocast_enabled(timestep.device.type):
            raise UnsupportedInputError(
                "precompute_modulation: the transformer must be called without torch.autocast, got "
                "a call with it"
            )
        if timestep.is_cuda and torch.cuda.is_current_stream_capturing():
            raise UnsupportedInputError(
                "precompute_modulation: the transformer must not be captured from outside, got a "
                "call on a stream that is capturing"
            )
        conditioning: list[Tensor] = []
        for name in spec.modulated_by:
            value = given.get(name)
            if name in spec.conditioning and not isinstance(value, Tensor):
                fail("precompute_modulation", name, "be a tensor", value)
            values = value.values() if isinstance(value, dict) else [value]
            conditioning += [one for one in values if isinstance(one, Tensor)]
        state = self._contexts.get_state()
        state.begin_call(transformer, given, tuple(conditioning))

    def _end_call(self, *_: Any) -> None:
        self._contexts.get_state().end_call()


def precompute_modulation(
    transformer: nn.Module,
    scheduler: Any,
    *,
    spec: ModelSpec | None = None,
    weights_rest_on: torch.device | str | None = None,
) -> None:
    """Make a transformer compute the adaLN vectors of all steps in the first call of each run.

    By then the scheduler knows the timesteps, and the call shows the conditioning: the transformer
    is called up to its first block for every timestep, and each layer that makes vectors is called
    once, for all steps and samples. Every call of the run, full or partial, under a token cache or
    not, reads its vectors from there; they equal the model's own within rounding. All runs under
    way begin anew.

    A run is as many calls as there are timesteps, with the very same tensors as conditioning, as
    pipelines pass them. Another tensor or a reset begins a new run, and each cache context has its
    own. Weights are read only when a run begins. The first call refuses a timestep that is not the
    scheduler's, for which the host waits once; in later calls such a timestep, or conditioning that
    was written in place, gives NaN: values are compared on the device.

    Until a run ends its vectors take ``T * B * P * D`` elements for T steps of a batch of B, with
    P = 169 and D = 1152 for DiT-XL, 345 and 3072 for FLUX.1-dev: in bfloat16 106 MB for 50 steps of
    one picture. The bytes are logged at debug level.

    Args:
        transformer: a model that is described with adaLN vectors, in evaluation mode.
        scheduler: the pipeline's, or anything that has the ``timesteps`` (T,) when a run begins. A
            pipeline that is given another scheduler later needs this done anew.
        spec: the description of a model that is not described yet.
        weights_rest_on: the device that keeps the weights of the blocks' modulation while no run
            begins, such as ``"cpu"``: they are brought back layer by layer. None: they stay. See
            ``tokencache plan`` for their bytes.

    Raises:
        UnsupportedInputError: the model or a norm of it is not supported; the message names it.
        ValueError: the transformer has precomputed modulation already, or the given scheduler has
            no timesteps.
    """
    found = find_spec("precompute_modulation", transformer, spec)
    if not hasattr(scheduler, "timesteps"):
        fail("precompute_modulation", "scheduler", "have timesteps", type(scheduler).__name__)
    if any(_hook_of(module) is not None for module in transformer.modules()):
        raise ValueError(
            "precompute_modulation: transformer must not have precomputed modulation yet, got one "
            "that has; call remove_precomputed_modulation first"
        )
    model = _Model(transformer, found, weights_rest_on)
    contexts = Contexts(_ModulationState, (model, scheduler))
    hooks: list[tuple[nn.Module, StatefulHook]] = []
    for source in model.sources:
        hooks.append((source.module, _VectorsHook(contexts, source)))
        if source.gives_embedding:
            hooks.append((source.module.emb, _EmbedderHook(contexts, f"{source.key}.emb")))
    hooks += [(one, _EmbedderHook(contexts, path)) for path, one in model.embedders.items()]
    # one of them takes the hooks on the transformer with it
    hooks[0][1].end = _CallHooks(contexts, model, transformer).remove
    for module, hook in hooks:
        _register(module, hook)
    # diffusers lists the hooked parts when a context is first entered, and keeps the list
    HookRegistry.check_if_exists_or_initialize(transformer).invalidate_child_registries_cache()
    # a captured step would go on computing its own
    _begin_anew(transformer)


def remove_precomputed_modulation(transformer: nn.Module) -> None:
    """Let each step compute its own vectors again, and free all others; runs begin anew."""
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    # a captured step would go on reading
    _begin_anew(transformer)
    registry.remove_hook(_HOOK_NAME)


def _begin_anew(transformer: nn.Module) -> None:
    HookRegistry.check_if_exists_or_initialize(transformer).reset_stateful_hooks()
    interceptor = interceptor_of(transformer)
    if interceptor is not None:
        interceptor.session.release_memory()


def _register(module: nn.Module, hook: ModelHook) -> None:
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, _HOOK_NAME)


def read_modulation(norm: nn.Module) -> tuple[Tensor, ...] | None:
    """The vectors (B, D) of a norm in the call under way, or None if the norm has to make them."""
    hook = _hook_of(norm)
    return None if hook is None else hook.read()


def _are_same(tensors: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    return len(tensors) == len(others) and all(map(operator.is_, tensors, others))


def _hook_of(module: nn.Module) -> Any:
    return compat.hooks_of(module).get(_HOOK_NAME)
