"""Time every attention that can run here, for the table of ``tokencache_kernels/backends``.

``python -m benchmarks.attention --out FILE`` appends one record for each contender to FILE, and
prints each problem's order, best first.
"""

import argparse
from pathlib import Path
from statistics import median, quantiles

import torch

from tokencache_kernels import backends
from tokencache_kernels.backends import library

from .records import append_record, describe_run
from .timing import time_in_turn

# B, S, N, H, E: all queries, fresh ones, and fresh ones over a text
SHAPES = {
    "dit-xl-256px": (2, 256, 256, 16, 72),
    "dit-xl-256px-fresh": (2, 43, 256, 16, 72),
    "pixart-1024px-text": (2, 1024, 120, 16, 72),
    "flux-1024px-fresh": (1, 191, 4608, 24, 128),
    "flux-1024px": (1, 4608, 4608, 24, 128),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the file of records to append to")
    parser.add_argument("--only", default="", help="shapes with this in their name")
    parser.add_argument("--samples", type=int, default=20, help="of each contender; default: 20")
    parser.add_argument("--commit", help="the commit of a tree without history")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = describe_run(device, options.commit)
    for shape, sizes in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            if options.only in shape:
                records = time_problem(shape, sizes, dtype, device, options.samples)
                for record in records:
                    append_record(options.out, {**record, **facts})
                ranks = (f"{r['backend']} {r['median_ms']:.3f} ms" for r in records)
                print(f"{shape} {dtype}: {', '.join(ranks)}", flush=True)


def time_problem(shape, sizes, dtype, device, samples):
    """One record a contender, the fastest first."""
    B, S, N, H, E = sizes
    inputs = [torch.randn(B, length, H, E, dtype=dtype, device=device) for length in (S, N, N)]
    contenders = {
        name: lambda run=run: run(*inputs, None, E**-0.5)
        for name, run in list_contenders(inputs, dtype, device)
    }
    for run in contenders.values():
        run()
    seconds = time_in_turn(contenders, device, samples, max_repeats=100)
    records = [
        {
            "case": "attention",
            "shape": shape,
            "sizes": dict(zip("BSNHE", sizes, strict=True)),
            "dtype": str(dtype).removeprefix("torch."),
            "backend": name,
            "baseline": name != "triton",
            "mode": "stream",
            "median_ms": 1e3 * median(times),
            "p20_ms": 1e3 * quantiles(times, n=5)[0],
            "p80_ms": 1e3 * quantiles(times, n=5)[-1],
            "runs": len(times),
            "input_sets": 1,
            "bytes": 2 * B * (S + N) * H * E * dtype.itemsize,
            "flops": 4 * B * S * N * H * E,
            "rehearsal": False,
        }
        for name, times in seconds.items()
    ]
    return sorted(records, key=lambda record: record["median_ms"])


def list_contenders(inputs, dtype, device):
    """The libraries that take this problem, and the backends of ours that do."""
    for name, candidate in library.CANDIDATES.items():
        if candidate.refusal(*inputs, None) is None:
            yield name, candidate.run
    for name in ("triton", "reference"):
        if backends.unavailable(name, "attention", device, dtype) is None:
            yield name, backends.load(name).attention


if __name__ == "__main__":
    main()
