"""Compile every Triton kernel, in every launch setting, for every architecture; judge the code.

Needs no GPU: Triton compiles for a named target, and its wheel carries the assembler and the
disassembler. The gate catches errors that the interpreter cannot see: types and layouts that do not
lower, spilled registers, too much shared memory, GEMMs that lost their tensor cores or their
asynchronous copies, and warnings of the assembler, such as serialised wgmma. The machine code for
Hopper is also held against a budget of instructions.
"""

import argparse
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..backends.native.resources import read_resources
from ..backends.triton._launch import CompileCase, Device, describe_setting, modules_with
from .machine_code import HopperCode, read_hopper

KIB = 1024
# the assembler turns each of these PTX instructions into one of the machine, so they are counted
# before it: disassembling takes as long as compiling, and is done for Hopper alone. Here those that
# load shared memory
ASYNC_COPY = r"cp\.async\.(?:c[ag]|bulk(?:\.tensor\.\dd)?)\.shared"
# columns of tensor memory that one multiprocessor of sm_100 has
TENSOR_MEMORY_LIMIT = 512
# the warnings of a loss of performance, such as C7515: serialised wgmma
_WARNING = r"\((C75\d\d)\)"
# a spill is in bytes of a thread
_USAGE = r"Used (\d+) registers"
_SPILL = r"(\d+) bytes spill stores"
BUDGET = Path(__file__).parent / "code_budget.json"
# its machine code is disassembled, and every case compiled for it
MAIN = "sm_90"


@dataclass(frozen=True)
class Architecture:
    """The gate's demands on the code for one architecture.

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

    @property
    def name(self) -> str:
        """The case, as the budget names it."""
        return " | ".join((self.kernel, self.variant, self.setting))


@dataclass(frozen=True)
class Code:
    """The compiler's result for one kernel.

    Attributes:
        registers: of a thread.
        spills: bytes of a thread's registers that are stored to memory.
        shared: bytes of shared memory of a program.
        tensor_memory: columns of a program.
        tensor_cores: instructions that multiply on them.
        async_copies: instructions that copy from global to shared memory.
        programs: how many of them one multiprocessor holds, by registers, shared memory and warps.
        warnings: the assembler's, of a loss of performance.
        hopper: of the machine code for sm_90.
    """

    registers: int = 0
    spills: int = 0
    shared: int = 0
    tensor_memory: int = 0
    tensor_cores: int = 0
    async_copies: int = 0
    programs: int = 0
    warnings: tuple[str, ...] = ()
    hopper: HopperCode | None = None


@dataclass(frozen=True)
class Report:
    """The code of one job, and everything that is wrong with it."""

    job: Job
    code: Code
    failures: tuple[str, ...]


# kernels to compile


def list_jobs(
    modules: Sequence[str] | None, archs: Iterable[str], kernel: str | None = None
) -> list[Job]:
    """Every case of the modules (None: of this package) for every architecture; equal cases once.

    Without tensor cores, the PTX is the same for all architectures but for its header: there one
    case of a kernel stands for the others, where the architecture is not the main one. sm_86 is
    left out altogether: its code is that of sm_89. ``kernel`` keeps the kernels whose name
    contains it.
    """
    jobs: dict[tuple[str, str, str], Job] = {}
    for module in modules_with("compile_cases") if modules is None else modules:
        for arch in archs:
            plain: set[str] = set()
            for index, case in enumerate(_cases(module, arch)):
                name = case.kernel.fn.__name__
                if modules is None and arch != MAIN and not case.is_gemm:
                    if name in plain:
                        continue
                    plain.add(name)
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


def source_key(job: Job) -> str | None:
    """Return the hash of everything that decides a job's code; None where there is no source."""
    import triton
    from triton import knobs

    case = _cases(job.module, job.arch)[job.index]
    if not hasattr(case.kernel, "cache_key"):
        return None
    readers = [Path(__file__).read_text(), (Path(__file__).parent / "machine_code.py").read_text()]
    tools = (triton.__version__, knobs.nvidia.ptxas.path, knobs.nvidia.ptxas_blackwell.path)
    text = f"{job.arch} {case.kernel.cache_key} {_identity(case)} {tools} {readers}"
    return hashlib.sha256(text.encode()).hexdigest()


def compile_job(job: Job) -> Report:
    """Compile one case and judge its code; an error of the compiler is a failure like any other."""
    case = _cases(job.module, job.arch)[job.index]
    architecture = ARCHITECTURES[job.arch]
    printed = io.StringIO()
    try:
        # the assembler's log; when it fails, Triton prints the whole program
        with redirect_stdout(printed), _logging_assembler():
            compiled = compile_case(case, architecture)
        code = read_code(compiled, printed.getvalue(), architecture, case.num_warps)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
        # the assembler's error stands amid other lines, Triton's own at the end
        telling = next((line for line in lines if re.search(r"\berror\s*:", line)), lines[-1])
        return Report(job, Code(), (f"does not compile: {telling}",))
    return Report(job, code, judge_code(code, case.is_gemm, architecture, case.copy_bytes))


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
    """Give the places of an argument's attributes in Triton, one for each item of a tuple."""
    return [(index,)] if isinstance(types, str) else [(index, item) for item in range(len(types))]


