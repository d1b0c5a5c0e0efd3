"""The place of a call in its run, from its timestep, conditioning and context.

A run's calls have one conditioning, and timesteps that do not turn back. A scheduler's table, where
there is one, tells the index of a timestep and the length of the run; without one, steps are
counted within the run.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ...blocks.runner import Place
from ...errors import UnsupportedInputError

# the rounding of a timestep by the dtype that a pipeline hands it over in
_SLACK = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
_DEFAULT_SLACK = 1e-5


class Timestep:
    """The timestep of a call, read on the host.

    Attributes:
        value: the largest, where samples or tokens have their own.
        slack: its relative rounding error.
    """

    def __init__(self, value: float, slack: float = _DEFAULT_SLACK) -> None:
        self.value = value
        self.slack = slack

    def is_near(self, other: float) -> bool:
        """Tell whether ``other`` is the same timestep, as a pipeline may have rounded it."""
        return abs(self.value - other) <= self.slack * max(abs(self.value), abs(other))


def read_timestep(argument: object) -> Timestep | None:
    """Read the timestep of a call, the largest of its samples and tokens; None if it has none."""
    if isinstance(argument, (int, float)):
        return Timestep(float(argument))
    if not isinstance(argument, Tensor) or argument.is_meta or argument.numel() == 0:
        return None
    slack = _SLACK.get(argument.dtype, _DEFAULT_SLACK)
    return Timestep(float(argument.detach().max()), slack)


class Conditioning:
    """The tensors that tell one run from another, as they were when it began."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._given = dict(tensors)
        self._versions = {name: _version(tensor) for name, tensor in tensors.items()}
        # the caller may write to its own
        self._kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def is_same(self, tensors: Mapping[str, Tensor]) -> bool:
        """Tell whether a call has this conditioning; other tensors are compared by value."""
        if tensors.keys() != self._given.keys():
            return False
        for name, tensor in tensors.items():
            version = _version(tensor)
            is_given = tensor is self._given[name] and version is not None
            if is_given and version == self._versions[name]:
                continue
            kept = self._kept[name]
            if tensor.shape != kept.shape or tensor.device != kept.device:
                return False
            if tensor.dtype != kept.dtype:
                return False
            if not tensor.is_meta and not torch.equal(tensor, kept):
                return False
            self._given[name], self._versions[name] = tensor, version
        return True


def _version(tensor: Tensor) -> int | None:
    """Count the writes into a tensor; None if PyTorch does not count them."""
    return None if tensor.is_inference() else tensor._version


def read_conditioning(given: Mapping[str, Any], names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors among the arguments named; lists of tensors count one by one."""
    tensors: dict[str, Tensor] = {}
    for name in names:
        value = given.get(name)
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, (list, tuple)):
            for index, one in enumerate(value):
                if isinstance(one, Tensor):
                    tensors[f"{name}[{index}]"] = one
    return tensors


class Table:
    """The timesteps of a scheduler, as a pipeline hands them to the model."""

    def __init__(self, timesteps: Tensor) -> None:
        self.source = timesteps
        self.values: list[float] = timesteps.detach().flatten().double().tolist()

    def __len__(self) -> int:
        return len(self.values)

    def find(self, timestep: Timestep, expected: int) -> int | None:
        """The index of a timestep: the one expected if that fits, else the nearest that does."""
        for scale in (1.0, 1000.0):
            scaled = Timestep(timestep.value * scale, timestep.slack)
            if expected < len(self) and scaled.is_near(self.values[expected]):
                return expected
        for scale in (1.0, 1000.0):
            scaled = Timestep(timestep.value * scale, timestep.slack)
            near = [index for index, value in enumerate(self.values) if scaled.is_near(value)]
            if near:
                return min(near, key=lambda index: abs(self.values[index] - scaled.value))
        return None


class Tracker:
    """Follows the calls of one run, and says where each of them lies."""

    def __init__(self, time_rises: bool | None) -> None:
        self._time_rises = time_rises
        self.forget()

    def forget(self) -> None:
        """Let the next call begin a run."""
        self._index: int | None = None
        self._first = 0
        self._timestep: Timestep | None = None
        self._table: Table | None = None

    @property
    def is_idle(self) -> bool:
        """Tell whether no run is under way."""
        return self._index is None

    def locate(
        self,
        timestep: Timestep | None,
        table: Table | None,
        told: tuple[int, int | None] | None,
        policy_steps: int,
        rescales: bool,
    ) -> Place:
        """Find the place of the next call, and remember it.

        Args:
            timestep: of the call, if it has one.
            table: the scheduler's, if it is known.
            told: the index and the number of steps, where the caller says them.
            policy_steps: the number of steps that the policy was made for.
            rescales: whether the policy follows another number of steps.

        Raises:
            UnsupportedInputError: the run has more steps than the policy, or another number and the
                policy is not to be rescaled.
        """
        total = policy_steps
        if told is not None:
            index, told_total = told
            total = policy_steps if told_total is None else told_total
            begins = self._index is None or index != self._index + 1
        else:
            index = -1
            if table is not None and timestep is not None:
                is_other = self._table is None or self._table.source is not table.source
                begins = self._index is None or is_other
                expected = 0 if begins or self._index is None else self._index + 1
                found = table.find(timestep, expected)
                if found is not None:
                    index, total = found, len(table)
                    if not begins and index == self._index and index != self._first:
                        _refuse_repeated(timestep)
                    begins = begins or index != expected
            if index < 0:
                index, begins, table = *self._count(timestep, policy_steps), None
        if total != policy_steps and not rescales:
            raise UnsupportedInputError(
                f"token cache: the policy is for {policy_steps} steps, but the sampler takes "
                f"{total}; make the policy for {total} steps, or apply it with steps='rescale'"
            )
        if index >= total:
            raise UnsupportedInputError(
                f"token cache: the run goes on behind the {total} steps of the policy; make the "
                "policy for the sampler's number of steps, or give apply_token_cache the pipeline "
                "or its scheduler, so that it can be rescaled"
            )
        self._index, self._timestep, self._table = index, timestep, table
        if begins:
            self._first = index
        return Place(index, total, begins)

    def _count(self, timestep: Timestep | None, total: int) -> tuple[int, bool]:
        """Index within the run, and whether a new one begins."""
        if self._index is None:
            return 0, True
        if timestep is None or self._timestep is None:
            index = (self._index + 1) % total
            return index, index == 0
        before = self._timestep
        if timestep.is_near(before.value):
            if self._index != self._first:
                _refuse_repeated(timestep)
            # the first step once more, as of a run that was broken off
            return self._index, True
        rises = timestep.value > before.value
        if self._time_rises is None:
            self._time_rises = rises
        return (self._index + 1, False) if rises == self._time_rises else (0, True)


def _refuse_repeated(timestep: Timestep) -> NoReturn:
    raise UnsupportedInputError(
        f"token cache: two calls at timestep {timestep.value:g} with the same conditioning cannot "
        "be told apart; name each of two runs by token_cache_context, or give apply_token_cache "
        "the scheduler if it evaluates a timestep twice"
    )
