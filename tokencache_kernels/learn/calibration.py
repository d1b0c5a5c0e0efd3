"""Finds a step table for a model and its sampler: which steps run, and how the others are carried.

Nothing is trained. The dense sampler is run once and recorded. A cost table over all gaps between
full steps, from the recording alone, gives a first set of full steps by dynamic programming. A
search then moves them. For every set the weights are solved by least squares while the sampler runs
under them, step by step, so that each step lands as near to the dense run as the kept outputs
allow. Each set is judged by the samples that come out. ``docs/adr`` has the reasons.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnsupportedInputError
from ..integrations.step_carrier import apply_step_table, install_rule, remove_step_table
from ..ops._checks import fail
from ..policies import StepSchedule, StepTable

Sample = Callable[[Sequence[int]], Tensor]

# relative; differences of outputs are close to dependent
_RIDGE = 1e-9
# a sampler's step is linear in latents and output if this share of the latents is left over at most
_LINEAR = 1e-3
_MAX_PSNR = 100.0


@dataclass(frozen=True)
class Settings:
    """The space of step tables that is searched.

    Attributes:
        num_inference_steps: the sampler's steps.
        num_full: the steps that run the model.
        histories: numbers of kept outputs to try.
        trials: candidates to judge.
        seed: of the search's moves.
        tail_share: the weight of the worst eighth of the samples against the mean of all in a
            candidate's score, in [0, 1].
    """

    num_inference_steps: int
    num_full: int
    histories: tuple[int, ...] = (3, 2)
    trials: int = 24
    seed: int = 0
    tail_share: float = 0.5

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not 1 <= self.num_full <= self.num_inference_steps:
            fail(name, "num_full", f"be in [1, {self.num_inference_steps}]", self.num_full)
        if not self.histories or min(self.histories) < 1:
            fail(name, "histories", "be numbers of at least 1", self.histories)
        if self.trials < 1:
            fail(name, "trials", "be at least 1", self.trials)
        if not 0 <= self.tail_share <= 1:
            fail(name, "tail_share", "be in [0, 1]", self.tail_share)


class Candidate(NamedTuple):
    """All of a table but its weights, which follow by least squares.

    Attributes:
        full_steps: ascending, from 0.
        history: outputs kept.
        uses_input: whether the latents have a weight, too.
    """

    full_steps: tuple[int, ...]
    history: int
    uses_input: bool


@dataclass(frozen=True)
class Judged:
    """A step table and the PSNR of each sample to its dense one, in dB."""

    table: StepTable
    psnr: Tensor

    def score(self, tail_share: float) -> float:
        """The mean of all samples and that of the worst eighth, weighted."""
        worst = self.psnr.sort().values[: -(-len(self.psnr) // 8)]
        return float((1 - tail_share) * self.psnr.mean() + tail_share * worst.mean())


@dataclass
class Recording:
    """The dense run of a batch: the latents before every step, and the model's outputs.

    Where the batch holds a conditional and an unconditional half of the same latents, ``latents``
    are one half, and ``transitions`` weigh both halves' outputs.

    Attributes:
        latents: by step (B, ...), and after the last step if the samples are latents.
        outputs: by step, a tensor for each half.
        transitions: by step the weights of the next latents: of the latents, then of each output;
            empty for the last step if the samples are no latents.
        samples: (B, ...).
    """

    latents: list[Tensor]
    outputs: list[tuple[Tensor, ...]]
    transitions: list[tuple[float, ...]]
    samples: Tensor

    def output(self, index: int, halves: Sequence[Tensor] | None = None) -> Tensor:
        """Combine both halves' outputs as the sampler does in step ``index``."""
        halves = self.outputs[index] if halves is None else halves
        shares = self.transitions[index][1:] or self.transitions[index - 1][1:]
        total = sum(shares)
        parts = [share / total * half.double() for share, half in zip(shares, halves, strict=True)]
        return torch.stack(parts).sum(0)


class _Recorder:
    """A rule under which all steps are full, and everything is kept."""

    history = 1

    def __init__(self, num_inference_steps: int) -> None:
        self.num_inference_steps = num_inference_steps
        self.latents: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def is_full(self, index: int) -> bool:
        return True

    def weigh(
        self, index: int, outputs: Sequence[Tensor], latents: Tensor
    ) -> tuple[Sequence[float], float]:
        self.latents.append(latents.detach().clone())
        self.outputs.append(outputs[-1].clone())
        return (1.0,), 0.0


