"""Compile every Triton kernel, in every launch setting, for every architecture; judge the code.

Needs no GPU: Triton compiles for a named target, and its wheel carries the assembler and the
disassembler. The gate catches what the interpreter cannot see: types and layouts that do not lower,
spilled registers, too much shared memory, and GEMMs that lost their tensor cores or their
asynchronous copies.
"""

import argparse
import importlib
import io
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..native.resources import read_resources
from ._launch import CompileCase, Device, describe_setting, modules_with

KIB = 1024
# the assembler turns each of these PTX instructions into one of the machine, so they are counted
# before it: disassembling takes as long as compiling. Here those that load shared memory
ASYNC_COPY = r"cp\.async\.(?:c[ag]|bulk(?:\.tensor\.\dd)?)\.shared"
# columns of tensor memory that one multiprocessor of sm_100 has
TENSOR_MEMORY_LIMIT = 512


@dataclass(frozen=True)
class Architecture:
    """What the gate demands of the code for one architecture.

    Attributes:
        device: a device of that architecture, whose heuristics and tuned settings are compiled.
        shared_limit: bytes of shared memory that one program may use.
        tensor_core: the PTX instruction that does a GEMM at full speed there.
    """

    device: Device
    shared_limit: int
    tensor_core: str


ARCHITECTURES = {
    f"sm_{device.arch}": Architecture(device, shared_kib * KIB, tensor_core)
    for device, shared_kib, tensor_core in (
        (Device(80, "NVIDIA A100-SXM4-80GB", 108), 163, "mma.sync"),
        (Device(86, "NVIDIA A10", 72), 99, "mma.sync"),
        (Device(89, "NVIDIA L4", 58), 99, "mma.sync"),
        (Device(90, "NVIDIA H200", 132), 227, "wgmma.mma_async"),
        (Device(100, "NVIDIA B200", 148), 227, "tcgen05.mma"),
        (Device(120, "NVIDIA GeForce RTX 5090", 170), 99, "mma.sync"),
    )
}


@dataclass(frozen=True)
class Job:
    """One case for one architecture, by its place: a kernel does not travel between processes."""

    module: str
    arch: str
    index: int
    kernel: str
    variant: str
    setting: str


@dataclass(frozen=True)
class Code:
    """What the compiler made of a kernel; the spills and the last two count instructions."""

    registers: int = 0
    spills: int = 0
    shared: int = 0
    tensor_memory: int = 0
    tensor_cores: int = 0
    async_copies: int = 0


@dataclass(frozen=True)
class Report:
    """The code of one job, and everything that is wrong with it."""

    job: Job
    code: Code
    failures: tuple[str, ...]


# what to compile


def list_jobs(
    modules: Sequence[str] | None, archs: Iterable[str], kernel: str | None = None
) -> list[Job]:
    """Every case of the modules (None: of this package) for every architecture; equal cases once.

    ``kernel`` keeps the kernels whose name contains it.
    """
    jobs: dict[tuple[str, str, str], Job] = {}
    for module in modules_with("compile_cases") if modules is None else modules:
        for arch in archs:
            for index, case in enumerate(_cases(module, arch)):
                name = case.kernel.fn.__name__
                if kernel is None or kernel in name:
                    job = Job(
                        module, arch, index, name, case.variant, describe_setting(case.setting)
                    )
                    jobs.setdefault((arch, name, _identity(case)), job)
    return list(jobs.values())


@cache
def _cases(module: str, arch: str) -> list[CompileCase]:
    cases: Iterable[CompileCase] = importlib.import_module(module).compile_cases(
        ARCHITECTURES[arch].device
    )
    return list(cases)


def _identity(case: CompileCase) -> str:
    """Everything that the compiler gets to see."""
    types, values = sorted(case.signature.items()), sorted(case.constexprs.items())
    options = (case.num_warps, case.num_stages, case.max_registers, case.fuses_multiply_add)
    return f"{types} {values} {sorted(case.aligned)} {options}"


# one case: compile, read, judge


