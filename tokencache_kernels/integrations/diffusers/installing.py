"""Putting the answers of the cache on a transformer's modules, and taking them off."""

from typing import Any

from torch import nn

from ...models import spec
from .binding import resolve
from .block_answer import BlockAnswer
from .interception import intercept, interceptor_of, release
from .module_answers import (
    JointAttentionAnswer,
    LayerHook,
    ModuleAnswer,
    ParallelAttentionAnswer,
    ParallelInHook,
    ParallelOutHook,
    RowsAnswer,
    SelfAttentionAnswer,
)
from .session import Session

_KINDS: dict[type, type[ModuleAnswer]] = {
    spec.Mlp: RowsAnswer,
    spec.CrossAttention: RowsAnswer,
    spec.SelfAttention: SelfAttentionAnswer,
    spec.JointAttention: JointAttentionAnswer,
    spec.Parallel: ParallelAttentionAnswer,
}


def install(transformer: Any, session: Session) -> None:
    """Intercept all described modules; a module that has been replaced since is found again."""
    for stack, layer, block in session.binding.blocks(transformer):
        if not _belongs(block, session):
            intercept(block, BlockAnswer(session, stack, layer))
        for part in session.binding.parts[stack.path][layer]:
            path = part.attention if isinstance(part, spec.Parallel) else part.module
            module = resolve(block, path)
            if not _belongs(module, session):
                # a wrapper of the former method, which is called as before
                for inner in module.modules():
                    if inner is not module and _belongs(inner, session):
                        release(inner)
                intercept(module, _KINDS[type(part)](session, stack, layer, part))
            if isinstance(part, spec.Parallel):
                _put_hook(resolve(block, part.fc1), ParallelInHook(session, stack, layer, part))
                _put_hook(resolve(block, part.fc2), ParallelOutHook(session, stack, layer, part))


def _put_hook(layer: nn.Module, hook: LayerHook) -> None:
    """Put a hook on a layer; LoRA wraps layers, and the one inside loses its hook."""
    if any(one.session is hook.session for one in _layer_hooks(layer)):
        return
    for inner in layer.modules():
        _drop_hooks(inner)
    hook.register(layer)


def _layer_hooks(module: nn.Module) -> list[LayerHook]:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return [owner for owner in owners if isinstance(owner, LayerHook)]


def _drop_hooks(module: nn.Module) -> None:
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), LayerHook):
                del hooks[key]


def uninstall(transformer: nn.Module) -> None:
    """Give all modules their own classes back."""
    for module in transformer.modules():
        release(module)
        _drop_hooks(module)


def _belongs(module: nn.Module, session: Session) -> bool:
    interceptor = interceptor_of(module)
    return interceptor is not None and interceptor.session is session
