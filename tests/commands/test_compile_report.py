import argparse
import ast
import json
import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from tokencache_kernels.commands import compile_report
from tokencache_kernels.commands.compile_report import (
    ARCHITECTURES,
    Code,
    Job,
    Report,
    compare_with_budget,
    count_programs,
    judge_code,
    make_budget,
    write_budget,
)
from tokencache_kernels.commands.machine_code import HopperCode

HERE = Path(__file__).parent
KERNELS = Path(compile_report.__file__).parents[1] / "backends/triton"


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """The folder of Triton's compilations here."""
    path = tmp_path_factory.mktemp("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(path))
        # worker processes inherit the path
        patch.syspath_prepend(str(HERE))
        yield path


@pytest.fixture(scope="module")
def reports():
    """The report on every toy kernel, by architecture and variant."""
    jobs = compile_report.find_jobs(["toy_kernels"], ["sm_80", "sm_90", "sm_100", "sm_120"])
    reports = compile_report.run_jobs(jobs, processes=2)
    return {(r.job.arch, r.job.kernel, r.job.variant): r for r in reports}


def failures(reports, kernel, variant, arch="sm_90"):
    return reports[arch, kernel, variant].failures


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_good_kernels_pass(reports, arch):
    assert failures(reports, "_add_one_kernel", "good", arch) == ()
    assert failures(reports, "_matmul_kernel", "good", arch) == ()
    matmul = reports[arch, "_matmul_kernel", "good"].code
    assert min(matmul.registers, matmul.shared, matmul.tensor_cores, matmul.async_copies) > 0
    assert (matmul.tensor_memory > 0) == (arch == "sm_100")


def test_equal_cases_are_compiled_once(reports):
    assert ("sm_90", "_add_one_kernel", "the same again") not in reports


def test_spilling_fails(reports):
    (failure,) = failures(reports, "_centre_kernel", "spilling")
    assert failure.endswith("bytes of registers are spilled to memory")


def test_too_much_shared_memory_fails(reports):
    expected = ("262144 bytes of shared memory pass 232448",)
    assert failures(reports, "_matmul_kernel", "oversized") == expected


def test_a_gemm_on_unaligned_rows_fails_for_want_of_asynchronous_copies(reports):
    expected = ("a GEMM without asynchronous copies",)
    assert failures(reports, "_matmul_kernel", "unaligned") == expected


def test_serialised_wgmma_fails(reports):
    expected = ("the assembler warns of C7515 (C7515: serial wgmma)",)
    assert failures(reports, "_attention_kernel", "E=64 bf16") == expected


def test_a_gemm_without_dot_fails_for_want_of_tensor_cores(reports):
    assert "a GEMM without wgmma.mma_async" in failures(
        reports, "_outer_sum_kernel", "without tensor cores"
    )


def test_a_gemm_that_falls_back_to_older_tensor_cores_fails(reports):
    # two warps are less than the warp group that Hopper's instruction wants
    assert failures(reports, "_matmul_kernel", "two warps") == ("a GEMM without wgmma.mma_async",)


def test_an_error_of_the_compiler_is_told_in_one_line(reports):
    (failure,) = failures(reports, "_mismatched_kernel", "ill-typed")
    assert failure.startswith("does not compile: ")
    assert "incompatible dimensions" in failure
    assert "\n" not in failure


def test_a_crash_of_the_compiler_fails_its_own_case_only(reports):
    expected = ("does not compile: the compiler crashed",)
    assert failures(reports, "_crash_kernel", "crashing", "sm_80") == expected
    assert failures(reports, "_add_one_kernel", "after the crash", "sm_80") == ()


def test_a_case_must_fit_its_kernel(reports):
    (incomplete,) = failures(reports, "_add_one_kernel", "incomplete")
    (overaligned,) = failures(reports, "_add_one_kernel", "overaligned")

    assert "a type or a value, got ['N']" in incomplete
    assert "align what a launch does not specialise, got ['N']" in overaligned


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        (Code(tensor_cores=1, async_copies=1), None),
        (Code(tensor_cores=1, async_copies=1, spills=4), "4 bytes of registers"),
        (Code(tensor_cores=1, async_copies=1, shared=232448), None),
        (Code(tensor_cores=1, async_copies=1, shared=232449), "232449 bytes"),
        (Code(tensor_cores=1, async_copies=1, tensor_memory=1024), "1024 columns"),
        (Code(async_copies=1), "without tcgen05.mma"),
        (Code(tensor_cores=1), "without asynchronous"),
        (Code(tensor_cores=1, async_copies=1, warnings=("C7510",)), "C7510"),
        (Code(tensor_cores=1, async_copies=1, hopper=HopperCode(copy_bytes=16)), None),
        (Code(tensor_cores=1, async_copies=1, hopper=HopperCode(copy_bytes=4)), "by 4 bytes"),
        (Code(tensor_cores=1, async_copies=1, hopper=HopperCode(hazards=1)), "1 writes"),
    ],
)
def test_every_rule_judges_alone(code, failure):
    found = judge_code(code, True, ARCHITECTURES["sm_100"])

    assert [failure in sentence for sentence in found] == [True] * (failure is not None)


