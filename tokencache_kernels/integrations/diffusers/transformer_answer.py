"""The answers of the cache to the calls of a transformer."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ...errors import UnsupportedInputError
from . import compat
from .arguments import name_arguments
from .installing import install
from .interception import (
    Original,
    eager,
    transparent,
)
from .session import Call, Session


class TransformerAnswer:
    """Begins and ends the calls of a transformer."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def context(self, name: str, **place: Any) -> AbstractContextManager[None]:
        """See ``RootInterceptor``."""
        return self.session.context(name, **place)

    def forget_runs(self) -> None:
        """See ``RootInterceptor``."""
        self.session.forget_runs()

    @transparent
    def call(self, module: Any, original: Original, *arguments: Any, **named: Any) -> Any:
        """Run the transformer's own call inside a call of the cache."""
        given = name_arguments(module, arguments, named)
        with self._calling(module, given):
            return original(*arguments, **named)

    @transparent
    def forward(self, module: Any, own: Original, *arguments: Any, **named: Any) -> Any:
        """Run or replay the transformer's own forward, inside of all hooks."""
        if self.session.call is None:
            # someone calls forward itself
            with self._calling(module, name_arguments(module, arguments, named)):
                return self.forward(module, own, *arguments, **named)
        if self.session.graphs is None:
            return own(*arguments, **named)
        given = name_arguments(module, arguments, named)
        return self.session.graphs.run(module, self.session.call, own, given)

    @contextmanager
    def _calling(self, transformer: Any, given: dict[str, Any]) -> Iterator[Call]:
        with self.session.calling(given) as call:
            self._prepare(transformer, call)
            yield call

    @eager
    def _prepare(self, transformer: Any, call: Call) -> None:
        session, run = self.session, call.run
        session.transformer = transformer
        install(transformer, session)
        if run.runner.begins:
            compat.refuse_shards(transformer)
        spec_ = session.binding.spec
        if session.policy.selector.shares_guidance:
            run.note_latents(call.given.get(spec_.latents))
        if spec_.text_mask is not None:
            run.note_mask(call.given.get(spec_.text_mask))
        if session.binding.has_cross_attention and spec_.conditioning:
            text = spec_.conditioning[0]
            if call.given.get(text) is None:
                raise UnsupportedInputError(
                    f"token cache: {text} must be given to {spec_.transformer}, got None"
                )
