"""``python -m benchmarks.peers``: the demo's model under other people's caches and under ours.

All contenders sample the same digits, chunk by chunk in turn, so that whatever slows the machine
slows all of them. A chunk of a contender is one record in ``--out``; a run that was broken off goes
on after the last one. ``--report`` writes docs/quality.md from the records and samples nothing.

cache-dit is optional (``pip install cache-dit``); without it, or another library, its contenders
are left out, and that is said. cache-dit 1.5.3 knows no DiT: the shim here hands the block through
that diffusers' model reads its conditioning from.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from tokencache_kernels.demo.classifier import classify, load_classifier
from tokencache_kernels.demo.data import NUM_CLASSES, load_digits
from tokencache_kernels.demo.methods import applied, parse_method
from tokencache_kernels.demo.metrics import frechet_distance, psnr
from tokencache_kernels.demo.model import load_model
from tokencache_kernels.demo.sampling import GUIDANCE, STEPS, sample

from .records import append_record, describe_run, read_records

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "results" / "peers" / "records.jsonl"
PAGE = ROOT / "docs" / "quality.md"
FIRST_SEED = 9000

OURS = (
    "fewer-25", "fewer-16", "fewer-12", "fewer-8", "fora-3", "taylor1-3", "toca-3", "toca1-3",
    "duca-3", "tokencache", "tokencache1", "l2c", "l2c1", "l2c-last", "even1-17", "even1-12",
    "carried2-25", "carried2-16", "carried2-12", "carried2-8", "calibrated-24", "calibrated-16",
    "calibrated-12", "calibrated-11", "calibrated-8", "calibrated-7",
)  # fmt: skip
PEERS = (
    *(f"taylorseer-{interval}-{order}" for order in (1, 2) for interval in (2, 3, 4, 6)),
    *(f"taylorseer-lite-{interval}-1" for interval in (2, 3, 4, 6)),
    "firstblock-.02", "firstblock-.04", "firstblock-.08", "firstblock-.16",
    "magcache-.03", "magcache-.06", "magcache-.12", "magcache-.24",
    "dbcache-.03", "dbcache-.06", "dbcache-.12", "dbcache-taylor-.06", "dbcache-taylor-.12",
)  # fmt: skip
# measured speed-up: mean and worst PSNR that were aimed at, in dB
GOALS = {2: (53, 47), 3: (48, 43), 4: (44, 38), 6: (37, 31)}

# how far the worst digit of a trained policy may lie below its mean, in dB
MAX_TAIL = 8

GLYPHS = RECORDS.with_name("glyphs.json")
# fewer digits hide a tail
FEWEST_FOR_TAIL = 20

Reset = Callable[[], object]


def make_contender(name: str, mag_ratios: Callable[[], list[float]]) -> tuple[Any, Reset]:
    """Load a model of its own for the contender; return it with the function that begins a new run.

    Raises:
        ImportError: the library is not installed.
        ValueError: there is no such contender, or its files are missing.
    """
    model = load_model()
    if match := re.fullmatch(r"taylorseer(-lite)?-(\d+)-(\d)", name):
        from diffusers import TaylorSeerCacheConfig
        from diffusers.hooks import apply_taylorseer_cache

        modules: dict[str, list[str]] = {
            "cache_identifiers": [r"^transformer_blocks\.\d+\.(attn1|ff)$"]
        }
        if match[1]:
            # its own patterns for this mode know another name of the last layer
            modules = {
                "cache_identifiers": [r"^proj_out_2$"],
                "skip_predict_identifiers": [r"^transformer_blocks\.\d+$"],
            }
        config = TaylorSeerCacheConfig(
            cache_interval=int(match[2]), max_order=int(match[3]),
            taylor_factors_dtype=torch.float32, **modules,
        )  # fmt: skip
        apply_taylorseer_cache(model, config)
        return model, lambda: _begin_diffusers(model)
    if match := re.fullmatch(r"firstblock-(\.\d+)", name):
        from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

        apply_first_block_cache(model, FirstBlockCacheConfig(threshold=float(match[1])))
        return model, lambda: _begin_diffusers(model)
    if match := re.fullmatch(r"magcache-(\.\d+)", name):
        from diffusers.hooks import MagCacheConfig, apply_mag_cache

        config = MagCacheConfig(
            threshold=float(match[1]), num_inference_steps=STEPS, mag_ratios=mag_ratios()
        )
        apply_mag_cache(model, config)
        return model, lambda: _begin_diffusers(model)
    if match := re.fullmatch(r"dbcache(-taylor)?-(\.\d+)", name):
        return model, _apply_cache_dit(model, float(match[2]), is_forecast=bool(match[1]))
    raise ValueError(f"contender must be one of {', '.join(PEERS)}, got {name!r}")


def _begin_diffusers(model: Any) -> None:
    """Forget the run before, and name a context, without which these caches do not work."""
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks(recurse=True)
    _set_cache_context(model, CacheContext("both_halves"))


def _apply_cache_dit(model: Any, threshold: float, is_forecast: bool) -> Reset:
    import cache_dit
    from cache_dit.caching import cache_blocks

    for cached in vars(cache_blocks).values():
        if isinstance(cached, type) and cached.__name__.startswith("CachedBlocks_Pattern_3"):
            cached.norm1 = property(lambda blocks: blocks.transformer_blocks[0].norm1)
    cache_dit.enable_cache(
        cache_dit.BlockAdapter(
            transformer=model, blocks=model.transformer_blocks, check_forward_pattern=False,
            forward_pattern=cache_dit.ForwardPattern.Pattern_3,
        ),
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=threshold,
            max_warmup_steps=4, num_inference_steps=STEPS, enable_separate_cfg=False,
        ),
        calibrator_config=(
            cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if is_forecast else None
        ),
    )  # fmt: skip
    return lambda: cache_dit.refresh_context(model, num_inference_steps=STEPS)


def measure_magnitudes(seeds: Sequence[int]) -> list[float]:
    """The mean ratio of the blocks' residual norms from step to step, as MagCache wants them."""
    model, norms = load_model(), []
    first, last = model.transformer_blocks[0], model.transformer_blocks[-1]
    entered: list[Tensor] = []
    first.register_forward_pre_hook(lambda block, given: entered.append(given[0]))
    last.register_forward_hook(
        lambda block, given, output: norms.append((output - entered.pop()).norm(dim=-1))
    )
    sample(model, [seed % NUM_CLASSES for seed in seeds], seeds)
    ratios = [(now / before).mean().item() for before, now in itertools.pairwise(norms)]
    return [1.0, *ratios]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Digits that are drawn in one batch."""

    seeds: range

    @property
    def labels(self) -> list[int]:
        """The digit of each seed."""
        return [seed % NUM_CLASSES for seed in self.seeds]


def run_chunk(model: Any, chunk: Chunk, steps: int = STEPS) -> tuple[Tensor, float, float]:
    """Draw a chunk: the images, seconds passed, and seconds of the processor's."""
    wall, cpu = time.perf_counter(), time.process_time()
    images = sample(model, chunk.labels, chunk.seeds, steps=steps, guidance=GUIDANCE)
    return images, time.perf_counter() - wall, time.process_time() - cpu


