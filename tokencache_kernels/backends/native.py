"""The native library: C++ loops registered as torch ops of their own, loaded on first use."""

import functools
import importlib
from pathlib import Path

import torch
from torch import Tensor

from .. import settings

_PACKAGE = Path(__file__).resolve().parents[1]
_OPS = torch.ops.tokencache_kernels_native


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """The library must be there, and it works on the CPU."""
    if device.type == "cuda":
        return "it has no CUDA half yet"
    if device.type != "cpu":
        return f"it needs a CPU tensor, got {device.type}"
    return _load_library()


@functools.cache
def _load_library() -> str | None:
    """Load the library, once in a process; the reason why it cannot be loaded, or None."""
    path = library_path()
    if not path.is_file():
        if settings.native_library_path():
            return f"TOKENCACHE_NATIVE_LIBRARY must name a file, got {str(path)!r}"
        return (
            "the native library was not built (pip install --no-build-isolation . with a C++ "
            "compiler and torch installed)"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the native library does not load ({error})"
    return None


def library_path() -> Path:
    """Where the library is: ``TOKENCACHE_NATIVE_LIBRARY``, or where the build installs it."""
    override = settings.native_library_path()
    return Path(override) if override else _PACKAGE / "libtokencache_kernels.so"


def build_info() -> dict[str, str] | None:
    """How the installed library was built (compiler, flags, torch), or None if it cannot say."""
    try:
        module = importlib.import_module(f"{_PACKAGE.name}._build_info")
    except ImportError:
        return None
    facts: dict[str, str] = module.facts()
    return facts


# rows


def gather_rows(hidden_states: Tensor, indices: Tensor) -> Tensor:
    """out[b, s] = hidden_states[b, indices[b, s]]; an empty slot: 0."""
    out: Tensor = _OPS.gather_rows(hidden_states, indices)
    return out


def scatter_rows_(cache: Tensor, indices: Tensor, rows: Tensor) -> None:
    """cache[b, indices[b, s]] = rows[b, s]; an empty slot writes nothing."""
    _OPS.scatter_rows_(cache, indices, rows)


# modulate


def add_branches(
    out: Tensor, hidden_states: Tensor, branches: list[Tensor], gates: list[Tensor | None]
) -> None:
    """out = hidden_states + sum_j gates[j] * branches[j]."""
    _OPS.add_branches(out, hidden_states, branches, gates)


def gather_modulate(
    hidden_states: Tensor, indices: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> Tensor:
    """out[b, s] = layer_norm(hidden_states[b, indices[b, s]]) * (1 + scale[b]) + shift[b]."""
    packed: Tensor = _OPS.gather_modulate(hidden_states, indices, shift, scale, eps)
    return packed


def row_pass(
    out: Tensor,
    hidden_states: Tensor,
    branches: list[Tensor],
    gates: list[Tensor | None],
    indices: Tensor,
    positions: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
) -> Tensor:
    """``add_branches`` over all rows, then ``gather_modulate`` of the selected ones."""
    add_branches(out, hidden_states, branches, gates)
    return gather_modulate(out, indices, shift, scale, eps)


# select


def select_tokens_(
    scores: Tensor,
    staleness: Tensor,
    num_fresh: Tensor | None,
    max_fresh: int,
    staleness_weight: float,
    normalize: bool,
    grid: tuple[int, int] | None,
    tile: int,
    bonus: float,
) -> tuple[Tensor, Tensor]:
    """Combine the scores, take the top tokens, update the staleness, for each step in turn."""
    L, B, N = scores.shape
    P = 1 if num_fresh is None else num_fresh.shape[0]
    indices = staleness.new_empty(P, L, B, max_fresh)
    positions = staleness.new_empty(P, L, B, N)
    if num_fresh is not None:
        num_fresh = num_fresh.contiguous()
    _OPS.select_tokens_(
        scores.float().contiguous(), staleness, num_fresh, max_fresh, staleness_weight, normalize,
        *(grid or (0, 0)), tile, bonus, indices, positions,
    )  # fmt: skip
    return indices, positions
