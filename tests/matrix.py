"""Run the op suite in environments with other versions of Python, torch, Triton and diffusers.

``make matrix`` runs them all; ``python tests/matrix.py --only triton-3.9`` runs one. Each gets an
environment of its own under ``build/matrix``. Downloads can be large: from a public index torch
brings its CUDA packages. The record, ``tests/matrix.json``, is what README says of versions.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "matrix.json"
TOOLS = (
    "accelerate", "bitsandbytes", "gguf", "hypothesis", "mlxtend", "matplotlib", "peft", "pytest",
    "pytest-benchmark", "pytest-xdist", "safetensors", "torchao", "tqdm",
)  # fmt: skip
OPS = ("tests/ops", "tests/backends", "tests/blocks", "tests/cache", "tests/policies")
MODELS = (
    "tests/integrations/test_dit.py", "tests/integrations/test_pixart.py",
    "tests/integrations/test_flux.py", "tests/integrations/test_models.py",
    "tests/integrations/test_neighbours.py",
)  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """Versions that are tried together.

    Attributes:
        name: what the environment is called.
        python: the interpreter's version.
        torch: the version of torch.
        triton: the version of Triton.
        diffusers: the version of diffusers.
        numpy: a requirement; Triton's interpreter before 3.7 needs an older NumPy.
        tests: the tests that are run.
    """

    name: str
    python: str = "3.11"
    torch: str = "2.13.0"
    triton: str = "3.6.0"
    diffusers: str = "0.42.1"
    numpy: str = "numpy<2.4"
    tests: tuple[str, ...] = OPS

    @property
    def requirements(self) -> list[str]:
        """The requirements that pip is given, after torch."""
        return [f"triton=={self.triton}", f"diffusers=={self.diffusers}", self.numpy, *TOOLS]


ENVIRONMENTS = (
    Environment("triton-3.5", triton="3.5.1"),
    Environment("triton-3.7", triton="3.7.1"),
    Environment("triton-3.8", triton="3.8.0"),
    Environment("triton-3.9", triton="3.9.0"),
    Environment("diffusers-0.41", diffusers="0.41.0", tests=MODELS),
    Environment("diffusers-0.42", diffusers="0.42.0", tests=MODELS),
    Environment("python-3.10", python="3.10"),
    Environment("python-3.12", python="3.12"),
    Environment("python-3.13", python="3.13"),
    Environment("torch-2.10", torch="2.10.0"),
    Environment("torch-2.15", torch="2.15.0", triton="3.9.0"),
)


def prepare(environment: Environment) -> Path:
    """Make an environment, or use the one made before; return its Python."""
    folder = ROOT / "build" / "matrix" / environment.name
    python = folder / "bin" / "python"
    if not python.exists():
        found = shutil.which(f"python{environment.python}")
        if found is None:
            raise SystemExit(f"matrix: there is no python{environment.python}")
        subprocess.run([found, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, f"torch=={environment.torch}"], check=True)
    subprocess.run([*pip, *environment.requirements], check=True)
    return python


def run(environment: Environment, workers: int) -> dict[str, object]:
    """Run the tests in an environment; return the versions, the counts and the failures."""
    python = prepare(environment)
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", "-n", str(workers)]
    done = subprocess.run(
        [*command, *environment.tests], cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    counts = {
        word: int(number)
        for number, word in re.findall(
            r"(\d+) (passed|failed|skipped|errors?)", done.stdout[-2000:]
        )
    }
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, flags=re.MULTILINE)
    if not counts:
        failures.append(f"no tests ran: {(done.stdout + done.stderr)[-300:]}")
    return {**asdict(environment), "counts": counts, "failures": failures}


def main() -> int:
    """Run the environments that are asked for and write the record; return 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="names of environments; default: all")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    names = arguments.only or [one.name for one in ENVIRONMENTS]
    records = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    is_good = True
    for one in ENVIRONMENTS:
        if one.name in names:
            records[one.name] = record = run(one, arguments.workers)
            RECORD.write_text(json.dumps(records, indent=2) + "\n")
            print(one.name, record["counts"], *record["failures"], sep="\n  ")
            is_good = is_good and not record["failures"]
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