def test_only_a_gemm_needs_tensor_cores():
    assert judge_code(Code(), False, ARCHITECTURES["sm_90"]) == ()


# instructions of the machine, by architecture
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA", 120: "HMMA"}


def test_the_machine_code_holds_what_was_counted_before_the_assembler(reports, own_cache):
    counted = {
        (ARCHITECTURES[report.job.arch].device.arch, code.tensor_cores, code.async_copies)
        for report in reports.values()
        if report.job.kernel == "_matmul_kernel" and (code := report.code)
    }

    assembled = set()
    for cubin in own_cache.rglob("_matmul_kernel.cubin"):
        arch = json.loads(cubin.with_suffix(".json").read_text())["target"]["arch"]
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
        sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        num_tensor_cores = len(re.findall(rf"\b{TENSOR_CORES[arch]}\b", sass))
        assembled.add((arch, num_tensor_cores, len(re.findall(r"\bLDGSTS\b", sass))))

    assert assembled == counted


def test_a_second_run_compiles_nothing(reports, tmp_path, monkeypatch):
    jobs = [r.job for r in reports.values() if r.job.variant == "good" and r.job.arch == "sm_90"]
    cache = tmp_path / "gate.json"

    first = list(compile_report.run_cached(jobs, 1, cache))
    monkeypatch.setattr(compile_report, "compile_job", None)
    monkeypatch.setattr(compile_report, "run_jobs", lambda jobs, _: iter(jobs))
    second = list(compile_report.run_cached(jobs, 1, cache))

    assert len(first) == 2
    assert second == first


def test_what_failed_is_not_kept(reports, tmp_path):
    jobs = [r.job for r in reports.values() if r.job.variant == "two warps"]
    cache = tmp_path / "gate.json"

    (report,) = compile_report.run_cached(jobs, 1, cache)

    assert report.failures
    assert not cache.exists()


def test_every_kernel_for_hopper_is_read(reports):
    matmul = reports["sm_90", "_matmul_kernel", "good"].code.hopper

    # 128 rows and columns by 64 steps of two bytes, in the clocks that 4 x 2 wgmma of 64 rows take
    assert matmul.l2_bytes == 64
    assert matmul.copy_bytes == 16
    assert matmul.in_flight == 1
    assert matmul.loop["HGMMA"] == 4
    assert reports["sm_80", "_matmul_kernel", "good"].code.hopper is None


@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "programs"),
    [(128, 0, 8, 2), (129, 0, 8, 1), (64, 98304, 8, 2), (64, 120000, 8, 1), (16, 0, 4, 16)],
)
def test_programs_of_a_multiprocessor(registers, shared, num_warps, programs):
    assert count_programs(registers, shared, num_warps, 227 * 1024) == programs


# the budget


def report_of(registers=100, instructions=500, **loop):
    hopper = HopperCode(instructions=instructions, loop=loop)
    job = Job("module", "sm_90", 0, "_linear_kernel", "none bf16", "block_m=128")
    return Report(job, Code(registers=registers, hopper=hopper), ())


def test_a_kernel_within_its_budget_passes(tmp_path):
    path = tmp_path / "budget.json"
    write_budget(make_budget([report_of(HGMMA=4, MOV=9)]), path)
    budget = json.loads(path.read_text())

    assert compare_with_budget(report_of(HGMMA=4, MOV=9), budget["cases"]) == ()
    assert compare_with_budget(report_of(90, 480, HGMMA=4, MOV=3), budget["cases"]) == ()


def test_more_than_the_budget_fails_with_the_difference():
    cases = make_budget([report_of(HGMMA=4, MOV=9)])["cases"]

    failures = compare_with_budget(report_of(120, 510, HGMMA=4, MOV=8, IMAD=3), cases)

    assert failures == (
        "instructions: 500 -> 510",
        "registers: 100 -> 120",
        "hot loop: 13 -> 15 instructions (IMAD +3, MOV -1)",
    )