@contextmanager
def _logging_assembler() -> Iterator[None]:
    """Run the assembler regardless of earlier compilations, and print its messages."""
    from triton import knobs

    with knobs.compilation.scope(), knobs.nvidia.scope():
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        yield


def read_code(compiled: Any, log: str, architecture: Architecture, num_warps: int) -> Code:
    """Read the facts for :func:`judge_code` from the code and the assembler's log."""
    registers = int(_find(_USAGE, log).group(1))
    shared, ptx = compiled.metadata.shared, compiled.asm["ptx"]
    is_main = architecture.device.arch == ARCHITECTURES[MAIN].device.arch
    return Code(
        registers=registers,
        spills=max((int(found) for found in re.findall(_SPILL, log)), default=0),
        shared=shared,
        tensor_memory=compiled.metadata.tmem_size,
        tensor_cores=len(re.findall(rf"\b{re.escape(architecture.tensor_core)}\b", ptx)),
        async_copies=len(re.findall(ASYNC_COPY, ptx)),
        programs=count_programs(registers, shared, num_warps, architecture.shared_limit),
        warnings=tuple(sorted(set(re.findall(_WARNING, log)))),
        hopper=read_hopper(_disassemble(compiled.asm["cubin"]), num_warps) if is_main else None,
    )


def count_programs(registers: int, shared: int, num_warps: int, shared_limit: int) -> int:
    """Count the programs that a multiprocessor holds; each takes 1 KB of shared memory beside its
    own.
    """
    # registers are handed to warps by 256
    of_warp = -(-registers * 32 // 256) * 256
    return min(
        64 * KIB // max(of_warp * num_warps, 1), (shared_limit + KIB) // (shared + KIB),
        64 // num_warps, 32,
    )  # fmt: skip


def _disassemble(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _find(pattern: str, text: str) -> re.Match[str]:
    match = re.search(pattern, text)
    assert match is not None, f"the assembler must print {pattern}, got {text!r}"
    return match


def judge_code(
    code: Code, is_gemm: bool, architecture: Architecture, copy_bytes: int = 16
) -> tuple[str, ...]:
    """Everything that is wrong with the code, one sentence each."""
    failures = []
    if code.spills > 0:
        failures.append(f"{code.spills} bytes of registers are spilled to memory")
    if code.shared > architecture.shared_limit:
        failures.append(f"{code.shared} bytes of shared memory pass {architecture.shared_limit}")
    if code.tensor_memory > TENSOR_MEMORY_LIMIT:
        failures.append(f"{code.tensor_memory} columns of tensor memory pass {TENSOR_MEMORY_LIMIT}")
    if is_gemm and code.tensor_cores == 0:
        failures.append(f"a GEMM without {architecture.tensor_core}")
    if is_gemm and code.async_copies == 0:
        failures.append("a GEMM without asynchronous copies")
    if code.warnings:
        failures.append(f"the assembler warns of {', '.join(code.warnings)} (C7515: serial wgmma)")
    if code.hopper is not None:
        if code.hopper.hazards > 0:
            failures.append(f"{code.hopper.hazards} writes to registers that a wgmma still reads")
        if is_gemm and 0 < code.hopper.copy_bytes < copy_bytes:
            failures.append(f"a GEMM that copies by {code.hopper.copy_bytes} bytes")
    return tuple(failures)


# the budget


def make_budget(reports: Iterable[Report]) -> dict[str, Any]:
    """The instructions and registers of each kernel for Hopper, and its hot loop by instruction."""
    import triton

    cases: dict[str, Any] = {}
    for report in reports:
        if report.code.hopper is None or report.failures:
            continue
        case = {
            "instructions": report.code.hopper.instructions,
            "registers": report.code.registers,
            "loop": report.code.hopper.loop,
        }
        # cases of one name differ in the compiler's knowledge of their arguments
        other = cases.setdefault(report.job.name, case)
        cases[report.job.name] = {
            "instructions": max(case["instructions"], other["instructions"]),
            "registers": max(case["registers"], other["registers"]),
            "loop": max(case["loop"], other["loop"], key=lambda loop: sum(loop.values())),
        }
    return {"triton": triton.__version__, "cases": dict(sorted(cases.items()))}


def write_budget(budget: Mapping[str, Any], path: Path) -> None:
    """Write it with one case a line, for readable differences."""
    lines = [f"  {json.dumps(name)}: {json.dumps(case)}" for name, case in budget["cases"].items()]
    head = f'{{"triton": {json.dumps(budget["triton"])}, "cases": {{\n'
    path.write_text(head + ",\n".join(lines) + "\n}}\n")


def compare_with_budget(report: Report, cases: Mapping[str, Any]) -> tuple[str, ...]:
    """Everything that a kernel needs more of than its budget allows, one sentence each."""
    hopper = report.code.hopper
    if hopper is None:
        return ()
    budget = cases.get(report.job.name)
    if budget is None:
        return ("not in the budget: compile-report --write-budget adds it",)
    failures = []
    for name, got in (
        ("instructions", hopper.instructions),
        ("registers", report.code.registers),
    ):
        if got > budget[name]:
            failures.append(f"{name}: {budget[name]} -> {got}")
    before, after = budget["loop"], hopper.loop
    if sum(after.values()) > sum(before.values()):
        changes = [
            f"{name} {after.get(name, 0) - before.get(name, 0):+d}"
            for name in sorted({*before, *after})
            if after.get(name, 0) != before.get(name, 0)
        ]
        total = f"{sum(before.values())} -> {sum(after.values())}"
        failures.append(f"hot loop: {total} instructions ({', '.join(changes)})")
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


def run_cached(jobs: Sequence[Job], processes: int, path: Path | None) -> Iterator[Report]:
    """Run the jobs like :func:`run_jobs`, but skip those whose code is on file, and add the others
    to it.
    """
    if path is None:
        yield from run_jobs(jobs, processes)
        return
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    with _pool(1) as pool, _without_interpreter():
        keys = dict(zip(jobs, pool.map(source_key, jobs, chunksize=64), strict=True))
    remaining = iter(run_jobs([job for job in jobs if keys[job] not in known], processes))
    fresh: dict[str, Any] = {}
    try:
        for job in jobs:
            entry = known.get(keys[job] or "")
            report = next(remaining) if entry is None else _as_report(job, entry)
            if entry is None and keys[job] is not None and not report.failures:
                fresh[str(keys[job])] = asdict(report.code)
            yield report
    finally:
        if fresh:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(known | fresh))


def _as_report(job: Job, entry: Mapping[str, Any]) -> Report:
    hopper = entry["hopper"]
    code = Code(**{**entry, "hopper": hopper and HopperCode(**hopper)})
    return Report(job, replace(code, warnings=tuple(code.warnings)), ())


# the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``compile-report``."""
    parser.description = "Compile every Triton kernel for GPUs that need not be here."
    parser.add_argument(
        "--arch",
        nargs="+",
        default=[MAIN],
        choices=["all", *ARCHITECTURES],
        help="default: sm_90",
    )
    parser.add_argument("--kernel", help="only kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="processes; default: 2")
    parser.add_argument(
        "--check", action="store_true", help="print failures only, and exit with 1 if there are any"
    )
    parser.add_argument(
        "--cache", type=Path, help="a file that keeps what passed, by the hash of its source"
    )
    parser.add_argument(
        "--write-budget", action="store_true", help="take the code for sm_90 as the new budget"
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
    cases = _read_budget()
    num_failed = 0
    reports = []
    for report in run_cached(jobs, options.jobs, options.cache):
        reports.append(report)
        failures = report.failures
        if cases is not None and not options.write_budget:
            failures += compare_with_budget(report, cases)
        num_failed += bool(failures)
        if not options.check:
            print(_line(_labels(report.job), widths, _counts(report.code)), *failures, flush=True)
        elif failures:
            job = report.job
            where = f"{job.arch} {job.kernel} ({job.variant}; {job.setting})"
            print(f"{where}: {'; '.join(failures)}", flush=True)
    if options.write_budget:
        budget = make_budget(reports)
        if options.kernel is not None:
            # for the other kernels, the former budget
            budget["cases"] = dict(sorted({**(cases or {}), **budget["cases"]}.items()))
        write_budget(budget, BUDGET)
    seconds = time.monotonic() - start
    print(f"compile gate: {len(jobs)} cases, {num_failed} failures, {seconds:.0f} s")
    return 1 if options.check and num_failed else 0


def _read_budget() -> Mapping[str, Any] | None:
    """The budget's cases, or None under another compiler than it was written with."""
    import triton

    budget: dict[str, Any] = json.loads(BUDGET.read_text()) if BUDGET.exists() else {"triton": None}
    if budget["triton"] != triton.__version__:
        print(f"no budget: it is for Triton {budget['triton']}, not for {triton.__version__}")
        return None
    cases: Mapping[str, Any] = budget["cases"]
    return cases


_COUNTS = (
    "regs", "spills", "shared", "tmem", "tensor", "async", "per SM", "instrs", "loop", "flight",
    "copy", "L2 B",
)  # fmt: skip


def _counts(code: Code) -> list[str]:
    counts = [
        code.registers, code.spills, code.shared, code.tensor_memory, code.tensor_cores,
        code.async_copies, code.programs,
    ]  # fmt: skip
    if (hopper := code.hopper) is None:
        return [*map(str, counts), *("-" * (len(_COUNTS) - len(counts)))]
    loop = sum(hopper.loop.values())
    counts += [hopper.instructions, loop, hopper.in_flight, hopper.copy_bytes]
    return [*map(str, counts), f"{hopper.l2_bytes:g}"]


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
