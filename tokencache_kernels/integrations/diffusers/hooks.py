"""What the adapters of all models share: states by cache context, and taps on sub-layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager
from torch import Tensor, nn

from ...blocks import Mlp, ResidualStream, Runner
from ...errors import UnsupportedInputError
from ...policies import Policy, Site

HOOK_NAME = "tokencache_kernels"
_ACTIVATIONS = {"none": "gelu", "tanh": "gelu_tanh"}


class ContextState(BaseState):  # type: ignore[misc]
    """What one cache context holds: its run, and what the step under way has left so far.

    Attributes:
        runner: decides and remembers.
        grid: (H, W), the tokens of the image under way, or None.
        streams: the residual streams of the step under way, by name.
        is_own_code: whether a block's own code is running, for which modules are tapped.
        taps: what one module lends to another within a layer, by name.
    """

    def __init__(self, policy: Policy, backend: str) -> None:
        self._arguments = (policy, backend)
        self.reset()

    def reset(self) -> None:
        """Begin a new run."""
        self.runner = Runner(*self._arguments)
        self.grid: tuple[int, int] | None = None
        self.streams: dict[str, ResidualStream] = {}
        self.taps: dict[str, Tensor] = {}
        self.is_own_code = False

    @contextmanager
    def own_code(self) -> Iterator[None]:
        """A block runs its own code inside: all its sites are full, and its modules are tapped."""
        self.is_own_code = True
        try:
            yield
        finally:
            self.is_own_code = False

    def stream(self, name: str, hidden_states: Tensor) -> ResidualStream:
        """The stream under way, or a new one that begins with ``hidden_states``."""
        if name not in self.streams:
            self.streams[name] = ResidualStream(hidden_states, self._arguments[1])
        return self.streams[name]

    def leave_stream(self, name: str, hidden_states: Tensor) -> Tensor:
        """End the stream under way, if there is one, and return the hidden states."""
        stream = self.streams.pop(name, None)
        return hidden_states if stream is None else stream.flush()


class Contexts(StateManager):  # type: ignore[misc]
    """States by cache context; a call outside any context belongs to one called ``default``."""

    @property
    def context(self) -> CacheContext:
        """The context of the call under way."""
        return self._context or CacheContext("default")


class StatefulHook(ModelHook):  # type: ignore[misc]
    """A hook that works on the state of the cache context under way."""

    _is_stateful = True

    def __init__(self, contexts: Contexts) -> None:
        super().__init__()
        self._contexts = contexts

    @property
    def state(self) -> ContextState:
        """The state of the cache context under way."""
        state: ContextState = self._contexts.get_state()
        return state

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Forget every context."""
        self._contexts.reset()
        return module


class GridHook(StatefulHook):
    """Notes how the tokens of the image lie, from the latents that the transformer is given."""

    def __init__(self, contexts: Contexts, patch_size: int) -> None:
        super().__init__(contexts)
        self._patch_size = patch_size

    def pre_forward(
        self, module: nn.Module, hidden_states: Tensor, *arguments: Any, **named: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The latents are (B, C, H, W)."""
        height, width = hidden_states.shape[-2:]
        self.state.grid = (height // self._patch_size, width // self._patch_size)
        return (hidden_states, *arguments), named


class FeatureHook(StatefulHook):
    """Copies the output of a sub-layer into the cache where a later step will reuse it."""

    def __init__(self, contexts: Contexts, site: Site) -> None:
        super().__init__(contexts)
        self._site = site

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        """Keep what the block's own code computed."""
        if self.state.is_own_code:
            self.state.runner.remember(self._site, output)
        return output


class TapHook(StatefulHook):
    """Lends a module's output to a hook that runs later in the layer."""

    def __init__(self, contexts: Contexts, name: str) -> None:
        super().__init__(contexts)
        self._name = name

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        """Keep it until it is popped."""
        if self.state.is_own_code:
            self.state.taps[self._name] = output
        return output


def register(module: nn.Module, hook: ModelHook) -> None:
    """Put our hook into the module's registry."""
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK_NAME)


def expect_part(wanted: str, got: object, is_fine: bool) -> None:
    """Refuse a block with a part that a partial step would get wrong."""
    if not is_fine:
        raise UnsupportedInputError(
            f"apply_token_cache: transformer blocks must have {wanted}, got {got}"
        )


def mlp_of(feed_forward: Any) -> Mlp:
    """Take the fused path where the MLP is two plain linear layers around a GELU."""
    first, *_, last = feed_forward.net
    layers = (getattr(first, "proj", None), last)
    is_plain = type(first).__name__ == "GELU" and all(
        type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks
        for layer in layers
    )
    if not is_plain or feed_forward.training:
        return Mlp(feed_forward)
    return Mlp(feed_forward, first.proj, last, _ACTIVATIONS[first.approximate])
