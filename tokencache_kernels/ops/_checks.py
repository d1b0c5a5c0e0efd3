"""The boundary: every argument is checked here once, in a fixed order, before anything is written.

The sentence is always ``<op>: <argument> must <be what>, got <what it is>``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import settings
from ..errors import fail as fail

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
    if (
        type(tensor) in _PLAIN
        and (like is None or tensor.device == like.device)
        and tensor.dtype in ((like.dtype,) if like is not None and dtypes is FLOATS else dtypes)
        and _has_shape(tensor.shape, shape)
        and (tensor.is_contiguous() or tensor.stride(-1) == 1)
    ):
        return
    _explain(op, name, tensor, shape, letters, like, dtypes)


_PLAIN = (Tensor, torch.nn.Parameter)


def _has_shape(got: Sequence[int], wanted: Sequence[int | None]) -> bool:
    if got == wanted:
        return True
    if len(got) != len(wanted):
        return False
    for size, wanted_size in zip(got, wanted, strict=True):
        if wanted_size is not None and size != wanted_size:
            return False
    return True


def _explain(
    op: str,
    name: str,
    tensor: Tensor,
    shape: Sequence[int | None],
    letters: str,
    like: Tensor | None,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Raise for the first thing that is wrong with a tensor, in the order of the arguments."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dim() != len(shape):
        fail(op, name, f"have shape {letters}", tuple(tensor.shape))
    if like is not None and dtypes is FLOATS:
        dtypes = (like.dtype,)
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = str(tensor.dtype).removeprefix("torch.")
        if torch.is_autocast_enabled(tensor.device.type):
            got += " (torch.autocast is on, and an op casts nothing: give it one dtype)"
        raise TypeError(f"{op}: {name} must be {wanted}, got {got}")
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
    if not torch.compiler.is_compiling() and settings.check_indices():
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


def is_plain(*weights: Tensor | None) -> bool:
    """Tell whether these are plain tensors.

    Only PyTorch knows the products of subclasses, such as quantised ones.
    """
    for weight in weights:
        if weight is None or type(weight) is Tensor or type(weight) is torch.nn.Parameter:
            continue
        if not type(weight).__module__.startswith("torch._subclasses."):
            return False
    return True


def expect_activation(op: str, activation: str) -> None:
    """Check the name of an activation."""
    if activation not in ACTIVATIONS:
        fail(op, "activation", f"be one of {', '.join(ACTIVATIONS)}", repr(activation))


def expect_writable(op: str, name: str, tensor: Tensor) -> None:
    """Check that an output has unit stride, and that no two elements share their memory."""
    if tensor.is_contiguous():
        return
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        fail(op, name, "have stride 1 along its last dimension", tensor.stride(-1))
    reach = 1  # beyond the elements of the dimensions so far
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach:
            fail(
                op, name, "have elements that share no memory, to be written",
                f"shape {tuple(tensor.shape)} with strides {tensor.stride()}",
            )  # fmt: skip
        reach += (size - 1) * stride


def expect_no_grad(op: str, *tensors: Tensor | None) -> None:
    """Refuse inputs that would need a derivative or a batching rule: only the reference has one."""
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    ):
        raise RuntimeError(
            f"{op}: inputs must not require grad (only backend='reference' has a gradient; "
            "or call it under torch.no_grad()), got an input that requires grad"
        )
    if not torch.compiler.is_compiling():
        expect_no_transform(op, *tensors)


def expect_no_transform(op: str, *tensors: Tensor | None) -> None:
    """Refuse inputs of ``torch.func`` transforms, and dual tensors of forward-mode gradients."""
    has_levels = torch._C._functorch.maybe_current_level() is not None
    is_forward = torch.autograd.forward_ad._current_level >= 0
    if not has_levels and not is_forward:
        return
    for tensor in tensors:
        if tensor is None:
            continue
        if has_levels and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            got = "an input of torch.func"
        elif is_forward and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            got = "an input with a tangent"
        else:
            continue
        raise RuntimeError(
            f"{op}: backend must be 'reference' under torch.func (grad, jvp, vmap) and for "
            f"forward-mode gradients, got {got}"
        )
