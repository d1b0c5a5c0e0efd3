"""Every exception that the package raises on purpose, besides Python's own; and its sentence."""

from typing import NoReturn


class TokenCacheError(Exception):
    """The base of the exceptions below."""


class BackendUnavailableError(TokenCacheError, RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""


class UnsupportedInputError(TokenCacheError, NotImplementedError):
    """The input is valid but not supported; the message names the alternatives."""


class CacheMissError(TokenCacheError, LookupError):
    """A cached feature was asked for before a full step had stored it."""


class DivergedError(TokenCacheError, ArithmeticError):
    """A training step gave a loss or a gradient that is not finite; nothing was saved of it."""


def fail(op: str, name: str, wanted: str, got: object) -> NoReturn:
    """Raise ``<op>: <name> must <wanted>, got <got>``, the sentence for every bad argument."""
    raise ValueError(f"{op}: {name} must {wanted}, got {got}")
