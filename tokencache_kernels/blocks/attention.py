"""Self-attention recomputed for the fresh tokens: whose keys and values they see is the variant."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import ops
from ..backends import reference


@dataclass(frozen=True)
class SelfAttention:
    """``out(attention(query(x), key(x), value(x)))``: three launches in every variant.

    The variants take the rows that the block's norm and modulation give, and write the output of
    the tokens at ``indices`` (B, S) int32, -1 at the end for an empty slot, into ``cache``
    (B, N, D); its other rows keep their value.

    Attributes:
        qkv: the projections to query, key and value, or one module that gives them side by side.
        out: the output projection.
        is_fused: whether all of these are a product with their weight and nothing else; otherwise
            they are called on packed rows (LoRA, quantised).
        num_heads: H.
        head_dim: E.
        norm: how the model normalises queries and keys, or None.
        rotary: cosine and sine of every position, see ``ops.project_qkv_``, or None.
        softmax_scale: the factor before the softmax; None: 1 / sqrt(E).
        backend: the backend of all ops.

    Source: KV-ALL: TokenCache (arXiv:2409.18523). KV-CACHE: RAS (arXiv:2502.10389). SEL-ONLY: their
        baseline.
    """

    qkv: nn.Linear | tuple[nn.Linear, nn.Linear, nn.Linear]
    out: nn.Linear
    is_fused: bool
    num_heads: int
    head_dim: int
    norm: ops.QkNorm | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    softmax_scale: float | None = None
    backend: str = "auto"

    def full_(self, key_cache: Tensor, value_cache: Tensor, rows: Tensor) -> Tensor:
        """All tokens attend to all; their keys and values fill the caches.

        Args:
            key_cache: (B, N, H, E), written in place.
            value_cache: (B, N, H, E), the cached values.
            rows: (B, N, K), every token's row.

        Returns:
            The output (B, N, D).
        """
        query = self._project_(key_cache, value_cache, rows, None)
        attended = self._attend(query, key_cache, value_cache)
        if not self.is_fused:
            output: Tensor = self.out(attended)
            return output
        return ops.linear(attended, self.out.weight, self.out.bias, backend=self.backend)

    def kv_all_(self, cache: Tensor, indices: Tensor, rows: Tensor) -> None:
        """KV-ALL: fresh tokens attend to all tokens as they are now.

        Args:
            cache: (B, N, D), written in place.
            indices: (B, S) int32.
            rows: (B, N, K), every token's current row.
        """
        if indices.shape[1] == 0:
            return
        keys, values = self._new_keys_and_values(rows)
        query = self._project_(keys, values, rows, indices, all_keys=True)
        self._store_(cache, indices, self._attend(query, keys, values))

    def kv_cache_(
        self, cache: Tensor, key_cache: Tensor, value_cache: Tensor, indices: Tensor, packed: Tensor
    ) -> None:
        """KV-CACHE: fresh tokens attend to all, of which only they have new keys and values.

        Args:
            cache: (B, N, D), written in place.
            key_cache: (B, N, H, E), filled by ``full_``; the fresh tokens' rows are written.
            value_cache: (B, N, H, E), the cached values.
            indices: (B, S) int32.
            packed: (B, S, K), the fresh tokens' rows.
        """
        query = self._project_(key_cache, value_cache, packed, indices)
        self._store_(cache, indices, self._attend(query, key_cache, value_cache))

    def sel_only_(self, cache: Tensor, indices: Tensor, packed: Tensor) -> None:
        """SEL-ONLY: fresh tokens attend to each other.

        Args:
            cache: (B, N, D), written in place.
            indices: (B, S) int32.
            packed: (B, S, K), the fresh tokens' rows.
        """
        among_fresh = self
        if self.rotary is not None:
            cosine, sine = (
                ops.gather_rows(table.expand(len(indices), -1, -1), indices, backend=self.backend)
                for table in self.rotary
            )
            among_fresh = replace(self, rotary=(cosine, sine))
        keys, values = self._new_keys_and_values(packed)
        query = among_fresh._project_(keys, values, packed, None)
        # the empty slots are the last ones: their keys are past the end
        num_fresh = (indices >= 0).sum(1, dtype=torch.int32)
        self._store_(cache, indices, self._attend(query, keys, values, num_fresh))

    def _project_(
        self,
        key_cache: Tensor,
        value_cache: Tensor,
        rows: Tensor,
        indices: Tensor | None,
        all_keys: bool = False,
    ) -> Tensor:
        """As ``ops.project_qkv_``, by way of the model's modules where they are not fused."""
        if not self.is_fused:
            return self._call_modules_(key_cache, value_cache, rows, indices, all_keys)
        weight: Tensor | list[Tensor]
        bias: Tensor | list[Tensor] | None
        if isinstance(self.qkv, tuple):
            weight = [module.weight for module in self.qkv]
            bias = None if self.qkv[0].bias is None else [module.bias for module in self.qkv]
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
        return ops.project_qkv_(
            key_cache, value_cache, rows, indices, weight, bias, norm=self.norm,
            rotary=self.rotary, all_keys=all_keys, backend=self.backend,
        )  # fmt: skip

    def _call_modules_(
        self,
        key_cache: Tensor,
        value_cache: Tensor,
        rows: Tensor,
        indices: Tensor | None,
        all_keys: bool,
    ) -> Tensor:
        """The modules' outputs, normalised and rotated by plain PyTorch, then scattered."""
        B, N = key_cache.shape[:2]
        every = torch.arange(N, dtype=torch.int32, device=rows.device).expand(B, N)
        query_tokens = every if indices is None else indices
        key_tokens = every if all_keys else query_tokens
        if isinstance(self.qkv, tuple):
            query_rows = rows
            if all_keys:
                query_rows = ops.gather_rows(rows, query_tokens, backend=self.backend)
            of_query, of_key, of_value = self.qkv
            parts = of_query(query_rows), of_key(rows), of_value(rows)
        else:
            query, key, value = self.qkv(rows).chunk(3, dim=-1)
            if all_keys:
                query = ops.gather_rows(query, query_tokens, backend=self.backend)
            parts = query, key, value
        query, key, value = (part.unflatten(-1, (self.num_heads, self.head_dim)) for part in parts)
        query, key = reference.finish_heads(
            query, key, query_tokens, key_tokens, self.norm, self.rotary
        )
        for cache, new in ((key_cache, key), (value_cache, value)):
            ops.scatter_rows_(cache.flatten(2), key_tokens, new.flatten(2), backend=self.backend)
        return query

    def _new_keys_and_values(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        shape = (*rows.shape[:2], self.num_heads, self.head_dim)
        return rows.new_empty(shape), rows.new_empty(shape)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None = None
    ) -> Tensor:
        """(B, S, H * E)."""
        out, _ = ops.attention(
            query, key, value, key_lengths=key_lengths, softmax_scale=self.softmax_scale,
            backend=self.backend,
        )  # fmt: skip
        return out.flatten(2)

    def _store_(self, cache: Tensor, indices: Tensor, attended: Tensor) -> None:
        """cache[b, indices[b, s]] = out(attended[b, s])."""
        if not self.is_fused:
            ops.scatter_rows_(cache, indices, self.out(attended), backend=self.backend)
            return
        ops.linear_scatter_(
            cache, indices, attended, self.out.weight, self.out.bias, backend=self.backend
        )