def compile_job(job: Job) -> Report:
    """Compile one case and judge its code; an error of the compiler is a failure like any other."""
    case = _cases(job.module, job.arch)[job.index]
    architecture = ARCHITECTURES[job.arch]
    try:
        # when the assembler fails, Triton prints the whole program
        with redirect_stdout(io.StringIO()):
            code = read_code(compile_case(case, architecture), architecture)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
        # the assembler's error stands amid other lines, Triton's own at the end
        telling = next((line for line in lines if re.search(r"\berror\s*:", line)), lines[-1])
        return Report(job, Code(), (f"does not compile: {telling}",))
    return Report(job, code, judge_code(code, case.is_gemm, architecture))


def compile_case(case: CompileCase, architecture: Architecture) -> Any:
    """Compile as the launch would: the same types, constants, alignments and options."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = case.kernel
    unaligned = {
        parameter.name
        for parameter in kernel.params
        if parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
    }
    names = list(kernel.arg_names)
    if sorted(names) != sorted([*case.signature, *case.constexprs]):
        odd = sorted({*names} ^ {*case.signature, *case.constexprs})
        raise ValueError(f"the case must give each argument a type or a value, got {odd} wrong")
    if wrong := sorted(unaligned & case.aligned):
        raise ValueError(f"the case must not align what a launch does not specialise, got {wrong}")
    source = ASTSource(
        kernel,
        {name: case.signature.get(name, "constexpr") for name in names},
        dict(case.constexprs),
        {
            path: [["tt.divisibility", 16]]
            for name in case.aligned
            for path in _paths(names.index(name), case.signature[name])
        },
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", architecture.device.arch, 32),
        options={
            "num_warps": case.num_warps,
            "num_stages": case.num_stages,
            "maxnreg": case.max_registers,
            "enable_fp_fusion": case.fuses_multiply_add,
        },
    )


def _paths(index: int, types: str | tuple[str, ...]) -> list[tuple[int, ...]]:
    """Where Triton keeps the attributes of an argument: a tuple has them for each of its items."""
    return [(index,)] if isinstance(types, str) else [(index, item) for item in range(len(types))]


def read_code(compiled: Any, architecture: Architecture) -> Code:
    """Count what :func:`judge_code` asks for."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _cuobjdump("-res-usage", cubin.name)
        registers, stack = (
            int(_find(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK")
        )
        # only what lies on the stack can be a spill
        sass = _cuobjdump("-sass", cubin.name) if stack > 0 else ""
    ptx = compiled.asm["ptx"]
    return Code(
        registers=registers,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared=compiled.metadata.shared,
        tensor_memory=compiled.metadata.tmem_size,
        tensor_cores=len(re.findall(rf"\b{re.escape(architecture.tensor_core)}\b", ptx)),
        async_copies=len(re.findall(ASYNC_COPY, ptx)),
    )


def _cuobjdump(option: str, path: str) -> str:
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, option, path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _find(pattern: str, text: str) -> re.Match[str]:
    match = re.search(pattern, text)
    assert match is not None, f"cuobjdump must print {pattern}, got {text!r}"
    return match


def judge_code(code: Code, is_gemm: bool, architecture: Architecture) -> tuple[str, ...]:
    """Everything that is wrong with the code, one sentence each."""
    failures = []
    if code.spills > 0:
        failures.append(f"{code.spills} instructions spill registers to memory")
    if code.shared > architecture.shared_limit:
        failures.append(f"{code.shared} bytes of shared memory pass {architecture.shared_limit}")
    if code.tensor_memory > TENSOR_MEMORY_LIMIT:
        failures.append(f"{code.tensor_memory} columns of tensor memory pass {TENSOR_MEMORY_LIMIT}")
    if is_gemm and code.tensor_cores == 0:
        failures.append(f"a GEMM without {architecture.tensor_core}")
    if is_gemm and code.async_copies == 0:
        failures.append("a GEMM without asynchronous copies")
    return tuple(failures)


# all cases, in processes of their own


def find_jobs(
    modules: Sequence[str] | None, archs: Sequence[str], kernel: str | None = None
) -> list[Job]:
    """:func:`list_jobs`, in a process where kernels are for the compiler."""
    with _pool(1) as pool, _without_interpreter():
        return pool.submit(list_jobs, modules, archs, kernel).result()


def run_jobs(jobs: Sequence[Job], processes: int) -> Iterator[Report]:
    """A report on each job, in order, as they get ready."""
    remaining = list(jobs)
    while remaining:
        with _pool(min(processes, len(remaining))) as pool:
            with _without_interpreter():
                reports = pool.map(compile_job, remaining)
            try:
                for report in reports:
                    yield report
                    remaining = remaining[1:]
            except BrokenProcessPool:
                # a compiler that crashes takes the pool along; a single process tells on which job
                if processes == 1:
                    yield Report(remaining[0], Code(), ("does not compile: the compiler crashed",))
                    remaining = remaining[1:]
                processes = 1


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))


