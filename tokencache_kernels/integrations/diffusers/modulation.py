"""Compute the modulation of all steps of a run in its first call, and read it in every call.

The adaLN vectors of a block depend on timestep and conditioning, not on the tokens. Made anew in
each step, they cost a pass over all weights of their layers for one row of each sample.
"""

import inspect
import logging
import operator
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager
from torch import Tensor, nn

from ...cache import FeatureCache
from ...errors import UnsupportedInputError, fail
from . import compat
from .interception import class_of, interceptor_of

logger = logging.getLogger(__name__)

_HOOK_NAME = compat.MODULATION_HOOK
# a division by 1000 may round otherwise on another device, and sigmas are timesteps before it
_SLACK = 4 * torch.finfo(torch.float32).eps
# how many vectors a norm makes of the embedding, by class
_NUM_VECTORS = {"AdaLayerNormZero": 6, "AdaLayerNormZeroSingle": 3, "AdaLayerNormContinuous": 2}


class Contexts(StateManager):  # type: ignore[misc]
    """States by cache context; a call outside any context belongs to one called ``default``."""

    @property
    def context(self) -> CacheContext:
        """The context of the current call."""
        return self._context or CacheContext("default")


class StatefulHook(ModelHook):  # type: ignore[misc]
    """A hook that works on the state of the current cache context."""

    _is_stateful = True

    def __init__(self, contexts: Contexts) -> None:
        super().__init__()
        self._contexts = contexts

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Forget every context."""
        self._contexts.reset()
        return module


class _Model:
    """What modulates a model.

    Attributes:
        conditioning: the transformer's arguments that do, beside ``timestep``; the first one must
            be given.
        embedder: the module that makes the embedding which is read outside the norms.
        norms: the modules that modulate.
    """

    conditioning: tuple[str, ...]

    def __init__(self, embedder: Any, norms: list[Any]) -> None:
        self.embedder = embedder
        self.norms = norms

    def scale_timesteps(self, timesteps: Tensor) -> Tensor:
        """A scheduler's timesteps as pipelines hand them to the model."""
        raise NotImplementedError

    def embed(
        self, dtype: torch.dtype, timestep: Tensor, *conditioning: Tensor
    ) -> Iterator[Tensor]:
        """What each norm makes its vectors of, (R, D); the first is what the embedder makes."""
        raise NotImplementedError


class _DiT(_Model):
    """``DiTTransformer2DModel``: every block has its own embedder.

    The last modulation is a plain layer, which the model's forward goes on calling.
    """

    conditioning = ("class_labels",)

    def __init__(self, transformer: Any) -> None:
        norms = [block.norm1 for block in transformer.transformer_blocks]
        super().__init__(norms[0].emb, norms)

    def scale_timesteps(self, timesteps: Tensor) -> Tensor:
        """See ``_Model``."""
        return timesteps

    def embed(
        self, dtype: torch.dtype, timestep: Tensor, *conditioning: Tensor
    ) -> Iterator[Tensor]:
        """See ``_Model``."""
        for norm in self.norms:
            yield norm.emb(timestep, *conditioning, hidden_dtype=dtype)


class _Flux(_Model):
    """``FluxTransformer2DModel``: all norms share one embedding."""

    conditioning = ("pooled_projections", "guidance")

    def __init__(self, transformer: Any) -> None:
        doubles, singles = transformer.transformer_blocks, transformer.single_transformer_blocks
        norms = [norm for block in doubles for norm in (block.norm1, block.norm1_context)]
        norms += [*(block.norm for block in singles), transformer.norm_out]
        super().__init__(transformer.time_text_embed, norms)

    def scale_timesteps(self, timesteps: Tensor) -> Tensor:
        """See ``_Model``."""
        return timesteps / 1000

    def embed(
        self, dtype: torch.dtype, timestep: Tensor, *conditioning: Tensor
    ) -> Iterator[Tensor]:
        """See ``_Model``."""
        pooled_projections, *guidance = conditioning
        # as the model's forward does
        scaled = [value.to(dtype) * 1000 for value in (timestep, *guidance)]
        embedding = self.embedder(*scaled, pooled_projections)
        for _ in self.norms:
            yield embedding


