"""Put a token-caching policy on a transformer, take it off, and tell it about runs."""

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

from torch import nn

from ...backends.native.linear import drop_packed_weights
from ...blocks import CudaCapture
from ...errors import UnsupportedInputError, fail
from ...models import ModelSpec
from ...policies import Policy, StepTable, TokenSteps
from ..step_carrier import (
    apply_step_table,
    has_step_table,
    remove_step_table,
    reset_step_table,
)
from . import compat
from .binding import Binding, bind
from .captured_steps import Graphs, check_transformer
from .descriptions import find_spec
from .installing import install, uninstall
from .interception import intercept_root, interceptor_of
from .session import Options, Session
from .token_steps import (
    apply_token_steps,
    has_token_steps,
    remove_token_steps,
    reset_token_steps,
)
from .transformer_answer import TransformerAnswer


def apply_token_cache(
    model: Any,
    policy: Policy | StepTable | TokenSteps,
    *,
    spec: ModelSpec | None = None,
    scheduler: Any = None,
    steps: Literal["rescale", "exact"] = "rescale",
    tier: Literal["auto", "as_is"] = "auto",
    backend: str = "auto",
    cuda_graphs: bool = False,
) -> None:
    """Make a diffusion transformer follow a token-caching policy from its next call on.

    Full steps run the model's own code, with our attention where a later step selects by the
    attention that tokens receive. In partial steps attention is reused (on DiT recomputed in part
    if the policy wants it), and the MLPs, and cross-attentions, compute the selected tokens alone.

    A run is recognised by its calls: the conditioning, a timestep that does not turn back, the
    cache context (``token_cache_context``), the thread. With a scheduler, the index of a step and
    the number of steps come from its table; otherwise steps are counted within the run.

    Args:
        model: a transformer whose class is described in ``tokencache_kernels.models``, in any
            float dtype, on any device; or a pipeline that has one, with its scheduler.
        policy: a policy, such as ``ToCaConfig.preset("dit-xl-ddim50")``. A ``StepTable`` goes to
            ``apply_step_table``: it needs no description, counts steps, and takes one call a step.
        spec: the description of a model that is not described yet; see ``docs/models.md``.
        scheduler: the pipeline's scheduler, whose ``timesteps`` are set when a run begins.
        steps: whether the policy is rescaled to a sampler that takes another number of steps than
            it was made for (``"rescale"``), or such a run is refused (``"exact"``). The number is
            known only with a scheduler.
        tier: ``"auto"`` composes blocks of fused sub-layers where they are described and plain, and
            runs the model's own code around cached modules elsewhere; ``"as_is"`` always does the
            latter.
        backend: the backend of all ops; see ``ops.gather_rows``.
        cuda_graphs: whether to capture each kind of step as a CUDA graph when it comes for the
            second time, and to replay it from then on, also in later runs: the same bits with
            hardly any work on the host. In a replayed step no Python of the model runs, hooks of
            others included; see ``count_graph_steps``.

    Raises:
        UnsupportedInputError: the model or a part of it is not supported, or, also in a later call,
            cannot be captured; the message names it.
        ValueError: the transformer already has a token cache or another one, or the policy was
            trained for a model of another depth.

    Source:
        ToCa (arXiv:2410.05317).
    """
    if isinstance(model, nn.Module):
        transformers = [model]
    else:
        transformers = _transformers(model)
        if not transformers:
            got = type(model).__name__
            fail("apply_token_cache", "model", "be a transformer or a pipeline with one", got)
        if scheduler is None and hasattr(model, "scheduler"):
            scheduler = _SchedulerOf(weakref.ref(model))
    if isinstance(policy, StepTable):
        if cuda_graphs:
            fail("apply_token_cache", "cuda_graphs", "be False under a StepTable", cuda_graphs)
        for transformer in transformers:
            _check_free(transformer)
            apply_step_table(transformer, policy)
        return
    if isinstance(policy, TokenSteps):
        if cuda_graphs:
            fail("apply_token_cache", "cuda_graphs", "be False under TokenSteps", cuda_graphs)
        bindings = [
            bind(find_spec("apply_token_cache", transformer, spec), transformer)
            for transformer in transformers
        ]
        for transformer, binding in zip(transformers, bindings, strict=True):
            _check_free(transformer)
            table = scheduler() if isinstance(scheduler, _SchedulerOf) else scheduler
            apply_token_steps(transformer, policy, binding, scheduler=table, backend=backend)
        return
    options = Options(backend, tier, steps)
    # every check before the first change
    sessions = [
        _make_session(transformer, policy, spec, scheduler, options, cuda_graphs)
        for transformer in transformers
    ]
    for transformer, session in zip(transformers, sessions, strict=True):
        install(transformer, session)
        intercept_root(transformer, TransformerAnswer(session))