def measure(options: argparse.Namespace) -> None:
    """Draw the chunks that have no record yet."""
    chunks = [
        Chunk(range(first, min(first + options.batch, FIRST_SEED + options.samples)))
        for first in range(FIRST_SEED, FIRST_SEED + options.samples, options.batch)
    ]
    names = ["dense", *dict.fromkeys(options.contenders or (*OURS, *PEERS))]
    facts = {**describe_run(torch.device("cpu"), None), "threads": torch.get_num_threads()}
    found = read_records(options.out)
    done = {_key(record) for record in found if "contender" in record}
    models: dict[str, tuple[Any, Reset]] = {}
    magnitudes: list[float] = []

    def mag_ratios() -> list[float]:
        # the digits that calibration may see, not those that are compared
        if not magnitudes:
            magnitudes.extend(measure_magnitudes(range(100_000, 100_004)))
        return magnitudes

    with tqdm(total=len(chunks) * len(names), unit="chunk") as bar:
        for chunk in chunks:
            for name in list(names):
                bar.update()
                path = options.state / f"{name}-{chunk.seeds.start}-{chunk.seeds.stop}.safetensors"
                key = (name, chunk.seeds.start, chunk.seeds.stop, torch.get_num_threads())
                if key in done and path.exists():
                    continue
                bar.set_description(f"{name:24}")
                try:
                    images, wall, cpu = _draw(name, chunk, models, mag_ratios)
                except (ImportError, FileNotFoundError) as error:
                    tqdm.write(f"Without {name}: {error}")
                    names.remove(name)
                    continue
                options.state.mkdir(parents=True, exist_ok=True)
                save_file({"images": images}, path)
                dense = load_file(
                    options.state / f"dense-{chunk.seeds.start}-{chunk.seeds.stop}.safetensors"
                )["images"]
                record = {
                    "contender": name,
                    "first_seed": chunk.seeds.start,
                    "last_seed": chunk.seeds.stop,
                    "seconds": round(wall, 4),
                    "cpu_seconds": round(cpu, 4),
                    "load_average": round(os.getloadavg()[0], 2),
                    **facts,
                }
                if name != "dense":
                    near = psnr(images, dense).clamp_max(100)
                    record["psnr"] = [round(value, 3) for value in near.tolist()]
                append_record(options.out, record)


