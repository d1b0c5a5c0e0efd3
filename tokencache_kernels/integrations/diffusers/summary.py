"""The work of a token cache since it was applied: steps, fresh tokens, bytes, tiers and graphs."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ...blocks import GraphCounts
from ...errors import fail
from .interception import interceptor_of
from .session import Session


@dataclass(frozen=True)
class CacheSummary:
    """The work of a token cache since it was applied.

    Attributes:
        steps: calls by kind: ``full``, ``partial``, ``reused``, ``skipped``.
        fresh_share: the share of the cached modules' tokens that was computed, in [0, 1].
        cache_bytes: the bytes of all buffers of this thread, by their use.
        tiers: ``fused``, or ``as is`` with the reason, by the path of each block.
        graphs: calls that were captured and replayed; None without ``cuda_graphs``.
    """

    steps: Mapping[str, int]
    fresh_share: float
    cache_bytes: Mapping[str, int]
    tiers: Mapping[str, str]
    graphs: GraphCounts | None

    def __str__(self) -> str:
        """A few lines for a person."""
        steps = ", ".join(f"{count} {kind}" for kind, count in self.steps.items() if count)
        fused = sum(tier == "fused" for tier in self.tiers.values())
        lines = [
            f"steps: {steps or 'none'}",
            f"tokens computed: {100 * self.fresh_share:.1f} % of those of the cached modules",
            f"cache: {sum(self.cache_bytes.values()) / 2**20:.1f} MiB",
            f"blocks: {fused} fused, {len(self.tiers) - fused} as they are",
        ]
        reasons = sorted({tier for tier in self.tiers.values() if tier != "fused"})
        lines += [f"  {reason}" for reason in reasons]
        if self.graphs is not None:
            lines.append(
                f"graphs: {self.graphs.captured} captured, {self.graphs.replayed} replayed"
            )
        return "\n".join(lines)


def cache_summary(transformer: nn.Module) -> CacheSummary:
    """Report the work of a transformer's token cache since it was applied.

    Raises:
        ValueError: the transformer has no token cache.
    """
    interceptor = interceptor_of(transformer)
    if interceptor is None:
        fail("cache_summary", "transformer", "have a token cache", "one without")
    session: Session = interceptor.session
    statistics = session.statistics
    total: dict[str, int] = {}
    for _, run in session.passes():
        for use, size in run.runner.count_bytes().items():
            total[use] = total.get(use, 0) + size
    tiers = {}
    for stack, layer, block in session.binding.blocks(transformer):
        refusal = session.find_refusal(stack, layer, block)
        tiers[f"{stack.path}.{layer}"] = "fused" if refusal is None else f"as is: {refusal}"
    return CacheSummary(
        dict(statistics.steps),
        statistics.fresh / statistics.tokens if statistics.tokens else 0.0,
        total,
        tiers,
        None if session.graphs is None else session.graphs.counts,
    )