class _Solver:
    """A rule that solves the weights of each step when the step is reached."""

    def __init__(self, recording: Recording, candidate: Candidate) -> None:
        self.num_inference_steps = len(recording.outputs)
        self.history = candidate.history
        self.rows: list[tuple[tuple[float, ...], float]] = []
        self._full = frozenset(candidate.full_steps)
        self._recording = recording
        self._uses_input = candidate.uses_input

    def is_full(self, index: int) -> bool:
        return index in self._full

    def weigh(
        self, index: int, outputs: Sequence[Tensor], latents: Tensor
    ) -> tuple[Sequence[float], float]:
        row: tuple[tuple[float, ...], float] = ((*[0.0] * (len(outputs) - 1), 1.0), 0.0)
        # the first output is the dense one
        if index > 0 and self._recording.transitions[index]:
            row = self._solve(index, outputs, latents)
        self.rows.append(row)
        return row

    def _solve(
        self, index: int, outputs: Sequence[Tensor], latents: Tensor
    ) -> tuple[tuple[float, ...], float]:
        recording = self._recording
        num_halves = len(recording.outputs[0])
        kept = [recording.output(index, output.chunk(num_halves)) for output in outputs]
        now = latents.chunk(num_halves)[0].double()
        share, *parts = recording.transitions[index]
        wanted = (recording.latents[index + 1].double() - share * now) / sum(parts)
        # changes since the newest are far from dependent; a weight of all of it keeps the sum free
        columns = [one - kept[-1] for one in kept[:-1]]
        columns += [now] if self._uses_input else []
        solved = _least_squares([*columns, kept[-1]], wanted)
        older = solved[: len(kept) - 1]
        weights = (*older, solved[-1] - sum(older))
        return weights, solved[len(older)] if self._uses_input else 0.0


def _least_squares(columns: Sequence[Tensor], wanted: Tensor) -> list[float]:
    """The coefficients of the columns that come nearest to ``wanted``, over all elements."""
    matrix = torch.stack([column.flatten() for column in columns], dim=1)
    products, right = matrix.T @ matrix, matrix.T @ wanted.flatten()
    # a column of zeros has no weight
    scale = products.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    scaled = products / scale / scale[:, None]
    scaled += _RIDGE * torch.eye(len(columns), dtype=torch.float64, device=scaled.device)
    solved: list[float] = (torch.linalg.solve(scaled, right / scale) / scale).tolist()
    return solved


def record(model: nn.Module, sample: Sample, seeds: Sequence[int], num_steps: int) -> Recording:
    """Run the dense sampler and find out how it goes from step to step.

    Args:
        model: the transformer, without any cache.
        sample: draws one sample for each seed, all in one batch, with one call of the model a step.
        seeds: of the samples.
        num_steps: the sampler's steps.

    Raises:
        UnsupportedInputError: the model is called otherwise, or the next latents are no linear
            combination of the latents and the model's output in a step.
    """
    recorder = _Recorder(num_steps)
    install_rule(model, recorder)
    try:
        samples = sample(seeds)
    finally:
        remove_step_table(model)
    if len(recorder.latents) != num_steps:
        raise UnsupportedInputError(
            f"calibrate: the sampler must call the model once in each of {num_steps} steps, got "
            f"{len(recorder.latents)} calls"
        )
    if recorder.latents[0].shape != recorder.outputs[0].shape:
        raise UnsupportedInputError(
            f"calibrate: the model's output must have the shape of the latents "
            f"{tuple(recorder.latents[0].shape)}, got {tuple(recorder.outputs[0].shape)}"
        )
    num_halves = 1
    if len(recorder.latents[0]) == 2 * len(seeds):
        halves = recorder.latents[0].chunk(2)
        num_halves = 2 if torch.equal(*halves) else 1
    latents = [one.chunk(num_halves)[0] for one in recorder.latents]
    if samples.shape == latents[0].shape:
        latents.append(samples.to(latents[0]))
    outputs = [one.chunk(num_halves) for one in recorder.outputs]
    transitions: list[tuple[float, ...]] = [() for _ in range(num_steps)]
    for index, after in enumerate(latents[1:]):
        columns = [latents[index].double(), *(half.double() for half in outputs[index])]
        if num_halves == 2:
            # the halves are nearly alike: their difference is not
            columns[1] = columns[1] - columns[2]
        solved = _least_squares(columns, after.double())
        left = after.double() - sum(c * column for c, column in zip(solved, columns, strict=True))
        if left.norm() > _LINEAR * after.double().norm():
            raise UnsupportedInputError(
                f"calibrate: a sampler's step must be linear in its latents and the model's "
                f"output, got one that is not after step {index} (a noisy or multistep sampler?)"
            )
        if num_halves == 2:
            solved[2] -= solved[1]
        transitions[index] = tuple(solved)
    return Recording(latents, outputs, transitions, samples)


