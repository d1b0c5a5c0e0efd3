"""The attentions of other libraries, those that hand out the log-sum-exp; and which one is taken.

Only the choice is made here, and it is data: the first row of ``attention.json`` that fits a
problem names the kernels to try, best first, and the source of that order.
"""

import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailableError

_TABLE = Path(__file__).parent / "attention.json"
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Row:
    """One row of the table: its problems, and the kernels to try for them, best first.

    Attributes:
        device: ``cpu``, ``cuda`` or an architecture such as ``sm_90``.
        dtypes: of the inputs.
        max_head_dim: of the heads, or None for any.
        order: names of ``CANDIDATES`` and of backends; the reference comes last unsaid.
        source: where the order comes from.
    """

    device: str
    dtypes: list[str]
    max_head_dim: int | None
    order: list[str]
    source: str

    def fits(self, query: Tensor) -> bool:
        """Tell whether the row is for attention of this query."""
        return (
            self.device in (query.device.type, _architecture(query.device))
            and str(query.dtype).removeprefix("torch.") in self.dtypes
            and (self.max_head_dim is None or query.shape[-1] <= self.max_head_dim)
        )


@cache
def read_table() -> tuple[Row, ...]:
    """The shipped table."""
    return tuple(Row(**fields) for fields in json.loads(_TABLE.read_text()))


def find_row(query: Tensor) -> Row:
    """The first row that fits, or one that names nothing."""
    nothing = Row(query.device.type, [], None, [], "no row of the table")
    return next((row for row in read_table() if row.fits(query)), nothing)


def preference(
    query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None
) -> Iterator[str]:
    """The backends that ``auto`` tries for this attention, best first."""
    for name in (*find_row(query).order, "reference"):
        if refusal(name, query, key, value, key_lengths) is None:
            yield "library" if name in CANDIDATES else name


def refusal(
    name: str, query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None
) -> str | None:
    """Why the candidate ``name`` cannot take this attention, or None; a backend's name: None."""
    if name not in CANDIDATES:
        return None
    return CANDIDATES[name].refusal(query, key, value, key_lengths)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Tell whether any library may run attention there. The sizes decide which one."""
    if device.type == "cuda" and dtype not in _HALVES:
        return "no library takes it and hands out the log-sum-exp"
    return None if device.type in ("cpu", "cuda") else f"it needs the CPU or CUDA, got {device}"


def attention(
    query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Call the best library that can: the table's order first, then whatever there is."""
    B, S, H, _ = query.shape
    if query.numel() == 0 or key.numel() == 0:
        # the libraries do not take it: one even ends the process
        wide = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_full((B, H, S), -torch.inf, dtype=wide)
        return query.new_zeros(query.shape), lse
    reasons = {}
    for name in dict.fromkeys([*find_row(query).order, *CANDIDATES]):
        if name in CANDIDATES:
            reason = refusal(name, query, key, value, key_lengths)
            if reason is None:
                out, lse = CANDIDATES[name].run(query, key, value, key_lengths, softmax_scale)
                return out.contiguous(), lse.reshape(B, H, S).contiguous()
            reasons[name] = reason
    refused = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise BackendUnavailableError(f"attention: backend 'library' cannot run here: {refused}")


# the candidates: the problems that each refuses, and its call


def _refuse_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None
) -> str | None:
    return None if query.device.type == "cpu" else f"it needs the CPU, got {query.device}"


def _attend_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if key_lengths is None:
        out, lse = flash(*map(_heads_first, (query, key, value)), scale=softmax_scale)
        return _heads_first(out), lse
    samples = [
        attention(
            query[b : b + 1],
            key[b : b + 1, :length],
            value[b : b + 1, :length],
            None,
            softmax_scale,
        )
        for b, length in enumerate(key_lengths.clamp(0, key.shape[1]).tolist())
    ]
    out, lse = zip(*samples, strict=True)
    return torch.cat(out), torch.cat(lse)