def _draw(
    name: str,
    chunk: Chunk,
    models: dict[str, tuple[Any, Reset]],
    mag_ratios: Callable[[], list[float]],
) -> tuple[Tensor, float, float]:
    """Draw a chunk after a first small run that warms a new contender up."""
    warm_up = Chunk(chunk.seeds[:1])
    if not _is_peer(name):
        try:
            method = parse_method(name, STEPS)
        except ValueError as error:
            raise FileNotFoundError(str(error)) from error
        if "ours" not in models:
            models["ours"] = load_model(), lambda: None
        model, _ = models["ours"]
        with applied(model, method):
            run_chunk(model, warm_up, method.steps)
            return run_chunk(model, chunk, method.steps)
    is_new = name not in models
    if is_new:
        models[name] = make_contender(name, mag_ratios)
    model, reset = models[name]
    if is_new:
        reset()
        run_chunk(model, warm_up)
    reset()
    return run_chunk(model, chunk)


def _is_peer(name: str) -> bool:
    return name.split("-")[0] in {one.split("-")[0] for one in PEERS}


def _key(record: Mapping[str, Any]) -> tuple[str, int, int, int]:
    return record["contender"], record["first_seed"], record["last_seed"], record["threads"]


def summarise(records: Sequence[dict[str, Any]], state: Path) -> list[dict[str, Any]]:
    """One record for each contender that has drawn all that the dense model has."""
    chunks = {_key(record)[1:]: record for record in records if record["contender"] == "dense"}
    classifier = load_classifier()
    _, real = classify(classifier, load_digits()[0])
    summaries = []
    for name in dict.fromkeys(record["contender"] for record in records):
        own = {_key(record)[1:]: record for record in records if record["contender"] == name}
        if own.keys() != chunks.keys():
            continue
        keys = sorted(own)
        images = [
            load_file(state / f"{name}-{first}-{last}.safetensors")["images"]
            for first, last, _ in keys
        ]
        labels = torch.tensor([seed % NUM_CLASSES for a, b, _ in keys for seed in range(a, b)])
        predicted, features = classify(classifier, torch.cat(images))
        ratios = {
            unit: sum(chunks[key][unit] for key in keys) / sum(own[key][unit] for key in keys)
            for unit in ("seconds", "cpu_seconds")
        }
        near = torch.tensor([value for key in keys for value in own[key].get("psnr", [])])
        summary = {
            "summary": name,
            "samples": len(labels),
            "speedup": round(ratios["seconds"], 3),
            "cpu_speedup": round(ratios["cpu_seconds"], 3),
            "frechet_distance": round(frechet_distance(features, real), 3),
            "accuracy": round((predicted == labels).double().mean().item(), 4),
        }
        if len(near):
            summary |= {
                "psnr_mean": round(near.mean().item(), 2),
                "psnr_percentile_5": round(near.quantile(0.05).item(), 2),
                "psnr_worst": round(near.min().item(), 2),
                "psnr_interval": round(1.96 * near.std().item() / len(near) ** 0.5, 2),
            }
        summaries.append(summary)
    return summaries