_SUPPORTED: dict[str, type[_DiT] | type[_Flux]] = {
    "DiTTransformer2DModel": _DiT,
    "FluxTransformer2DModel": _Flux,
}


class _ModulationState(BaseState):  # type: ignore[misc]
    """One run of one cache context: the vectors of all its steps, and those of the call under way.

    The row of a call is found on the device, by the values of timestep and conditioning, so that
    the host need not wait; where no row is right, the vectors are NaN. They are copied to where a
    captured graph reads them.
    """

    def __init__(self, model: _Model, columns: list[slice], scheduler: Any) -> None:
        self._model = model
        self._columns = columns
        self._scheduler = scheduler
        self.reset()

    def reset(self) -> None:
        """Begin a new run."""
        self._inputs: tuple[Tensor, ...] = ()
        self._sizes: tuple[int, torch.dtype] | None = None
        self._table: Tensor | None = None
        self._vectors = FeatureCache()
        self._is_serving = False

    def begin_call(
        self, hidden_states: Tensor, timestep: Tensor, conditioning: tuple[Tensor, ...]
    ) -> None:
        """Copy the vectors of the call from the table, which the first call of a run makes."""
        # an interrupt leaves a call without an end
        self._is_serving = False
        timestep = timestep.expand(len(hidden_states))
        timesteps = self._scheduler.timesteps
        if not isinstance(timesteps, Tensor):
            wanted = "have its timesteps, a tensor, when a run begins"
            fail("precompute_modulation", "scheduler", wanted, type(timesteps).__name__)
        inputs = timesteps, *conditioning
        sizes = len(hidden_states), hidden_states.dtype
        if self._table is None or sizes != self._sizes or not _are_same(inputs, self._inputs):
            self._table = None
            self._table = self._make_table(timestep, conditioning, hidden_states.dtype)
            self._inputs, self._sizes, self._num_calls = inputs, sizes, 0
        self._vectors.store("call", self._table[self._find_rows(timestep, conditioning)])
        self._num_calls += 1
        self._is_serving = True

    def end_call(self) -> None:
        """Serve nobody until the next call; the last one of a run frees the table."""
        self._is_serving = False
        if self._table is not None and self._num_calls == len(self._times):
            self._table = None

    def read(self, columns: slice) -> tuple[Tensor, ...] | None:
        """Vectors of the call under way, (B, D) each; None outside a call."""
        return self._vectors.load("call")[:, columns].unbind(1) if self._is_serving else None

    def _make_table(
        self, timestep: Tensor, conditioning: tuple[Tensor, ...], dtype: torch.dtype
    ) -> Tensor:
        """All vectors of T * B rows, step by step, and a row of NaN: (T * B + 1, P, D)."""
        if self._model.embedder.training:
            fail("precompute_modulation", "transformer", "be in evaluation mode", "training mode")
        self._times = self._model.scale_timesteps(self._scheduler.timesteps.to(timestep))
        # the one time in a run that the host waits; later calls are told by NaN
        if not self._find_steps(timestep).any(0).all():
            wanted = "be the scheduler's, as diffusers' pipelines hand them over"
            fail("precompute_modulation", "timestep", wanted, timestep.tolist())
        self._conditioning = [given.clone() for given in conditioning]
        T, B = len(self._times), len(timestep)
        self._rows = torch.arange(T * B, device=timestep.device).view(T, B)
        rows = [
            given.expand(T, B, *given.shape[2:]).flatten(0, 1)
            for given in (self._times[:, None], *(given[None] for given in conditioning))
        ]
        table = _compute_vectors(self._model, self._columns, dtype, rows)
        logger.debug("precompute_modulation: %d steps, batch %d: %d bytes", T, B, table.nbytes)
        return table

    def _find_steps(self, timestep: Tensor) -> Tensor:
        """Which steps of the scheduler have the timestep of each sample, (T, B)."""
        times = self._times[:, None]
        return (times - timestep).abs() <= _SLACK * times.abs()

    def _find_rows(self, timestep: Tensor, conditioning: tuple[Tensor, ...]) -> Tensor:
        """The row of each sample in the table, (B,)."""
        is_right = self._find_steps(timestep)
        for given, known in zip(conditioning, self._conditioning, strict=True):
            is_right = is_right & (given == known).reshape(len(given), -1).all(1)
        return torch.where(is_right, self._rows, self._rows.numel()).amin(0)


