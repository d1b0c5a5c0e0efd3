"""The parts of a block: gated branches that are computed, recomputed in part, or reused."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .. import ops
from ..policies import Action, Site
from .attention import SelfAttention
from .mlp import Mlp
from .runner import Runner
from .stream import Modulation, ResidualStream


class SubLayer(Protocol):
    """One branch of a block: ``x += gate * norm(branch(x))``, with the gate of the current step.

    Its output is cached after the output projection, before the norm and the gate.
    """

    @property
    def site(self) -> Site:
        """The buffer of its cached output."""

    @property
    def gate(self) -> Tensor | None:
        """(B, D), or of another grain, see ``Modulation``; None for 1."""

    @property
    def post_norm(self) -> ops.RowNorm | None:
        """The norm of its output, a root mean square; None: there is none."""

    def compute(self, stream: ResidualStream) -> Tensor:
        """The branch's output (B, N, D) for all tokens of the stream."""

    def recompute_(
        self, cache: Tensor, stream: ResidualStream, indices: Tensor, positions: Tensor
    ) -> None:
        """Write the output of the tokens at ``indices`` into ``cache`` (B, N, D)."""


def run_sub_layer(stream: ResidualStream, runner: Runner, sub_layer: SubLayer) -> None:
    """Follow the policy at this site; the gated output becomes a branch of the stream."""
    output = bring_up_to_date(stream, runner, sub_layer)
    add_output(stream, runner, sub_layer.site, output, sub_layer.gate, sub_layer.post_norm)


def add_output(
    stream: ResidualStream,
    runner: Runner,
    site: Site,
    output: Tensor,
    gate: Tensor | None,
    norm: ops.RowNorm | None = None,
    feature: Site | None = None,
) -> None:
    """Add a site's output, and the forecast change of a cached one since it was stored.

    ``feature`` names one of several outputs of a site; see ``Runner.remember``.
    """
    differences: list[tuple[Tensor, float]] = []
    if runner.action(site) is not Action.FULL:
        differences = runner.differences(site, feature)
    B, _, D = output.shape
    if norm is not None and differences:
        # the norm is of their sum
        changes, factors = zip(*differences, strict=True)
        gates = [output.new_full((B, D), factor) for factor in factors]
        output, differences = ops.add_branches(output, changes, gates, backend=runner.backend), []
    stream.add(output, gate, norm)
    for difference, factor in differences:
        stream.add(difference, output.new_full((B, D), factor) if gate is None else gate * factor)


def bring_up_to_date(stream: ResidualStream, runner: Runner, sub_layer: SubLayer) -> Tensor:
    """Follow the policy at this site; return the output, which is not yet added to anything."""
    site = sub_layer.site
    action = runner.action(site)
    if action is Action.FULL:
        output = sub_layer.compute(stream)
        runner.remember(site, output)
    else:
        output = runner.features.load(site, like=stream.hidden_states)
    if action is Action.PARTIAL:
        indices, positions = runner.selection(site)
        sub_layer.recompute_(output, stream, indices, positions)
        for difference, _ in runner.differences(site):
            # fresh rows are not forecast
            zeros = difference.new_zeros(*indices.shape, difference.shape[2])
            ops.scatter_rows_(difference, indices, zeros, backend=runner.backend)
    return output


@dataclass(frozen=True)
class MlpLayer:
    """``gate * mlp(modulate(x))``: three launches when recomputed in part.

    Source:
        ToCa's partial MLP (arXiv:2410.05317): row pass, first layer, second layer with its scatter.
    """

    site: Site
    gate: Tensor | None
    modulation: Modulation
    mlp: Mlp
    backend: str = "auto"
    post_norm: ops.RowNorm | None = None

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
    post_norm: ops.RowNorm | None = None

    def compute(self, stream: ResidualStream) -> Tensor:
        """All tokens; see ``SubLayer``."""
        return self.module(stream.modulate(self.modulation))

    def recompute_(
        self, cache: Tensor, stream: ResidualStream, indices: Tensor, positions: Tensor
    ) -> None:
        """The runner refuses a policy that asks for it: its lane ``is_whole``."""
        raise NotImplementedError


@dataclass(frozen=True)
class SelfAttentionLayer:
    """``gate * attention(modulate(x))``, for all tokens, some of them, or none.

    Attributes:
        site: see ``SubLayer``; so is the gate.
        gate: (B, D).
        modulation: of the norm before it.
        module: the model's own attention, called for all tokens.
        attention: recomputes some tokens.
        runner: decides the keys of fresh queries, and keeps keys and values if these are cached
            ones.
        post_norm: see ``SubLayer``.

    Source:
        TokenCache (arXiv:2409.18523); see ``SelfAttention`` for the variants.
    """

    site: Site
    gate: Tensor | None
    modulation: Modulation
    module: Callable[[Tensor], Tensor]
    attention: SelfAttention
    runner: Runner
    post_norm: ops.RowNorm | None = None

    def compute(self, stream: ResidualStream) -> Tensor:
        """All tokens; see ``SubLayer``."""
        rows = stream.modulate(self.modulation)
        if not self.runner.keeps_keys(self.site):
            return self.module(rows)
        keys, values = torch.empty_like(rows), torch.empty_like(rows)
        output = self.attention.full_(self._split(keys), self._split(values), rows)
        for site, kept in zip(key_sites(self.site), (keys, values), strict=True):
            self.runner.features.store(site, kept)
        return output

    def recompute_(
        self, cache: Tensor, stream: ResidualStream, indices: Tensor, positions: Tensor
    ) -> None:
        """The tokens at ``indices``; see ``SubLayer``."""
        variant = self.runner.decision(self.site).attention
        if variant == "kv_all":
            self.attention.kv_all_(cache, indices, stream.modulate(self.modulation))
            return
        packed = stream.take_rows(indices, positions, self.modulation)
        if variant == "sel_only":
            self.attention.sel_only_(cache, indices, packed)
            return
        keys, values = (
            self._split(self.runner.features.load(site, like=cache))
            for site in key_sites(self.site)
        )
        self.attention.kv_cache_(cache, keys, values, indices, packed)

    def _split(self, rows: Tensor) -> Tensor:
        """View (B, N, D) as (B, N, H, E)."""
        return rows.unflatten(-1, (self.attention.num_heads, self.attention.head_dim))


def key_sites(site: Site) -> tuple[Site, Site]:
    """The buffers of a self-attention's cached keys and values, (B, N, D) each."""
    return replace(site, module="key"), replace(site, module="value")
