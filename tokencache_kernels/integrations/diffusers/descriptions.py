"""The description of a transformer: its user's, or the one of its class."""

from torch import nn

from ...errors import UnsupportedInputError
from ...models import SPECS, UNSUPPORTED, ModelSpec
from .interception import class_of

_registered: dict[str, ModelSpec] = {}


def register_model(spec: ModelSpec) -> None:
    """Describe a model class to ``apply_token_cache``, also one that is described already."""
    _registered[spec.transformer] = spec


def find_spec(caller: str, transformer: nn.Module, spec: ModelSpec | None) -> ModelSpec:
    """Find the description of a transformer.

    Raises:
        UnsupportedInputError: there is none, or models of this class cannot be cached by token.
    """
    if spec is not None:
        return spec
    name = class_of(transformer).__name__
    found = _registered.get(name) or SPECS.get(name)
    if found is None and name in UNSUPPORTED:
        raise UnsupportedInputError(
            f"{caller}: {name} cannot be cached by token: {UNSUPPORTED[name]}"
        )
    if found is None:
        raise UnsupportedInputError(
            f"{caller}: transformer must be one of {', '.join({**SPECS, **_registered})}, or be "
            f"described by spec=ModelSpec(...), got {name}"
        )
    return found