def solve_table(
    model: nn.Module,
    sample: Sample,
    seeds: Sequence[int],
    recording: Recording,
    candidate: Candidate,
    peak: float,
) -> Judged:
    """Solve a candidate's weights while sampling under them, and judge the samples."""
    solver = _Solver(recording, candidate)
    install_rule(model, solver)
    try:
        samples = sample(seeds)
    finally:
        remove_step_table(model)
    table = StepTable(
        len(recording.outputs),
        candidate.full_steps,
        tuple(weights for weights, _ in solver.rows),
        tuple(input_weight for _, input_weight in solver.rows),
        candidate.history,
        "calibrated",
    )
    return Judged(table, measure_psnr(samples, recording.samples, peak))


def judge_table(
    model: nn.Module,
    sample: Sample,
    seeds: Sequence[int],
    dense: Tensor,
    table: StepTable,
    peak: float,
) -> Judged:
    """Sample under a table and compare with the dense samples of the same seeds."""
    apply_step_table(model, table)
    try:
        samples = sample(seeds)
    finally:
        remove_step_table(model)
    return Judged(table, measure_psnr(samples, dense, peak))


def measure_psnr(samples: Tensor, dense: Tensor, peak: float) -> Tensor:
    """``10 log10(peak^2 / mean squared error)`` of each sample, (B,) in dB, at most 100."""
    error = (samples.double() - dense.double()).square().flatten(1).mean(dim=1)
    return (10 * torch.log10(peak**2 / error)).clamp_max(_MAX_PSNR)


def choose_steps(recording: Recording, settings: Settings) -> tuple[int, ...]:
    """Choose full steps by a cost table of gaps and dynamic programming; the recording suffices.

    The cost of a gap from full step ``s`` to ``s'`` is the squared distance to the dense latents at
    ``s'`` that is left at best, if the outputs of ``s`` and of the full steps before it and the
    latents at ``s`` are combined. Errors before ``s`` are left aside.
    """
    costs = _tabulate_gaps(recording, settings)
    total = settings.num_inference_steps
    best: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {(0,): (0.0, (0,))}
    for _ in range(settings.num_full - 1):
        longer: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
        for kept, (cost, path) in best.items():
            for step in range(kept[-1] + 1, total):
                gap = cost + costs.get((kept, step), 0.0)
                state = (*kept, step)[-_GAP_HISTORY:]
                if state not in longer or gap < longer[state][0]:
                    longer[state] = gap, (*path, step)
        best = longer
    last = len(recording.latents) - 1
    return min((cost + costs.get((kept, last), 0.0), path) for kept, (cost, path) in best.items())[
        1
    ]


# outputs in the cost table; a third one changes the choice little and costs T times as much
_GAP_HISTORY = 2


def _tabulate_gaps(
    recording: Recording, settings: Settings
) -> dict[tuple[tuple[int, ...], int], float]:
    """Cost the gap that ends at a step, by the full steps before it; gaps of 1 are free."""
    total = settings.num_inference_steps
    vectors = [one.double().flatten() for one in recording.latents]
    num_latents = len(vectors)
    vectors += [recording.output(index).flatten() for index in range(total)]
    stacked = torch.stack(vectors)
    gram = stacked @ stacked.T
    costs: dict[tuple[tuple[int, ...], int], float] = {}
    for step in range(2, num_latents):
        kept: list[tuple[int, ...]] = [(0,)]
        kept += [(a, b) for b in range(1, step) for a in range(b)]
        for size in (1, 2):
            chosen = [one for one in kept if len(one) == size and one[-1] < step - 1]
            if not chosen:
                continue
            columns = torch.tensor(
                [[one[-1], *(num_latents + index for index in one)] for one in chosen]
            )
            products = gram[columns[:, :, None], columns[:, None, :]]
            scale = products.diagonal(dim1=1, dim2=2).sqrt()
            right = gram[columns, step] / scale
            scaled = products / scale[:, :, None] / scale[:, None, :]
            scaled += _RIDGE * torch.eye(size + 1, dtype=torch.float64, device=gram.device)
            solved = torch.linalg.solve(scaled, right)
            left = (gram[step, step] - (solved * right).sum(1)).clamp_min(0)
            costs.update(
                {(one, step): cost for one, cost in zip(chosen, left.tolist(), strict=True)}
            )
    return costs


def propose(
    recording: Recording, settings: Settings, best: Callable[[], Candidate]
) -> Iterator[Candidate]:
    """Propose evenly spaced full steps, those of the cost table, and then moves of the ``best``."""
    total, num_full = settings.num_inference_steps, settings.num_full
    even = StepSchedule.even(num_full, total).steps
    for full_steps in dict.fromkeys((even, choose_steps(recording, settings))):
        for history in settings.histories:
            for uses_input in (True, False):
                yield Candidate(full_steps, history, uses_input)
    generator = random.Random(settings.seed)
    # of one full step, or of all, there is one set
    while 1 < num_full < total:
        yield best()._replace(full_steps=_move(best().full_steps, total, generator))