@contextmanager
def _without_interpreter() -> Iterator[None]:
    """Start processes in which ``@triton.jit`` means the compiler, whatever it means here."""
    chosen = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if chosen is not None:
            os.environ["TRITON_INTERPRET"] = chosen


# the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``compile-report``."""
    parser.description = "Compile every Triton kernel for GPUs that need not be here."
    parser.add_argument(
        "--arch",
        nargs="+",
        default=["sm_90"],
        choices=["all", *ARCHITECTURES],
        help="default: sm_90",
    )
    parser.add_argument("--kernel", help="only kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="processes; default: 2")
    parser.add_argument(
        "--check", action="store_true", help="print failures only, and exit with 1 if there are any"
    )
    parser.add_argument(
        "--native",
        action="store_true",
        help="instead read the CUDA half of the native library, as it was built, for all its GPUs",
    )


def run(options: argparse.Namespace) -> int:
    """Print the table (or, with ``--check``, the failures) and one line of summary."""
    if options.native:
        return _report_native(options.kernel, options.check)
    start = time.monotonic()
    archs = list(ARCHITECTURES) if "all" in options.arch else options.arch
    jobs = find_jobs(None, archs, options.kernel)
    if not jobs:
        print(f"compile-report: --kernel must be part of a kernel's name, got {options.kernel!r}")
        return 2
    widths = [max(len(cell) for cell in column) for column in zip(*map(_labels, jobs), strict=True)]
    if not options.check:
        print(_line(("arch", "kernel", "variant", "setting"), widths, _COUNTS))
    num_failed = 0
    for report in run_jobs(jobs, options.jobs):
        num_failed += bool(report.failures)
        if not options.check:
            counts = [str(count) for count in vars(report.code).values()]
            print(_line(_labels(report.job), widths, counts), *report.failures[:1], flush=True)
        elif report.failures:
            job = report.job
            where = f"{job.arch} {job.kernel} ({job.variant}; {job.setting})"
            print(f"{where}: {'; '.join(report.failures)}", flush=True)
    seconds = time.monotonic() - start
    print(f"compile gate: {len(jobs)} cases, {num_failed} failures, {seconds:.0f} s")
    return 1 if options.check and num_failed else 0


_COUNTS = ("regs", "spills", "shared", "tmem", "tensor", "async")


def _report_native(kernel: str | None, check: bool) -> int:
    kernels = [one for one in read_resources() if kernel is None or kernel in one.kernel]
    failures = 0
    for one in kernels:
        failures += one.failure is not None
        if one.failure is not None or not check:
            where = f"{one.arch:8}{one.kernel} ({one.variant})"
            counts = f"{one.registers} registers, none spilled, {one.shared} bytes shared"
            print(f"{where}: {one.failure or counts}")
    print(f"native library: {len(kernels)} kernels, {failures} failures")
    return 1 if check and failures else 0


def _labels(job: Job) -> tuple[str, ...]:
    return job.arch, job.kernel, job.variant, job.setting


def _line(labels: Sequence[str], widths: Sequence[int], counts: Sequence[str]) -> str:
    left = (label.ljust(width) for label, width in zip(labels, widths, strict=True))
    return "  ".join([*left, *(count.rjust(6) for count in counts)])
