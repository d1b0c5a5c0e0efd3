"""What a block is made of: gated branches that are computed, recomputed in part, or reused."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..policies import Action, Site
from .mlp import Mlp
from .runner import Runner
from .stream import Modulation, ResidualStream


class SubLayer(Protocol):
    """One branch of a block: ``x += gate * branch(x)``, with the gate (B, D) of the current step.

    Its output is cached after the output projection and before the gate.
    """

    @property
    def site(self) -> Site:
        """Where its output is cached."""

    @property
    def gate(self) -> Tensor | None:
        """(B, D), or None for 1."""

    def compute(self, stream: ResidualStream) -> Tensor:
        """The branch's output (B, N, D) for all tokens of the stream."""

    def recompute_(
        self, cache: Tensor, stream: ResidualStream, indices: Tensor, positions: Tensor
    ) -> None:
        """Write the output of the tokens at ``indices`` into ``cache`` (B, N, D)."""


def run_sub_layer(stream: ResidualStream, runner: Runner, sub_layer: SubLayer) -> None:
    """Do what the policy says at this site; the gated output becomes a branch of the stream."""
    stream.add(bring_up_to_date(stream, runner, sub_layer), sub_layer.gate)


def bring_up_to_date(stream: ResidualStream, runner: Runner, sub_layer: SubLayer) -> Tensor:
    """Do what the policy says at this site; return the output, which nothing is added to yet."""
    site = sub_layer.site
    action = runner.action(site)
    if action is Action.FULL:
        output = sub_layer.compute(stream)
        runner.remember(site, output)
    else:
        output = runner.features.load(site, like=stream.hidden_states)
    if action is Action.PARTIAL:
        sub_layer.recompute_(output, stream, *runner.selection(site))
    return output


@dataclass(frozen=True)
class MlpLayer:
    """``gate * mlp(modulate(x))``: three launches when recomputed in part.

    Source:
        ToCa's partial MLP (arXiv:2410.05317): row pass, first layer, second layer with its scatter.
    """

    site: Site
    gate: Tensor
    modulation: Modulation
    mlp: Mlp
    backend: str = "auto"

    def compute(self, stream: ResidualStream) -> Tensor:
        """All tokens; see ``SubLayer``."""
        return self.mlp.module(stream.modulate(self.modulation))

    def recompute_(
        self, cache: Tensor, stream: ResidualStream, indices: Tensor, positions: Tensor
    ) -> None:
        """The tokens at ``indices``; see ``SubLayer``."""
        packed = stream.take_rows(indices, positions, self.modulation)
        self.mlp.recompute_(cache, indices, packed, self.backend)


@dataclass(frozen=True)
class WholeLayer:
    """``gate * module(modulate(x))`` for all tokens or none, as ToCa treats self-attention."""

    site: Site
    gate: Tensor | None
    modulation: Modulation
    module: Callable[[Tensor], Tensor]

    def compute(self, stream: ResidualStream) -> Tensor:
        """All tokens; see ``SubLayer``."""
        return self.module(stream.modulate(self.modulation))

    def recompute_(
        self, cache: Tensor, stream: ResidualStream, indices: Tensor, positions: Tensor
    ) -> None:
        """The runner refuses a policy that asks for it: its lane ``is_whole``."""
        raise NotImplementedError
