"""Policies at the sampler's level: some steps run the model, the others carry its output."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import fail
from .carriers import REUSE, Carrier, to_weights
from .decisions import Action, Decision, Site, Step
from .files import replace_file
from .learning_to_cache import LearningToCacheConfig, load_router
from .schedules import check_full_steps
from .selectors import ScoreSelector

FORMAT = "tokencache_kernels step table 1"


@dataclass(frozen=True)
class StepTable:
    """A table of full steps, and of the weights by which every step's output is made.

    The output of step ``t`` is ``sum_j weights[t][j] * f_j + input_weights[t] * x``. ``f_j`` are
    the model's outputs in the last ``history`` full steps up to ``t``, oldest first, and ``x`` is
    the latents that the model is given at ``t``. A full step runs the model first, so its own
    output is the last ``f_j``. With weights other than (0, ..., 0, 1) it also corrects the
    forecasts of the steps before it. No other step runs any part of the model.

    A table belongs to a model, a sampler and its number of steps, and is found by
    ``tokencache calibrate``, or made from a carrier by ``from_carrier``.

    Attributes:
        num_inference_steps: the sampler's steps.
        full_steps: ascending, from 0.
        weights: by step; as many as there are outputs, at most ``history``.
        input_weights: by step.
        history: how many outputs are kept, at least 1.
        name: how the policy is called in reports.
        facts: how the table was found; JSON values.
        fingerprint: of the weights.
    """

    num_inference_steps: int
    full_steps: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...] = field(repr=False)
    input_weights: tuple[float, ...] = field(repr=False)
    history: int
    name: str = "step-table"
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        name, total = type(self).__name__, self.num_inference_steps
        check_full_steps(name, self.full_steps, total)
        if self.history < 1:
            fail(name, "history", "be at least 1", self.history)
        for what, rows in (("weights", self.weights), ("input_weights", self.input_weights)):
            if len(rows) != total:
                fail(name, what, f"have {total} steps", len(rows))
        for index, row in enumerate(self.weights):
            if len(row) != len(self.stored(index)):
                wanted = f"have {len(self.stored(index))} numbers for step {index}"
                fail(name, "weights", wanted, len(row))
            if not all(map(math.isfinite, (*row, self.input_weights[index]))):
                fail(name, "weights", "be finite", f"others at step {index}")
        digest = hashlib.sha256(repr((self.weights, self.input_weights)).encode()).hexdigest()
        object.__setattr__(self, "fingerprint", digest[:12])

    @classmethod
    def from_carrier(
        cls,
        full_steps: Sequence[int],
        carrier: Carrier,
        num_inference_steps: int,
        name: str = "carried",
    ) -> "StepTable":
        """Carry the model's output by a rule that needs no calibration, such as ``Newton(2)``.

        Args:
            full_steps: ascending, from 0.
            carrier: the rule.
            num_inference_steps: the sampler's steps.
            name: how the policy is called in reports.
        """
        check_full_steps(cls.__name__, full_steps, num_inference_steps)
        rows = []
        for index in range(num_inference_steps):
            stored = [step for step in full_steps if step <= index]
            kept = stored[-1 - carrier.order :]
            if kept[-1] == index:
                rows.append((*[0.0] * (len(kept) - 1), 1.0))
            else:
                # differences go back to the first full step, the factors to the kept ones
                rows.append(to_weights(carrier.factors(kept, index), kept))
        zeros = (0.0,) * num_inference_steps
        return cls(
            num_inference_steps, tuple(full_steps), tuple(rows), zeros, 1 + carrier.order, name
        )

    def stored(self, index: int) -> tuple[int, ...]:
        """The full steps whose outputs make that of step ``index``, ascending."""
        return tuple(step for step in self.full_steps if step <= index)[-self.history :]

    @property
    def flops_ratio(self) -> float:
        """The number of steps over the number of calls of the model."""
        return self.num_inference_steps / len(self.full_steps)

    @property
    def selector(self) -> ScoreSelector:
        """No token is ever selected."""
        return ScoreSelector("none")

    @property
    def carrier(self) -> Carrier:
        """No feature inside the model is carried."""
        return REUSE

    @property
    def num_layers(self) -> None:
        """Any depth will do."""
        return None

    @property
    def predictor(self) -> None:
        """No token is scored."""
        return None

    def decide(self, site: Site, step: Step, num_tokens: int) -> Decision:
        """Compute every token in a full step, and run no block in the others."""
        if step.total != self.num_inference_steps:
            got = f"one for {self.num_inference_steps}"
            fail(type(self).__name__, "full_steps", f"be for {step.total} steps", got)
        if step.index in self.full_steps:
            return Decision(Action.FULL, num_tokens)
        return Decision(Action.SKIP, 0)


def save_table(table: StepTable, path: str | Path) -> None:
    """Write a table as JSON; the file is there as a whole or not."""
    content = {
        "format": FORMAT,
        "name": table.name,
        "num_inference_steps": table.num_inference_steps,
        "full_steps": table.full_steps,
        "history": table.history,
        # nine digits are a float32
        "weights": [[float(f"{weight:.9g}") for weight in row] for row in table.weights],
        "input_weights": [float(f"{weight:.9g}") for weight in table.input_weights],
        "facts": table.facts,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(content) + "\n").encode())


def load_table(path: str | Path) -> StepTable:
    """Read a table that ``save_table`` wrote.

    Raises:
        ValueError: the file holds no step table, or one that cannot be.
        FileNotFoundError: there is no such file.
    """
    try:
        content = json.loads(Path(path).read_text())
        if content.pop("format") != FORMAT:
            raise ValueError
        content["full_steps"] = tuple(content["full_steps"])
        content["weights"] = tuple(map(tuple, content["weights"]))
        content["input_weights"] = tuple(content["input_weights"])
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError, ValueError):
        fail("load_table", "path", "hold a step table", path)
    try:
        return StepTable(**content)
    except TypeError:
        fail("load_table", "path", "hold a step table", path)


def load_policy(path: str | Path) -> StepTable | LearningToCacheConfig:
    """Read a policy from a file: a step table (``.json``) or a router (``.safetensors``).

    Raises:
        ValueError: the file holds neither.
        FileNotFoundError: there is no such file.
    """
    return load_router(path) if Path(path).suffix == ".safetensors" else load_table(path)