class _VectorsHook(StatefulHook):
    """Knows which of the vectors are those of its module."""

    def __init__(self, contexts: Contexts, columns: slice) -> None:
        super().__init__(contexts)
        self._columns = columns

    def read(self) -> tuple[Tensor, ...] | None:
        """The module's vectors in the call under way, (B, D) each; None outside a call."""
        vectors: tuple[Tensor, ...] | None = self._contexts.get_state().read(self._columns)
        return vectors


class _NormHook(_VectorsHook):
    """Modulates by the vectors read, and makes none."""

    def new_forward(self, norm: Any, x: Tensor, *arguments: Any, **named: Any) -> Any:
        """What the norm returns: the tokens modulated, with the vectors that its block uses."""
        vectors = self.read()
        if vectors is None:
            return self.fn_ref.original_forward(x, *arguments, **named)
        if type(norm).__name__ == "AdaLayerNormContinuous":
            scale, shift = vectors
            return _modulate(norm, x, shift, scale)
        shift, scale, *others = vectors
        return _modulate(norm, x, shift, scale), *others


class _CallHooks:
    """Begins and ends the calls of a transformer.

    They are hooks of torch's: these run outside of whatever stands in for the forward, such as a
    captured graph, and end a call that breaks off.
    """

    def __init__(
        self, contexts: Contexts, conditioning: tuple[str, ...], transformer: nn.Module
    ) -> None:
        self._contexts = contexts
        self._conditioning = conditioning
        self._signature = inspect.signature(type(transformer).forward)
        self._handles = (
            transformer.register_forward_pre_hook(self._begin_call, with_kwargs=True),
            transformer.register_forward_hook(self._end_call, always_call=True),
        )

    def remove(self) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()

    def _begin_call(
        self, transformer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        given = self._signature.bind(transformer, *arguments, **named).arguments
        hidden_states = given["hidden_states"]
        if torch.is_autocast_enabled(hidden_states.device.type):
            raise UnsupportedInputError(
                "precompute_modulation: the transformer must be called without torch.autocast, got "
                "a call with it"
            )
        if hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
            raise UnsupportedInputError(
                "precompute_modulation: the transformer must not be captured from outside, got a "
                "call on a stream that is capturing"
            )
        for name in ("timestep", self._conditioning[0]):
            if not isinstance(given.get(name), Tensor):
                fail("precompute_modulation", name, "be a tensor", given.get(name))
        values = [given.get(name) for name in self._conditioning]
        conditioning = tuple(value for value in values if value is not None)
        self._contexts.get_state().begin_call(hidden_states, given["timestep"], conditioning)

    def _end_call(self, *_: Any) -> None:
        self._contexts.get_state().end_call()


class _EmbedderHook(_VectorsHook):
    """Gives the embedding read; the hooks on the transformer go with it."""

    def __init__(self, contexts: Contexts, columns: slice, call_hooks: _CallHooks) -> None:
        super().__init__(contexts, columns)
        self._call_hooks = call_hooks

    def new_forward(self, embedder: nn.Module, *arguments: Any, **named: Any) -> Any:
        """What the embedder returns, (B, D)."""
        vectors = self.read()
        if vectors is None:
            return self.fn_ref.original_forward(*arguments, **named)
        return vectors[0]

    def deinitalize_hook(self, embedder: nn.Module) -> nn.Module:
        """Called when the hook is removed."""
        self._call_hooks.remove()
        return embedder


def precompute_modulation(transformer: nn.Module, scheduler: Any) -> None:
    """Make a transformer compute the adaLN vectors of all steps in the first call of each run.

    By then the scheduler knows the timesteps, and the call shows the conditioning: each layer that
    makes vectors is called once, for all steps and samples. Every call of the run, full or partial,
    under a token cache or not, reads its vectors from there; they equal the model's own within
    rounding. All runs under way begin anew.

    A run is as many calls as there are timesteps, with the very same tensors as conditioning, as
    pipelines pass them. Another tensor or a reset begins a new run, and each cache context has its
    own. Weights are read only when a run begins. The first call refuses a timestep that is not the
    scheduler's, for which the host waits once; in later calls such a timestep, or conditioning that
    was written in place, gives NaN: values are compared on the device.

    Until a run ends its vectors take ``T * B * P * D`` elements for T steps of a batch of B, with
    P = 169 and D = 1152 for DiT-XL, 345 and 3072 for FLUX.1-dev: in bfloat16 106 MB for 50 steps of
    one picture. The bytes are logged at debug level.

    Args:
        transformer: a ``DiTTransformer2DModel`` or ``FluxTransformer2DModel`` in evaluation mode.
            PixArt has one small layer for all of its blocks, and nothing to save.
        scheduler: the pipeline's, or anything that has the ``timesteps`` (T,) when a run begins.
            DiT is to be called with these, FLUX with ``timesteps / 1000``. A pipeline that is given
            another scheduler later needs this done anew.

    Raises:
        UnsupportedInputError: the model or a norm of it is not supported; the message names it.
        ValueError: the transformer has precomputed modulation already, or what is given as the
            scheduler has no timesteps.
    """
    name = class_of(transformer).__name__
    if name not in _SUPPORTED:
        raise UnsupportedInputError(
            f"precompute_modulation: transformer must be one of {', '.join(_SUPPORTED)}, got {name}"
        )
    if not hasattr(scheduler, "timesteps"):
        fail("precompute_modulation", "scheduler", "have timesteps", type(scheduler).__name__)
    model = _SUPPORTED[name](transformer)
    if _hook_of(model.embedder) is not None:
        raise ValueError(
            "precompute_modulation: transformer must not have precomputed modulation yet, got one "
            "that has; call remove_precomputed_modulation first"
        )
    counts = [1, *(_count_vectors(norm) for norm in model.norms)]
    columns = [slice(*ends) for ends in pairwise(accumulate(counts, initial=0))]
    contexts = Contexts(_ModulationState, (model, columns, scheduler))
    call_hooks = _CallHooks(contexts, model.conditioning, transformer)
    _register(model.embedder, _EmbedderHook(contexts, columns[0], call_hooks))
    for norm, of_norm in zip(model.norms, columns[1:], strict=True):
        _register(norm, _NormHook(contexts, of_norm))
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


def _compute_vectors(
    model: _Model, columns: list[slice], dtype: torch.dtype, rows: list[Tensor]
) -> Tensor:
    """The vectors of all rows, those of the embedder first, and a row of NaN."""
    table: Tensor | None = None
    embeddings = model.embed(dtype, *rows)
    for norm, of_norm, embedding in zip(model.norms, columns[1:], embeddings, strict=True):
        if table is None:
            R, D = embedding.shape
            table = embedding.new_full((R + 1, columns[-1].stop, D), torch.nan)
            table[:-1, 0] = embedding
        vectors = norm.linear(norm.silu(embedding))
        if vectors.dtype != table.dtype:
            fail(
                "precompute_modulation", "transformer", f"modulate in {table.dtype}", vectors.dtype
            )
        table[:-1, of_norm] = vectors.unflatten(1, (-1, D))
    assert table is not None, "a model has norms"
    if table.requires_grad:
        wanted = "be called without gradients, as under torch.no_grad()"
        fail("precompute_modulation", "transformer", wanted, "a call with gradients")
    return table


def _count_vectors(norm: nn.Module) -> int:
    name = type(norm).__name__
    if name not in _NUM_VECTORS:
        raise UnsupportedInputError(
            f"precompute_modulation: transformer must modulate by {', '.join(_NUM_VECTORS)}, got "
            f"{name}"
        )
    return _NUM_VECTORS[name]


def _modulate(norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """As the model's norms do, all tokens of a sample alike."""
    modulated: Tensor = norm.norm(x) * (1 + scale[:, None]) + shift[:, None]
    return modulated


def _are_same(tensors: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    return len(tensors) == len(others) and all(map(operator.is_, tensors, others))


def _hook_of(module: nn.Module) -> Any:
    return compat.hooks_of(module).get(_HOOK_NAME)
