"""The run book for a machine with a GPU, in stages that each fit a short slot.

    python -m benchmarks.gpu --stage kernels|attention|layers|models --out DIR --budget SECONDS

``kernels`` times the ops and then looks for better launch settings, ``attention`` orders the
attentions, ``layers`` and ``models`` time larger parts. Everything printed is in DIR/STAGE.log too,
every measurement a line of DIR/STAGE.jsonl. A stage ends with its budget and resumes when it is
called again. ``--rehearse`` is a dry run on tiny inputs, on any machine. Its times mean nothing.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import NoReturn, TextIO

ROOT = Path(__file__).parents[1]
# each names a module of this package with ``run_stage(options, deadline) -> status``
STAGES = ("kernels", "attention", "layers", "models")
# called by themselves: the second half of kernels, and the installation of the results
EXTRA_STAGES = ("tune", "install")
# after these, tuned settings are in use already, as they would be once installed
WITH_TUNED_SETTINGS = ("attention", "layers", "models")
# a stage that has not ended so long after its budget is killed
GRACE_SECONDS = 20
# of benchmarks/stages.py, which imports torch: this process must not
GO_ON = 3


def main() -> int:
    """Run one stage in processes of its own, or be such a process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--stage", choices=STAGES + EXTRA_STAGES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the folder for what is found")
    parser.add_argument("--budget", type=float, default=540, help="seconds; 540 if not given")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda where there is one")
    parser.add_argument(
        "--only", default="", help="cases with one of these, between commas, in op/shape/dtype"
    )
    parser.add_argument("--no-compiled", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-tuning", action="store_true", help="leave the tuning out")
    parser.add_argument("--grace", type=float, default=GRACE_SECONDS, help=argparse.SUPPRESS)
    parser.add_argument("--commit", help="what is measured, where the tree has no git history")
    parser.add_argument("--rehearse", action="store_true", help="tiny inputs, few repeats")
    # for the worker process: the session and the deadline
    parser.add_argument("--session", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    return supervise(options) if options.session is None else work(options)


def supervise(options: argparse.Namespace) -> int:
    """Let processes work on the stage, one after the other dies, until it is done or time is up."""
    deadline = time.monotonic() + options.budget
    now = datetime.now(timezone.utc)
    command = [
        *(sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]),
        *("--session", f"{now.isoformat()}-{os.getpid()}", "--deadline", str(deadline)),
    ]
    at = options.out / "at.json"
    at.unlink(missing_ok=True)
    with (options.out / f"{options.stage}.log").open("a") as log:
        log.write(f"\n{now.isoformat(timespec='seconds')} {' '.join(sys.argv[1:])}\n")
        while True:
            status = run_logged(command, log, deadline + options.grace)
            if status is None:
                say("the budget is spent: what was at work is left for another call", log)
                at.unlink(missing_ok=True)
                return 0
            if at.exists():
                say(f"{record_death(at, status)}; another process goes on", log)
            elif status == GO_ON:
                say("another process goes on", log)
            else:
                return status


def record_death(at: Path, status: int) -> str:
    """Record that the work named in ``at`` ended its process; return the error."""
    begun = json.loads(at.read_text())
    cause = signal.Signals(-status).name if status < 0 else f"status {status}"
    error = f"the process ended with {cause}"
    utc = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with Path(begun["path"]).open("a") as file:
        file.write(json.dumps({**begun["record"], "error": error, "utc": utc}) + "\n")
    at.unlink()
    return error


def run_logged(command: list[str], log: TextIO, deadline: float) -> int | None:
    """Run a command, all it says into the log as well; its status, or None if it had no time."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True, env=make_environment(),
    )  # fmt: skip
    # in a thread: a child of the command may hold the pipe open after its end
    reader = threading.Thread(target=pass_on, args=(process.stdout, log), daemon=True)
    reader.start()
    try:
        return process.wait(max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        # its children too
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(5)


def make_environment() -> dict[str, str]:
    """Make the environment of a stage: with unpacked wheels, and unbuffered output."""
    unpacked = ROOT / "build" / "site-packages"
    search = {
        name: os.pathsep.join(filter(None, (str(folder), os.environ.get(name))))
        for name, folder in (("PYTHONPATH", unpacked), ("PATH", unpacked / "bin"))
    }
    return {**os.environ, **search, "PYTHONUNBUFFERED": "1"}


def pass_on(said: TextIO, log: TextIO) -> None:
    """Print the output of another process, and keep it."""
    with said:
        for line in said:
            say(line.rstrip("\n"), log)


def say(line: str, log: TextIO) -> None:
    """Print a line, and keep it."""
    print(line, flush=True)
    log.write(line + "\n")
    log.flush()


def work(options: argparse.Namespace) -> NoReturn:
    """Do the work of a stage in this process, and end it."""
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # not before: torch looks for devices, and Triton for TRITON_INTERPRET, once
    import torch

    options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.rehearse and options.device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    tuned = options.out / "launch-settings.json"
    if options.stage in WITH_TUNED_SETTINGS and tuned.exists() and not options.rehearse:
        os.environ.setdefault("TOKENCACHE_LAUNCH_SETTINGS", str(tuned.resolve()))
    run_stage = importlib.import_module(f".{options.stage}", __package__).run_stage
    try:
        status = run_stage(options, options.deadline)
    except SystemExit as end:
        status = end.code
    # at once: after the loss of a device, the end of a process may crash it
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
