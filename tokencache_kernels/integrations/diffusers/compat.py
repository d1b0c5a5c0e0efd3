"""Names of other libraries that are not public, in one place."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ...errors import UnsupportedInputError
from .interception import class_of

# our own hook for modulation in advance
MODULATION_HOOK = "tokencache_kernels_modulation"
# diffusers' HookRegistry and accelerate's hook, by the attributes that they leave on a module
_REGISTRY = "_diffusers_hook"
_ACCELERATE = "_hf_hook"
# hooks of other caches, by a part of their names in a registry
_CACHES = (
    "fbc_", "first_block", "faster_cache", "mag_cache", "pyramid_attention", "sea_cache",
    "taylorseer", "text_kv_cache",
)  # fmt: skip


def hooks_of(module: nn.Module) -> dict[str, Any]:
    """diffusers' hooks on a module, by name."""
    registry = getattr(module, _REGISTRY, None)
    return {} if registry is None else dict(registry.hooks)


def accelerate_hook_of(module: nn.Module) -> Any:
    """accelerate's hook on a module, or None."""
    return getattr(module, _ACCELERATE, None)


def is_wrapped(module: nn.Module) -> bool:
    """Tell whether a library has wrapped the module's forward, as offloading does."""
    if accelerate_hook_of(module) is not None:
        return True
    forward = vars(module).get("forward")
    if forward is None or getattr(forward, "__func__", None) is class_of(module).forward:
        # never wrapped, or put back as it was
        return False
    hooks = hooks_of(module)
    return not (hooks and hooks.keys() <= {MODULATION_HOOK})


def is_plain(layer: nn.Module) -> bool:
    """Tell whether a call of the layer is a product with its weight and nothing else.

    LoRA layers are other classes, quantised ones have weights of other classes, and offloading
    wraps the call.
    """
    return (
        class_of(layer) is nn.Linear
        and type(layer.weight) in (nn.Parameter, _Tensor)
        and not is_wrapped(layer)
        and not has_hooks(layer)
    )


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a module has forward hooks other than the cache itself."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not hasattr(getattr(hook, "__self__", None), "session") for hook in hooks)


def find_other_cache(transformer: nn.Module) -> str | None:
    """The name of another cache on the transformer, or None."""
    config = getattr(transformer, "_cache_config", None)
    if config is not None:
        return f"diffusers' {type(config).__name__}"
    for module in transformer.modules():
        for name in hooks_of(module):
            if any(part in name for part in _CACHES):
                return f"diffusers' hook {name}"
    if getattr(transformer, "_is_cached", False):
        return "cache-dit"
    return None


def attention_processor(module: Any) -> str:
    """The class name of an attention's processor."""
    return type(getattr(module, "processor", None)).__name__


def is_compiled(module: nn.Module) -> bool:
    """Tell whether a module is to run compiled."""
    return module._compiled_call_impl is not None


_Tensor = type(nn.Parameter(requires_grad=False).data)


@contextmanager
def cache_context(transformer: nn.Module, name: str) -> Iterator[None]:
    """Name the caller to diffusers' own hooks on a transformer."""
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    _set_cache_context(transformer, CacheContext(name))
    try:
        yield
    finally:
        _set_cache_context(transformer, None)


def reset_hooks(transformer: nn.Module) -> None:
    """Let diffusers' own hooks on a transformer, and ours for modulation, begin anew."""
    registry = getattr(transformer, _REGISTRY, None)
    if registry is not None:
        registry.reset_stateful_hooks(recurse=True)


def refuse_shards(transformer: nn.Module) -> None:
    """Refuse context parallelism: a selection must see all tokens.

    Raises:
        UnsupportedInputError: diffusers has split the tokens of an attention over devices.
    """
    for module in transformer.modules():
        if getattr(getattr(module, "processor", None), "_parallel_config", None) is not None:
            raise UnsupportedInputError(
                "token cache: the transformer must hold all tokens on one device, got one with "
                "context parallelism"
            )
