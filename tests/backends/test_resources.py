import pytest

from tokencache_kernels.backends.native import loading, read_resources, resources
from tokencache_kernels.backends.native.resources import KernelResources, parse_resources
from tokencache_kernels.commands import compile_report
from tokencache_kernels.commands.cli import main

# the output of cuobjdump, for two architectures
PRINTED = """
Fatbin elf code:
================
arch = sm_90a
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN10tokencache45_GLOBAL__N__e91c9e1d_12_attention_cu_5f3f82da16attention_kernelI13__nv_bfloat16Li128EEEvNS_15AttentionParamsE:
  REG:202 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_80
Resource usage:
 Function _ZN10tokencache4_GL05rows_kernelI5uint4EEvNS_1PE:
  REG:30 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:536
 Function _ZN10tokencache4_GL06linear_kernelI6__halfNS0_4TileILi64ELi128ELi2ELi2EEELb1EEEvNS_1PE:
  REG:95 STACK:0 SHARED:0 LOCAL:4 CONSTANT[0]:536
 Function _ZN10tokencache4_GL0_9_select_cu_021invert_indices_kernelENS_1PE:
  REG:16 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:536
"""  # noqa: E501


def test_what_cuobjdump_prints_is_read_by_architecture_and_kernel():
    assert parse_resources(PRINTED) == [
        KernelResources("sm_80", "invert_indices_kernel", "", 16, 0, 0),
        KernelResources("sm_80", "linear_kernel", "float16, 64, 128, 2, 2, yes", 95, 4, 0),
        KernelResources("sm_80", "rows_kernel", "16 bytes", 30, 8, 0),
        KernelResources("sm_90a", "attention_kernel", "bfloat16, 128", 202, 0, 1024),
    ]


def test_the_build_has_kept_what_there_was_to_read():
    kept = loading.built_resources()
    if not kept:
        pytest.skip("built without CUDA or without cuobjdump")

    assert parse_resources(kept) == read_resources(loading.cuda_library_path())


def test_no_kernel_of_the_built_library_spills():
    try:
        kernels = read_resources()
    except FileNotFoundError as error:
        pytest.skip(str(error))

    assert kernels
    # csrc/cuda/launch.h: a kernel that asks for shared memory has at most 3 KB of its own; from
    # sm_90 on the driver owns 1 KB of the number
    large = {kernel.kernel for kernel in kernels if kernel.shared > 4 << 10}
    assert large <= {"plain_linear_kernel"}
    assert [kernel for kernel in kernels if kernel.failure is not None] == []


def test_the_report_tells_registers_and_the_check_fails_on_spills(capsys, monkeypatch):
    monkeypatch.setattr(compile_report, "read_resources", lambda: parse_resources(PRINTED))

    assert main(["compile-report", "--native"]) == 0
    assert (
        "attention_kernel (bfloat16, 128): 202 registers, none spilled, 1024 bytes shared"
        in capsys.readouterr().out
    )

    assert main(["compile-report", "--native", "--check"]) == 1
    printed = capsys.readouterr().out
    assert "rows_kernel (16 bytes): 8 bytes of registers in memory" in printed
    assert "attention_kernel" not in printed
    assert main(["compile-report", "--native", "--check", "--kernel", "attention"]) == 0


def test_a_half_that_was_not_built_is_said(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENCACHE_NATIVE_LIBRARY", str(tmp_path / "native.so"))

    assert main(["compile-report", "--native"]) == 1
    assert "the CUDA half of the native library was not built" in capsys.readouterr().err
    assert resources.summarise_resources().startswith("none: the CUDA half")
