"""Core types of policies: ``Site``, ``Step``, ``Action``, ``Decision``, ``Policy``."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Literal, Protocol

from ..errors import fail

if TYPE_CHECKING:
    from .carriers import Carrier
    from .predictors import Predictor
    from .selectors import Selector


class Action(Enum):
    """The work of a site in one step."""

    FULL = "full"  # compute every token and store the result
    PARTIAL = "partial"  # recompute the fresh tokens, reuse the others
    REUSE = "reuse"  # take the cached result as it is
    SKIP = "skip"  # of all sites at once: run no block, take the last one's output as it was


@dataclass(frozen=True)
class Site:
    """One cached module of a model.

    Streams: ``"main"`` where there is one; ``"spatial"`` and ``"temporal"`` in video models;
    ``"double"`` and ``"single"`` in FLUX. Modules: ``"attn"`` (self-attention), ``"cross"``
    (cross-attention), ``"mlp"``, and ``"text_mlp"`` for the text tokens of a double block.
    """

    stream: str
    layer: int
    module: str


@dataclass(frozen=True)
class Step:
    """A position in sampling, counting up from 0."""

    index: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.total:
            fail("Step", "index", f"be in [0, total = {self.total})", self.index)

    def counter(self, counts_down: bool) -> int:
        """The step as the published code of a model counts it: up from 0, or down to 0."""
        return self.total - 1 - self.index if counts_down else self.index


# the keys of fresh queries in self-attention: all tokens as they are now, cached keys and values
# refreshed at the fresh tokens, or the fresh tokens alone
AttentionVariant = Literal["kv_all", "kv_cache", "sel_only"]
ATTENTION_VARIANTS: tuple[AttentionVariant, ...] = ("kv_all", "kv_cache", "sel_only")


@dataclass(frozen=True)
class Decision:
    """The action at a site, and the number of fresh tokens of each sample.

    ``attention`` matters at self-attention sites that are computed in part.
    """

    action: Action
    num_fresh: int
    attention: AttentionVariant = "kv_all"


class Policy(Protocol):
    """A caching policy, as the runner asks it."""

    @property
    def num_inference_steps(self) -> int:
        """The number of the sampler's steps."""

    @property
    def selector(self) -> "Selector":
        """The selector of the fresh tokens of a partial step."""

    @property
    def carrier(self) -> "Carrier":
        """The rule for features that are not recomputed; ``REUSE`` keeps the stored value."""

    @property
    def num_layers(self) -> int | None:
        """The depth of the model that the policy was trained for; None: any."""

    @property
    def predictor(self) -> "Predictor | None":
        """The network that scores tokens, if the selector goes by predicted scores."""

    def decide(self, site: Site, step: Step, num_tokens: int) -> Decision:
        """Decide the action at ``site`` in ``step``; its sequence has ``num_tokens``."""


def list_remembered(
    run: Sequence[Action], order: int, reader: Sequence[Action] | None = None
) -> list[int]:
    """List the steps whose output a site must store, given its actions in a run.

    They are the last ``1 + order`` full steps before every reuse, partial or not, with the order of
    a carrier. An output that goes into another site alone is reused where that site, the
    ``reader``, computes some token.
    """
    remembered: set[int] = set()
    full: list[int] = []
    for index, (action, reading) in enumerate(zip(run, reader or run, strict=True)):
        if action is Action.FULL:
            full.append(index)
        elif action is not Action.SKIP and (reader is None or reading is not Action.REUSE):
            remembered.update(full[-1 - order :])
    return sorted(remembered)


def round_float32(value: float) -> float:
    """The nearest float32: published schedules and ratios are float32 tensors."""
    return ctypes.c_float(value).value


def count_fresh(fresh_ratio: float, num_tokens: int) -> int:
    """Convert a ratio to a number of tokens: its float32 product with ``num_tokens``, truncated."""
    return int(round_float32(round_float32(fresh_ratio) * num_tokens))
