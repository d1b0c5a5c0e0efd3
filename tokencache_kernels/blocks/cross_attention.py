"""Cross-attention of the image to the text: fresh queries over all of the text's keys."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from .. import ops
from ..policies import Site
from .runner import Runner
from .stream import ResidualStream


@dataclass(frozen=True)
class CrossAttentionLayer:
    """``out(attention(query(x), key, value))``: no norm before it, no gate behind it.

    Recomputed in part it is a row gather inside the query projection, attention, and the output
    projection with its scatter; each attention also gives the scores of its tokens.

    Attributes:
        site: where the output is cached.
        runner: keeps the scores.
        scored_site: a site whose tokens are selected by the entropy of their row of the
            head-averaged map; None: it is not taken.
        query: the query projection, or a module that stands for one.
        out: the output projection.
        is_fused: whether both are a product with their weight and nothing else; otherwise they are
            called on packed rows (LoRA, quantised).
        project_text: gives the text's key and value, (B, M, H, E) each.
        key_lengths: (B,) int32, how many text tokens each sample has, or None for M.
        softmax_scale: the factor before the softmax.
        backend: the backend of all ops.

    Source:
        ToCa's partial cross-attention on PixArt (arXiv:2410.05317).
    """

    site: Site
    runner: Runner
    scored_site: Site | None
    query: nn.Linear
    out: nn.Linear
    is_fused: bool
    project_text: Callable[[], tuple[Tensor, Tensor]]
    key_lengths: Tensor | None
    softmax_scale: float
    backend: str = "auto"
    gate: None = field(default=None, init=False)
    post_norm: None = field(default=None, init=False)

    def compute(self, stream: ResidualStream) -> Tensor:
        """All tokens; see ``SubLayer``."""
        rows = self._attend(self.query(stream.flush()), self.runner.store_scores)
        output: Tensor = self.out(rows)
        return output

    def recompute_(
        self, cache: Tensor, stream: ResidualStream, indices: Tensor, positions: Tensor
    ) -> None:
        """The tokens at ``indices``, and their scores; see ``SubLayer``."""

        def refresh(site: Site, scores: Tensor) -> None:
            self.runner.refresh_scores(site, indices, scores)

        if not self.is_fused:
            rows = self._attend(self.query(stream.gather_rows(indices)), refresh)
            ops.scatter_rows_(cache, indices, self.out(rows), backend=self.backend)
            return
        query = ops.linear(
            stream.flush(), self.query.weight, self.query.bias, indices=indices,
            backend=self.backend,
        )  # fmt: skip
        rows = self._attend(query, refresh)
        ops.linear_scatter_(
            cache, indices, rows, self.out.weight, self.out.bias, backend=self.backend
        )

    def _attend(self, query: Tensor, keep_scores: Callable[[Site, Tensor], None]) -> Tensor:
        """Attend from (B, S, H * E) to the text, and keep the scores; (B, S, H * E)."""
        key, value = self.project_text()
        query = query.unflatten(-1, key.shape[-2:])
        if self.scored_site is None:
            out, _ = ops.attention(
                query, key, value, key_lengths=self.key_lengths,
                softmax_scale=self.softmax_scale, backend=self.backend,
            )  # fmt: skip
            return out.flatten(2)
        out, _, entropy = ops.attention_with_entropy(
            query, key, value, key_lengths=self.key_lengths, softmax_scale=self.softmax_scale,
            head_mean=True, backend=self.backend,
        )  # fmt: skip
        keep_scores(self.scored_site, entropy)
        return out.flatten(2)
