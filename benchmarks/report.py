"""Write the README's tables from the records: ``python -m benchmarks.report``.

A table stands between two comments, ``<!-- table: NAME -->`` and ``<!-- end of table -->``; what is
between them is replaced, so that no figure there is typed by hand.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
EVALUATIONS = ROOT / "tokencache_kernels" / "demo" / "records" / "evaluate.jsonl"


def read_records(path):
    """The records of a JSON-lines file; of several with one policy the last counts."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return list({record["policy"]: record for record in records}.values())


def write_quality_table():
    """Policies of the demo model: how good the digits are, and what they cost."""
    records = read_records(EVALUATIONS)
    lines = [
        "| policy | fewer FLOPs | speed-up | Fréchet distance | as labelled | PSNR to dense |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        speedup, fidelity = record["speedup"], record["psnr_to_dense"]
        lines.append(
            f"| {record['policy']} | {record['flops_ratio']:.2f}x"
            f" | {'1' if speedup is None else format(speedup, '.2f')}x"
            f" | {record['frechet_distance']:.2f} | {record['accuracy']:.1%}"
            f" | {'-' if fidelity is None else format(fidelity, '.1f') + ' dB'} |"
        )
    last = records[-1]
    lines += [
        "",
        f"{last['samples']} digits each, {last['dense_steps']} DDIM steps, guidance "
        f"{last['guidance']}, {last['device']}, backend `{last['backend']}`, torch "
        f"{last['torch']}; load average while measuring "
        f"{min(r['load_average'] for r in records):.1f} to "
        f"{max(r['load_average'] for r in records):.1f}, so read the speed-ups as rough. Real "
        f"digits among themselves: Fréchet distance {last['frechet_distance_of_real']:.2f}.",
    ]
    return "\n".join(lines)


TABLES = {"quality": write_quality_table}


def fill(text):
    """The text with every table written anew."""
    for name, write in TABLES.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end of table -->)"
        text, count = re.subn(
            pattern, lambda m, w=write: f"{m[1]}{w()}\n{m[2]}", text, flags=re.DOTALL
        )
        assert count == 1, f"README.md must hold one table called {name}, holds {count}"
    return text


if __name__ == "__main__":
    README.write_text(fill(README.read_text()))