def _make_session(
    transformer: nn.Module,
    policy: Policy,
    spec: ModelSpec | None,
    scheduler: Any,
    options: Options,
    cuda_graphs: bool,
) -> Session:
    """Check that a policy fits a transformer, and bring them together."""
    binding = bind(find_spec("apply_token_cache", transformer, spec), transformer)
    _check_free(transformer)
    compat.refuse_shards(transformer)
    _check_policy(policy, binding)
    session = Session(transformer, binding, policy, options, scheduler)
    if cuda_graphs:
        capture = CudaCapture()
        check_transformer(transformer)
        predictor = [] if policy.predictor is None else [policy.predictor]
        session.graphs = Graphs([transformer, *predictor], capture)
    return session


def _check_free(transformer: nn.Module) -> None:
    """Refuse a transformer that has a cache."""
    if (
        interceptor_of(transformer) is not None
        or has_step_table(transformer)
        or has_token_steps(transformer)
    ):
        raise ValueError(
            "apply_token_cache: transformer must not have a token cache yet, got one that has; "
            "call remove_token_cache first"
        )
    other = compat.find_other_cache(transformer)
    if other is not None:
        fail("apply_token_cache", "transformer", "have no other cache", other)


class _SchedulerOf:
    """The scheduler that a pipeline has at the moment."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline

    def __call__(self) -> Any:
        return getattr(self._pipeline(), "scheduler", None)

    def __reduce__(self) -> Any:
        return _no_scheduler, ()


def _no_scheduler() -> None:
    return None


def _has(pipeline: Any, name: str) -> bool:
    return isinstance(getattr(pipeline, name, None), nn.Module)


def _check_policy(policy: Policy, binding: Binding) -> None:
    """Refuse a policy that was trained for another model, or whose scores the model cannot give."""
    depth = binding.num_layers
    if policy.num_layers is not None and policy.num_layers != depth:
        fail(
            "apply_token_cache", "policy", f"be for {depth} blocks", f"one for {policy.num_layers}"
        )
    known = ["attention_received", "value_norm", "key_norm", "none"]
    if binding.has_cross_attention:
        known.insert(0, "attention_entropy")
    if policy.predictor is not None:
        known = ["predicted"]
    base_score = policy.selector.base_score
    if base_score not in known:
        has = "with" if binding.has_cross_attention else "without"
        raise UnsupportedInputError(
            f"apply_token_cache: the selector's base_score must be one of {', '.join(known)} on a "
            f"model {has} cross-attention, got {base_score!r}"
        )


def remove_token_cache(transformer: Any) -> None:
    """Take the policy off again and free its caches; without one this does nothing."""
    for module in _transformers(transformer):
        remove_step_table(module)
        remove_token_steps(module)
        uninstall(module)
        drop_packed_weights(module)


def reset_token_cache(transformer: Any, *, release_memory: bool = False) -> None:
    """End all runs: the next call begins a new one, in every cache context and thread.

    Needed only where a run cannot be told from the one before: with the same conditioning, and a
    timestep that goes on.

    Args:
        transformer: one with a token cache, or its pipeline.
        release_memory: whether to free all buffers and captured graphs, too.
    """
    for module in _transformers(transformer):
        compat.reset_hooks(module)
        reset_step_table(module)
        reset_token_steps(module)
        interceptor = interceptor_of(module)
        if interceptor is None:
            continue
        interceptor.session.forget_runs()
        if release_memory:
            interceptor.session.release_memory()


def _transformers(model: Any) -> list[nn.Module]:
    if isinstance(model, nn.Module):
        return [model]
    names = ("transformer", "transformer_2", "unet")
    return [getattr(model, name) for name in names if _has(model, name)]


@contextmanager
def token_cache_context(
    transformer: nn.Module,
    name: str,
    *,
    step_index: int | None = None,
    num_inference_steps: int | None = None,
) -> Iterator[None]:
    """Name the caller of the calls inside, such as ``"cond"`` or ``"uncond"``.

    Each name has its own caches and its own run in each thread. Where the model has diffusers'
    ``cache_context``, that does the same.

    Args:
        transformer: with a token cache or without.
        name: of the caller.
        step_index: the place of the calls in their run, if the caller knows it: then no timestep is
            read.
        num_inference_steps: the number of steps of the run; None: as the policy has.
    """
    place = {"step_index": step_index, "num_inference_steps": num_inference_steps}
    interceptor = interceptor_of(transformer)
    context: AbstractContextManager[None]
    with compat.cache_context(transformer, name):
        if interceptor is None:
            yield
            return
        context = interceptor.context(name, **place)
        with context:
            yield