def write_page(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write docs/quality.md from the summaries and the facts in the records."""
    summaries = [record for record in records if "summary" in record]
    chunks = [record for record in records if "contender" in record]
    last = chunks[-1]
    load = max(record["load_average"] for record in chunks)
    is_quiet = load < 2 * last["threads"]
    commit = f", commit {last['git'][:12]}" if last["git"] else ""
    rows = sorted(
        (one for one in summaries if "psnr_mean" in one), key=lambda one: one["cpu_speedup"]
    )
    counts = sorted({summary["samples"] for summary in summaries})
    digits = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    lines = [
        "# Quality against time",
        "",
        "Written by `python -m benchmarks.peers --report` from `benchmarks/results/peers`; "
        "edit neither.",
        "",
        f"The demo's model, {STEPS} DDIM steps, guidance {GUIDANCE}, {digits} digits "
        f"from seed {FIRST_SEED}. PSNR is to the dense run of the same seeds. "
        f"{last['device']}, {last['threads']} thread{'s' * (last['threads'] > 1)}, torch "
        f"{last['torch']}{commit}. Speed-ups are of processor time; elapsed time is beside "
        f"it, unless the machine was shared (load average here up to {load:.1f}). "
        f"Bold: no other contender is both faster and nearer on average. Few "
        "digits tell PSNR apart, not Fréchet distances.",
        "",
        "| contender | whose | digits | speed-up | elapsed | PSNR mean | 5th percentile | worst | "
        "Fréchet | as labelled |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = row["summary"]
        mark = "**" if _is_on_front(row, rows) else ""
        cells = (
            f"{mark}{name}{mark}",
            "peer" if _is_peer(name) else "ours" if not name.startswith("fewer") else "dense",
            str(row["samples"]),
            f"{row['cpu_speedup']:.2f}x",
            f"{row['speedup']:.2f}x" if is_quiet else "-",
            f"{row['psnr_mean']:.1f} ± {row['psnr_interval']:.1f} dB",
            f"{row['psnr_percentile_5']:.1f} dB",
            f"{row['psnr_worst']:.1f} dB",
            f"{row['frechet_distance']:.2f}",
            f"{row['accuracy']:.1%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    ours = [
        one
        for one in rows
        if not _is_peer(one["summary"]) and not one["summary"].startswith("fewer")
    ]
    lines += [
        "",
        "## Goals",
        "",
        "| speed-up | goal, mean / worst | the best of ours that is as fast | reached |",
        "|---|---|---|---|",
    ]
    for ratio, (mean, worst) in GOALS.items():
        fast = [one for one in ours if one["cpu_speedup"] >= ratio]
        if not fast:
            lines.append(f"| {ratio}x | {mean} / {worst} dB | none is as fast | no |")
            continue
        best = max(fast, key=lambda one: one["psnr_mean"])
        reached = best["psnr_mean"] >= mean, best["psnr_worst"] >= worst
        words = {2: "yes", 1: "mean alone" if reached[0] else "worst alone", 0: "no"}[sum(reached)]
        lines.append(
            f"| {ratio}x | {mean} / {worst} dB | {best['summary']} ({best['cpu_speedup']:.2f}x): "
            f"{best['psnr_mean']:.1f} / {best['psnr_worst']:.1f} dB | {words} |"
        )
    above = [one for one in rows if _is_peer(one["summary"]) and _is_on_front(one, [one, *ours])]
    names = ", ".join(one["summary"] for one in above)
    lines += [
        "",
        f"Peers that none of ours beats in both time and mean: {names or 'none'}.",
        "",
        *_describe_tails(rows),
        "",
        *_describe_glyphs(json.loads(GLYPHS.read_text())),
    ]
    path.write_text("\n".join(lines) + "\n")


def _describe_tails(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say of the trained policies how far their worst digit lies below their mean."""
    lines = [
        "## Tails of the trained policies",
        "",
        f"The goal is a worst digit within {MAX_TAIL} dB of the mean.",
        "",
        "| policy | digits | mean less worst | reached |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if row["summary"].startswith(("l2c", "tokencache")):
            tail = row["psnr_mean"] - row["psnr_worst"]
            reached = "yes" if tail <= MAX_TAIL else "no"
            if row["samples"] < FEWEST_FOR_TAIL:
                reached = "too few digits"
            lines.append(f"| {row['summary']} | {row['samples']} | {tail:.1f} dB | {reached} |")
    return lines


def _describe_glyphs(record: Mapping[str, Any]) -> list[str]:
    """Say how the second model was trained, and why it does not ship."""
    losses = dict(record["loss_by_step"])
    half, steps, shape = record["half_steps"], record["steps"], record["model"]
    tokens = (shape["sample_size"] // shape["patch_size"]) ** 2
    before = max(step for step in losses if step <= half)
    return [
        "## A harder picture",
        "",
        f"`demo.train_glyphs` was run once: {record['parameters']:,} parameters, {tokens:,} "
        f"tokens, {half} steps of {2 * record['batch']} pictures at half the size, then "
        f"{steps - half} of {record['batch']} at full size, {record['seconds'] / 60:.0f} "
        f"minutes on {record['threads']} thread of a shared machine. "
        f"The loss was {losses[before]:.3f} after {before} steps and {losses[steps]:.3f} after "
        f"{steps}. The samples have two colours and the outline of their letter, but ragged edges. "
        "They do not convince, and no weights ship. More steps at full size were not tried.",
    ]


def _is_on_front(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    return not any(
        other["cpu_speedup"] > row["cpu_speedup"] and other["psnr_mean"] > row["psnr_mean"]
        for other in rows
    )


def main() -> None:
    """Measure the missing chunks, summarise, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--samples", type=int, default=200, help="digits of each contender")
    parser.add_argument("--batch", type=int, default=20, help="digits a forward")
    parser.add_argument("--threads", type=int, help="torch's threads; default: as torch chooses")
    parser.add_argument("--out", type=Path, default=RECORDS, metavar="FILE")
    parser.add_argument(
        "--state", type=Path, default=Path("peers_digits"), metavar="FOLDER", help="for the digits"
    )
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    parser.add_argument("--report", action="store_true", help="write the page alone")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if not options.report:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with _quiet():
            measure(options)
        chunks = [record for record in read_records(options.out) if "contender" in record]
        for summary in summarise(chunks, options.state):
            append_record(options.out, summary)
    records = read_records(options.out)
    # of several summaries of a contender the last one counts
    newest = {record["summary"]: record for record in records if "summary" in record}
    write_page(
        [*(record for record in records if "contender" in record), *newest.values()], options.page
    )
    print(f"Written to {options.page}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' messages about every run away from the progress bar."""
    import logging

    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    main()