def _move(full_steps: Sequence[int], total: int, generator: random.Random) -> tuple[int, ...]:
    """Move one full step anywhere, or a few of them by one or two."""
    steps = set(full_steps)
    if generator.random() < 0.3:
        steps.remove(generator.choice(sorted(steps - {0})))
        steps.add(generator.choice([one for one in range(1, total) if one not in steps]))
    else:
        for _ in range(generator.choice((1, 1, 2, 3))):
            one = generator.choice(sorted(steps - {0}))
            other = one + generator.choice((-2, -1, 1, 2))
            if 1 <= other < total and other not in steps:
                steps.remove(one)
                steps.add(other)
    return tuple(sorted(steps))


@dataclass
class State:
    """The candidates that were judged, one a line in a file, from which a search goes on.

    Attributes:
        path: the file; None: nothing is kept.
        key: all that the scores depend on besides the candidate.
        scores: by candidate.
    """

    path: Path | None
    key: str
    scores: dict[Candidate, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is None or not self.path.exists():
            return
        for line in self.path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                # cut short when its process was killed
                continue
            if row["key"] == self.key:
                full_steps, history, uses_input = row["candidate"]
                candidate = Candidate(tuple(full_steps), history, uses_input)
                self.scores[candidate] = row["score"]

    def add(self, candidate: Candidate, score: float) -> None:
        """Keep a score, at once in the file."""
        self.scores[candidate] = score
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            row = {"key": self.key, "candidate": candidate, "score": score}
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    @property
    def best(self) -> Candidate:
        """The candidate with the highest score."""
        return max(self.scores, key=lambda candidate: self.scores[candidate])


def calibrate(
    model: nn.Module,
    sample: Sample,
    settings: Settings,
    seeds: Sequence[int],
    unseen_seeds: Sequence[int],
    *,
    peak: float,
    state_path: Path | None = None,
    facts: dict[str, Any] | None = None,
) -> Judged:
    """Find a step table, and judge it on samples that it was not found on.

    Args:
        model: the transformer, without any cache; it has none afterwards.
        sample: draws one sample for each seed with the model as it is at that moment, all in one
            batch, with one call of the model a step; the same seed always draws the same sample.
        settings: the space to search.
        seeds: those to find the table on.
        unseen_seeds: those to judge it on.
        peak: the range of a sample's values, for PSNR.
        state_path: a file from which a search that was broken off goes on.
        facts: entries for the table beside the settings and the figures.

    Returns:
        The table and its PSNR on the unseen seeds.

    Raises:
        UnsupportedInputError: see ``record``.
    """
    from tqdm import tqdm

    if set(seeds) & set(unseen_seeds):
        fail("calibrate", "unseen_seeds", "have none of the seeds", "some")
    recording = record(model, sample, seeds, settings.num_inference_steps)
    # more trials go on with those of fewer
    key = json.dumps([str(replace(settings, trials=1)), list(seeds), facts], sort_keys=True)
    state = State(state_path, key)
    proposals = propose(recording, settings, lambda: state.best)
    with tqdm(total=settings.trials, desc=f"{settings.num_full} full steps", unit="trial") as bar:
        for candidate in itertools.islice(proposals, settings.trials):
            if candidate not in state.scores:
                judged = solve_table(model, sample, seeds, recording, candidate, peak)
                state.add(candidate, judged.score(settings.tail_share))
            bar.update()
            bar.set_postfix(best=f"{state.scores[state.best]:.2f} dB")
    seen = solve_table(model, sample, seeds, recording, state.best, peak)
    dense = sample(unseen_seeds)
    judged = judge_table(model, sample, unseen_seeds, dense, seen.table, peak)
    figures = {
        "seeds": [min(seeds), max(seeds)],
        "unseen_seeds": [min(unseen_seeds), max(unseen_seeds)],
        "psnr_seen": _describe(seen.psnr),
        "psnr_unseen": _describe(judged.psnr),
        "settings": str(settings),
        **(facts or {}),
    }
    return Judged(replace(judged.table, facts=figures), judged.psnr)


def _describe(psnr: Tensor) -> dict[str, float]:
    """The mean and the tail over the samples, in dB."""
    return {
        "samples": len(psnr),
        "mean": round(float(psnr.mean()), 2),
        "percentile_5": round(float(psnr.quantile(0.05)), 2),
        "worst": round(float(psnr.min()), 2),
    }
