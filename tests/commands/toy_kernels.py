"""Kernels that the compile gate must pass, and one for every reason why it must fail."""

import os
import types

import triton
import triton.language as tl

from tokencache_kernels.backends.triton._launch import CompileCase
from tokencache_kernels.backends.triton.attention import (
    AttentionSetting,
    _attention_kernel,
)
from tokencache_kernels.backends.triton.attention import _compile_case as attention_case


@triton.jit(do_not_specialize=["N"])
def _add_one_kernel(x_ptr, N, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < N, other=0.0)
    tl.store(x_ptr + offsets, x + 1, mask=offsets < N)


@triton.jit
def _matmul_kernel(
    a_ptr, b_ptr, out_ptr,
    K, stride_a, stride_b, stride_out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + rows[:, None] * stride_a + k + offs_k)
        b = tl.load(b_ptr + columns[:, None] * stride_b + k + offs_k)
        total = tl.dot(a, b.T, total)
    out = out_ptr + rows[:, None] * stride_out + columns
    tl.store(out, total.to(out_ptr.dtype.element_ty))


@triton.jit
def _outer_sum_kernel(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    """A sum of products as large as a GEMM's tile, without tl.dot."""
    offsets = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + offsets)
    b = tl.load(b_ptr + offsets)
    tl.store(out_ptr + offsets[:, None] * BLOCK + offsets, a[:, None] * b)


@triton.jit
def _centre_kernel(x_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(x_ptr + offsets, x - tl.sum(x, axis=0) / BLOCK)


@triton.jit
def _mismatched_kernel(x_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(x_ptr + tl.arange(0, 2 * BLOCK), x)


class _Crash:
    """Stands for a kernel on which the compiler takes its process down."""

    fn = types.SimpleNamespace(__name__="_crash_kernel")

    @property
    def params(self):
        os._exit(1)


def _vector(variant, aligned=("x_ptr",), signature=None):
    signature = {"x_ptr": "*bf16", "N": "i32"} if signature is None else signature
    return CompileCase(
        _add_one_kernel, variant, "block=1024", signature, {"BLOCK": 1024}, frozenset(aligned), 4
    )


def _matmul(variant, block, aligned=True, num_warps=8, num_stages=3):
    pointers = {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*bf16"}
    sizes = dict.fromkeys(("K", "stride_a", "stride_b", "stride_out"), "i32")
    return CompileCase(
        _matmul_kernel,
        variant,
        f"block={block}",
        pointers | sizes,
        dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), block, strict=True)),
        frozenset(pointers | sizes if aligned else pointers),
        num_warps,
        num_stages,
        is_gemm=True,
    )


def compile_cases(device):
    yield _vector("good")
    yield _vector("the same again")
    yield _matmul("good", (128, 128, 64 if device.arch in (80, 90, 100) else 32))
    if device.arch == 80:
        yield CompileCase(_Crash(), "crashing", "", {}, {}, frozenset(), 4)
        yield _vector("after the crash", aligned=())
    if device.arch != 90:
        return
    yield CompileCase(
        _centre_kernel, "spilling", "", {"x_ptr": "*fp32"}, {"BLOCK": 16384}, frozenset(), 1
    )
    yield _matmul("oversized", (128, 128, 64), num_stages=8)
    yield _matmul("two warps", (64, 32, 64), num_warps=2)
    yield _matmul("unaligned", (128, 128, 64), aligned=False)
    # the package's own kernel, with the second loop that made the assembler serialise it
    serial = AttentionSetting(128, 64, 8, 3, branches=False)
    yield attention_case(_attention_kernel, 64, "bf16", False, serial)
    yield CompileCase(
        _outer_sum_kernel,
        "without tensor cores",
        "block=64",
        dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), "*bf16"),
        {"BLOCK": 64},
        frozenset(),
        4,
        is_gemm=True,
    )
    yield CompileCase(
        _mismatched_kernel, "ill-typed", "", {"x_ptr": "*bf16"}, {"BLOCK": 64}, frozenset(), 4
    )
    yield _vector("overaligned", aligned=("x_ptr", "N"))
    yield _vector("incomplete", signature={"x_ptr": "*bf16"})