def test_a_kernel_that_the_budget_does_not_know_fails():
    (failure,) = compare_with_budget(report_of(), {})

    assert failure.startswith("not in the budget")


# the kernels of this package


@pytest.fixture(scope="module")
def package_jobs():
    return compile_report.find_jobs(None, ["sm_90"])


def test_every_kernel_of_the_package_is_compiled(package_jobs):
    kernels = {
        node.name
        for path in KERNELS.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }

    assert {job.kernel for job in package_jobs} == kernels


def test_every_kernel_of_the_package_compiles_for_hopper(package_jobs):
    # its first case only; `tokencache compile-report --arch all --check` takes them all
    first = {job.kernel: job for job in reversed(package_jobs)}

    reports = list(compile_report.run_jobs(list(first.values()), processes=2))

    assert [report for report in reports if report.failures] == []


def test_an_early_start_waits_before_it_touches_memory(package_jobs, own_cache):
    early = {job.kernel: job for job in package_jobs if job.variant.endswith("early")}
    assert len(early) == 5

    reports = list(compile_report.run_jobs(list(early.values()), processes=2))

    assert [report for report in reports if report.failures] == []
    codes = [path.read_text() for name in early for path in own_cache.rglob(f"{name}.ptx")]
    waiting = [code for code in codes if "griddepcontrol.wait" in code]
    assert len(waiting) >= len(early)
    for code in waiting:
        memory = re.search(r"\b(ld|st|atom|red|cp\.async\S*)\.\S*global", code)
        assert code.index("griddepcontrol.wait") < memory.start()


# the command


def run_command(capsys, *arguments):
    parser = argparse.ArgumentParser()
    compile_report.add_arguments(parser)
    status = compile_report.run(parser.parse_args(arguments))
    return status, capsys.readouterr().out.splitlines()


@pytest.fixture
def judged(reports, monkeypatch):
    """Lets the command find the toy kernels, as they were judged above."""

    def find_jobs(modules, archs, kernel=None):
        jobs = [report.job for report in reports.values()]
        return [job for job in jobs if job.arch in archs and (kernel or "") in job.kernel]

    by_job = {report.job: report for report in reports.values()}
    monkeypatch.setattr(compile_report, "find_jobs", find_jobs)
    monkeypatch.setattr(compile_report, "run_jobs", lambda jobs, _: (by_job[job] for job in jobs))
    # these kernels are in no budget
    monkeypatch.setattr(compile_report, "_read_budget", lambda: None)


def test_the_command_compiles_the_kernels_of_the_package(capsys):
    status, lines = run_command(capsys, "--arch", "sm_120", "--kernel", "_gather_rows", "--check")

    assert status == 0
    assert re.fullmatch(r"compile gate: \d+ cases, 0 failures, \d+ s", lines[-1])


def test_the_report_is_a_table_with_one_line_a_case(judged, capsys):
    status, lines = run_command(capsys, "--arch", "sm_90", "--kernel", "_add_one")

    assert status == 0
    assert lines[0].split()[:4] == ["arch", "kernel", "variant", "setting"]
    assert lines[1].split()[:4] == ["sm_90", "_add_one_kernel", "good", "block=1024"]
    assert "overaligned" in lines[2]
    assert "does not compile" in lines[2]
    assert lines[-1].startswith("compile gate: 3 cases, 2 failures, ")


def test_check_prints_the_failures_and_exits_with_1(judged, capsys):
    status, lines = run_command(capsys, "--check", "--kernel", "_mismatched")

    assert status == 1
    assert len(lines) == 2
    assert lines[0].startswith("sm_90 _mismatched_kernel (ill-typed; ): does not compile: ")


def test_check_exits_with_0_when_all_is_well(judged, capsys):
    status, lines = run_command(capsys, "--check", "--arch", "sm_100", "--kernel", "_add_one")

    assert status == 0
    assert len(lines) == 1


def test_all_architectures_are_reported_together(judged, capsys):
    _, lines = run_command(capsys, "--arch", "all", "--kernel", "_matmul")

    assert {"sm_80", "sm_90", "sm_100", "sm_120"} == {line.split()[0] for line in lines[1:-1]}


def test_an_unknown_kernel_is_said_to_be_one(judged, capsys):
    status, lines = run_command(capsys, "--kernel", "no such thing")

    assert status == 2
    assert lines == [
        "compile-report: --kernel must be part of a kernel's name, got 'no such thing'"
    ]
