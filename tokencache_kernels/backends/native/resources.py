"""Resources of the built CUDA kernels, read from the library without a GPU."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from . import loading

# template arguments as the compiler writes them in a kernel's name; numbers stay numbers
_ARGUMENT = r"__half|__nv_bfloat16|uint4|(?<=I)[fmjth]|(?<=Li)\d+|Lb[01]"
_WORDS = {
    "__half": "float16", "__nv_bfloat16": "bfloat16", "f": "float32", "uint4": "16 bytes",
    "m": "8 bytes", "j": "4 bytes", "t": "2 bytes", "h": "1 byte", "Lb0": "no", "Lb1": "yes",
}  # fmt: skip


@dataclass(frozen=True)
class KernelResources:
    """One kernel's code for one architecture.

    Attributes:
        arch: ``sm_80``.
        kernel: its name, without its namespaces.
        variant: its template arguments.
        registers: of a thread.
        local: bytes of a thread in local memory, where spilled registers go.
        shared: bytes of shared memory of a block, beside those that the launch asks for.
    """

    arch: str
    kernel: str
    variant: str
    registers: int
    local: int
    shared: int

    @property
    def failure(self) -> str | None:
        """Name the fault of the code, or return None."""
        return f"{self.local} bytes of registers in memory" if self.local > 0 else None


def read_resources(path: Path | None = None) -> list[KernelResources]:
    """The kernels of a library with CUDA code, or of the installed one, by architecture and name.

    The build has kept the report of the installed library

    Raises:
        FileNotFoundError: the library was not built, or there is no cuobjdump to read it with.
    """
    kept = loading.built_resources() if path is None else ""
    path = loading.cuda_library_path() if path is None else path
    if not path.is_file():
        raise FileNotFoundError("the CUDA half of the native library was not built")
    if kept:
        return parse_resources(kept)
    command = [_find_cuobjdump(), "-res-usage", str(path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return parse_resources(printed)


def parse_resources(printed: str) -> list[KernelResources]:
    """Parse the output of ``cuobjdump -res-usage``."""
    found, arch = [], ""
    lines = iter(printed.splitlines())
    for line in lines:
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif line.startswith(" Function "):
            usage = {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", next(lines))}
            kernel, variant = _split_name(line.split()[1])
            local = usage["STACK"] + usage["LOCAL"]
            found.append(
                KernelResources(arch, kernel, variant, usage["REG"], local, usage["SHARED"])
            )
    return sorted(found, key=lambda one: (int(re.sub(r"\D", "", one.arch)), one.kernel))


def summarise_resources() -> str:
    """One line on all kernels of the installed library, or why there is none."""
    try:
        kernels = read_resources()
    except FileNotFoundError as error:
        return f"none: {error}"
    archs = ", ".join(dict.fromkeys(one.arch for one in kernels))
    spilling = sum(one.failure is not None for one in kernels)
    most = max(one.registers for one in kernels)
    return f"{len(kernels)} for {archs}; at most {most} registers, {spilling} that spill"


def _split_name(mangled: str) -> tuple[str, str]:
    """``attention_kernel`` and ``bfloat16, 128``."""
    match = re.search(r"\d([a-z_]+_kernel)(?:(I.*?E)Ev|E)", mangled)
    if match is None:
        return mangled.rstrip(":"), ""
    arguments = re.findall(_ARGUMENT, match[2] or "")
    return match[1], ", ".join(_WORDS.get(word, word) for word in arguments)


def _find_cuobjdump() -> str:
    """The toolkit's, or the one in Triton's wheel."""
    found = shutil.which("cuobjdump")
    if found is not None:
        return found
    try:
        from triton import knobs
    except ImportError:
        raise FileNotFoundError("there is no cuobjdump (a CUDA toolkit or Triton has it)") from None
    path: str = knobs.nvidia.cuobjdump.path
    return path
