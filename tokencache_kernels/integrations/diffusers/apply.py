"""Attach a policy to a transformer through diffusers' own hook registry."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.hooks import HookRegistry
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch import nn

from ...blocks import CudaCapture
from ...errors import UnsupportedInputError
from ...ops._checks import fail
from ...policies import Policy
from . import dit, flux, pixart
from .graphs import GRAPH_HOOK_NAME, attach_graphs, check_transformer
from .hooks import HOOK_NAME, announce_hooks

# the model classes supported, by name, and what attaches a policy to each
_SUPPORTED = {
    "DiTTransformer2DModel": dit,
    "FluxTransformer2DModel": flux,
    "PixArtTransformer2DModel": pixart,
}


def apply_token_cache(
    transformer: nn.Module, config: Policy, *, backend: str = "auto", cuda_graphs: bool = False
) -> None:
    """Make a diffusers transformer follow a token-caching policy from its next call on.

    Full steps run the model's own code, with our attention where a later step selects by the
    attention that tokens receive; partial steps recompute the MLP (on PixArt also the
    cross-attention, and on DiT the self-attention where the policy wants it) of the selected tokens
    through ``tokencache_kernels.ops`` and reuse everything else. Steps are counted per cache
    context (``token_cache_context``); after ``config.num_inference_steps`` calls a new run begins.
    A deep copy of the transformer runs as the original, with its weights, until its own cache is
    removed.

    Args:
        transformer: a ``DiTTransformer2DModel``, ``FluxTransformer2DModel`` or
            ``PixArtTransformer2DModel``, in any float dtype, on any device.
        config: a policy, such as ``ToCaConfig.preset("dit-xl-ddim50")``.
        backend: the backend of all ops; see ``ops.gather_rows``.
        cuda_graphs: whether to capture each kind of step as a CUDA graph when it comes for the
            second time, and to replay it from then on, also in later runs: the same bits with
            hardly any work on the host. In a replayed step no Python of the model runs, hooks of
            others included; see ``count_graph_steps``.

    Raises:
        UnsupportedInputError: the model or a part of it is not supported, or, also in a later call,
            cannot be captured; the message names it.
        ValueError: the transformer already has a token cache, or the policy was trained for a
            model of another depth.

    Source:
        ToCa (arXiv:2410.05317).
    """
    adapter = _SUPPORTED.get(type(transformer).__name__)
    if adapter is None:
        raise UnsupportedInputError(
            f"apply_token_cache: transformer must be one of {', '.join(_SUPPORTED)}, got "
            f"{type(transformer).__name__}"
        )
    if _is_applied(transformer):
        raise ValueError(
            "apply_token_cache: transformer must not have a token cache yet, got one that has; "
            "call remove_token_cache first"
        )
    blocks: Any = transformer.transformer_blocks
    # only what was trained has a depth
    depth = getattr(config, "num_layers", len(blocks))
    if depth != len(blocks):
        fail("apply_token_cache", "config", f"be for {len(blocks)} blocks", f"one for {depth}")
    capture = CudaCapture() if cuda_graphs else None
    if capture is not None:
        check_transformer(transformer)
    contexts = adapter.attach(transformer, config, backend)
    if capture is not None:
        predictor = getattr(config, "predictor", None)
        models = [transformer] if predictor is None else [transformer, predictor]
        attach_graphs(transformer, contexts, models, capture)
    announce_hooks(transformer)


def remove_token_cache(transformer: nn.Module) -> None:
    """Take the policy off again and free its caches; without one this does nothing."""
    for name in (GRAPH_HOOK_NAME, HOOK_NAME):
        HookRegistry.check_if_exists_or_initialize(transformer).remove_hook(name)


def reset_token_cache(transformer: nn.Module) -> None:
    """Forget all features and captured steps and begin a new run, in every cache context.

    Needed only after a run that was broken off: a run that reaches its last step ends by itself.
    """
    HookRegistry.check_if_exists_or_initialize(transformer).reset_stateful_hooks(recurse=True)


@contextmanager
def token_cache_context(transformer: nn.Module, name: str) -> Iterator[None]:
    """Name the caller of the forward passes inside, such as ``"cond"`` or ``"uncond"``.

    Each name has its own caches and its own count of steps. Where the model has diffusers'
    ``cache_context``, that does the same.
    """
    _set_cache_context(transformer, CacheContext(name))
    try:
        yield
    finally:
        _set_cache_context(transformer, None)


def _is_applied(transformer: nn.Module) -> bool:
    registries = (getattr(module, "_diffusers_hook", None) for module in transformer.modules())
    return any(HOOK_NAME in registry.hooks for registry in registries if registry is not None)
