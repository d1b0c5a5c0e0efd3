"""The boundary: every argument is checked here once, in a fixed order, before anything is written.

The sentence is always ``<op>: <argument> must <be what>, got <what it is>``.
"""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from .. import settings

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu")


def expect(
    op: str,
    name: str,
    tensor: Tensor,
    shape: Sequence[int | None],
    letters: str,
    like: Tensor | None = None,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    """Check rank, dtype, device, sizes and the inner stride of one tensor.

    Args:
        op: the op's public name.
        name: the argument's name.
        tensor: the argument.
        shape: the sizes wanted; None for a size that may be anything.
        letters: the shape in the docstring's letters, for the message.
        like: a tensor whose device must be shared, and its dtype where ``dtypes`` is left out.
        dtypes: the dtypes allowed when ``like`` does not decide.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dim() != len(shape):
        fail(op, name, f"have shape {letters}", tuple(tensor.shape))
    if like is not None and dtypes is FLOATS:
        dtypes = (like.dtype,)
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(
            f"{op}: {name} must be {wanted}, got {str(tensor.dtype).removeprefix('torch.')}"
        )
    if like is not None and tensor.device != like.device:
        fail(op, name, f"be on {like.device}", tensor.device)
    for size, wanted_size in zip(tensor.shape, shape, strict=True):
        if wanted_size is not None and size != wanted_size:
            sizes = ", ".join("any" if wanted is None else str(wanted) for wanted in shape)
            fail(op, name, f"have shape {letters} = ({sizes})", tuple(tensor.shape))
    if tensor.dim() > 0 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        fail(
            op,
            name,
            f"have stride 1 along {letters.strip('()').split(', ')[-1]}",
            tensor.stride(-1),
        )


def expect_indices(
    op: str, indices: Tensor, hidden_states: Tensor, *, may_repeat: bool = False
) -> None:
    """Check (B, S) int32 indices of tokens of a (B, N, ...) tensor; values only when asked to."""
    B, N = hidden_states.shape[:2]
    expect(op, "indices", indices, (B, None), "(B, S)", like=hidden_states, dtypes=(torch.int32,))
    if indices.shape[1] > N:
        fail(op, "indices", f"hold at most N = {N} slots", indices.shape[1])
    if settings.check_indices() and not torch.compiler.is_compiling():
        _check_index_values(op, indices, N, may_repeat)


def _check_index_values(op: str, indices: Tensor, num_tokens: int, may_repeat: bool) -> None:
    if indices.numel() == 0:
        return
    if bool(((indices < -1) | (indices >= num_tokens)).any()):
        span = f"[{int(indices.min())}, {int(indices.max())}]"
        fail(op, "indices", f"lie in [-1, {num_tokens})", f"values in {span}")
    if may_repeat:
        return
    for sample, row in enumerate(indices):
        live = row[row >= 0]
        if live.unique().numel() != live.numel():
            fail(op, "indices", "name each token once", f"a repeated token in sample {sample}")


def expect_activation(op: str, activation: str) -> None:
    """Check the name of an activation."""
    if activation not in ACTIVATIONS:
        fail(op, "activation", f"be one of {', '.join(ACTIVATIONS)}", repr(activation))


def expect_no_grad(op: str, *tensors: Tensor | None) -> None:
    """Refuse inputs that would need a gradient: only the reference has one."""
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    ):
        raise RuntimeError(
            f"{op}: inputs must not require grad (only backend='reference' has a gradient; "
            "or call it under torch.no_grad()), got an input that requires grad"
        )


def fail(op: str, name: str, wanted: str, got: object) -> NoReturn:
    """Raise the one sentence."""
    raise ValueError(f"{op}: {name} must {wanted}, got {got}")