def _refuse_on_cuda(query: Tensor, key_lengths: Tensor | None) -> str | None:
    """Give the reason why every library refuses this attention on CUDA, if one does."""
    if query.device.type != "cuda":
        return f"it needs a CUDA device, got {query.device}"
    if query.dtype not in _HALVES:
        return f"it takes float16 and bfloat16, got {query.dtype}"
    if query.shape[-1] % 8:
        return f"it takes head dims that 8 divides, got {query.shape[-1]}"
    return None if key_lengths is None else "it takes no key lengths"


def _refuse_in_torch(name: str, check: Callable[[Any], bool]) -> Callable[..., str | None]:
    """Ask torch, which asks the same of its own attention."""

    def refuse(query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None) -> str | None:
        reason = _refuse_on_cuda(query, key_lengths)
        if reason is not None:
            return reason
        heads: Any = map(_heads_first, (query, key, value))
        parameters = torch.backends.cuda.SDPAParams(*heads, None, 0.0, False, False)  # type: ignore[call-arg]
        return None if check(parameters) else f"torch.backends.cuda.{name} says no"

    return refuse


def _attend_with_cudnn(
    query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *map(_heads_first, (query, key, value)), None, True, scale=softmax_scale
    )
    return _heads_first(out), lse


def _attend_with_flash(
    query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        *map(_heads_first, (query, key, value)), scale=softmax_scale
    )
    return _heads_first(out), lse


def _refuse_package(
    module: str, architectures: tuple[str, ...], max_head_dim: int
) -> Callable[..., str | None]:
    def refuse(query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None) -> str | None:
        reason = _refuse_on_cuda(query, key_lengths) or _import_error(module)
        if reason is not None:
            return reason
        architecture, head_dim = _architecture(query.device), query.shape[-1]
        if architecture not in architectures:
            return f"it needs {' or '.join(architectures)}, got {architecture}"
        return None if head_dim <= max_head_dim else f"it takes head dims up to {max_head_dim}"

    return refuse


def _attend_with_fa3(
    query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    interface = importlib.import_module("flash_attn_interface")
    out, lse = interface.flash_attn_func(
        query, key, value, softmax_scale=softmax_scale, return_attn_probs=True
    )
    return out, lse


def _attend_with_fa4(
    query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    # torch calls this function too, when its user activates FA4
    interface = importlib.import_module("flash_attn.cute.interface")
    out, lse = interface._flash_attn_fwd(
        query, key, value, softmax_scale=softmax_scale, return_lse=True
    )
    return out, lse


@dataclass(frozen=True)
class Candidate:
    """One library's attention: why it cannot take a problem (None: it can), and the call."""

    refusal: Callable[[Tensor, Tensor, Tensor, Tensor | None], str | None]
    run: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]


# "flash" is FlashAttention 2, or whichever torch.nn.attention.activate_flash_attention_impl named:
# that is the user's to call, since it changes all attention in the process
CANDIDATES = {
    "cpu_flash": Candidate(_refuse_on_cpu, _attend_on_cpu),
    "fa4": Candidate(
        _refuse_package("flash_attn.cute.interface", ("sm_90", "sm_100"), 128), _attend_with_fa4
    ),
    "fa3": Candidate(_refuse_package("flash_attn_interface", ("sm_90",), 256), _attend_with_fa3),
    "cudnn": Candidate(
        _refuse_in_torch("can_use_cudnn_attention", torch.backends.cuda.can_use_cudnn_attention),
        _attend_with_cudnn,
    ),
    "flash": Candidate(
        _refuse_in_torch("can_use_flash_attention", torch.backends.cuda.can_use_flash_attention),
        _attend_with_flash,
    ),
}


@cache
def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken library may raise anything
        return f"it cannot be imported ({error or type(error).__name__})"
    return None


@cache
def _architecture(device: torch.device) -> str:
    """``sm_90``; the type of a device that has none."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _heads_first(x: Tensor) -> Tensor:
    """(B, S, H, E) as (B, H, S, E), or back."""
    return x.transpose(1, 2)
