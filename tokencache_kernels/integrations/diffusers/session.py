"""The token cache of one transformer: its runs by context and thread, and the call under way."""

import logging
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ... import ops
from ...blocks import ResidualStream, Runner
from ...cache import FeatureCache, Loans
from ...errors import UnsupportedInputError, fail
from ...models.spec import Stack
from ...policies import Action, LayerGroup, Policy, RunPlan
from . import compat
from .attention_watch import Attention
from .binding import Binding
from .fused import find_refusal
from .placement import Conditioning, Table, Tracker, read_conditioning, read_timestep

logger = logging.getLogger(__name__)

# the context of calls that name none
_DEFAULT_CONTEXT = "default"
# runs of one step in a row, behind which something is wrong
_MAX_SHORT_RUNS = 3
# a mask's -10000 is -9984 in bfloat16
_DISCARDED = -9000
# base scores that are taken from an attention's keys or values
_ATTENTION_SCORES = ("attention_received", "value_norm", "key_norm")


_STEP_KINDS = ("full", "partial", "reused", "skipped")


@dataclass
class Statistics:
    """Counts since the cache was applied.

    Attributes:
        steps: calls by kind: all sites full, some tokens fresh, none fresh, or no block run.
        fresh: tokens computed, over all sites.
        tokens: tokens of all sites.
    """

    steps: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_STEP_KINDS, 0))
    fresh: int = 0
    tokens: int = 0

    def count(self, plan: RunPlan, index: int) -> None:
        """Count a step that has ended."""
        decisions = plan.decisions[index]
        actions = {decision.action for decision in decisions.values()}
        if Action.SKIP in actions:
            kind = "skipped"
        elif actions == {Action.FULL}:
            kind = "full"
        else:
            kind = "reused" if actions <= {Action.REUSE} else "partial"
        self.steps[kind] += 1
        for group in plan.groups:
            self.fresh += sum(decisions[site].num_fresh for site in group.sites)
            self.tokens += group.num_tokens * len(group.sites)


@dataclass(frozen=True)
class Options:
    """The choices of ``apply_token_cache``.

    Attributes:
        backend: the backend of all ops.
        tier: ``auto``: fused sub-layers where they are described and plain; ``as_is``: none.
        steps: whether the policy is rescaled to the run's number of steps, or must be exact.
    """

    backend: str = "auto"
    tier: Literal["auto", "as_is"] = "auto"
    steps: Literal["rescale", "exact"] = "rescale"

    def __post_init__(self) -> None:
        if self.tier not in ("auto", "as_is"):
            fail("apply_token_cache", "tier", "be 'auto' or 'as_is'", repr(self.tier))
        if self.steps not in ("rescale", "exact"):
            fail("apply_token_cache", "steps", "be 'rescale' or 'exact'", repr(self.steps))


class Pass:
    """One pass of guidance in one context and thread: its run, and the streams of its blocks.

    Attributes:
        runner: decides and remembers.
        tracker: says where calls lie.
        conditioning: the tensors that tell its run from others.
        last_call: the number of its last call in its context.
        num_steps: the steps of its run so far.
        streams: the residual streams of the call under way, by name.
        shown: the views of a joined stream that blocks have returned last.
        loans: the cached outputs that blocks hold.
        key_lengths: (B,) int32, the number of text tokens of each sample; None: all.
        is_guidance_pair: whether the halves of the batch are the two passes of guidance.
        groups: the cached modules, by the sizes of the call.
    """

    def __init__(self, policy: Policy, options: Options, time_rises: bool | None) -> None:
        self.runner = Runner(policy, options.backend)
        self.tracker = Tracker(time_rises)
        self.conditioning = Conditioning({})
        self.last_call = 0
        self.num_steps = 0
        self.streams: dict[str, ResidualStream] = {}
        self.shown: tuple[Tensor, ...] = ()
        self.key_lengths: Tensor | None = None
        self.loans = Loans()
        self._counts = FeatureCache()
        self.is_guidance_pair = True
        self.groups: dict[Any, tuple[LayerGroup, ...]] = {}

    def forget(self) -> None:
        """End the run under way; its buffers are used again."""
        self.runner.forget_run()
        self.tracker.forget()
        self.loans.forget()
        self.streams.clear()
        self.shown = ()

    @property
    def is_over(self) -> bool:
        """Tell whether its run has reached its last step, or has been forgotten."""
        return self.tracker.is_idle or self.runner.is_at_end

    def stream(self, name: str, hidden_states: Tensor, backend: str) -> ResidualStream:
        """The stream under way, which ``hidden_states`` go on with, or a new one."""
        if name in self.streams:
            self.streams[name].follow(hidden_states)
        else:
            self.streams[name] = ResidualStream(hidden_states, backend)
        return self.streams[name]

    def leave_stream(self, name: str, hidden_states: Tensor) -> Tensor:
        """End the stream under way, if there is one, and return the hidden states."""
        if name not in self.streams:
            return hidden_states
        stream = self.streams.pop(name)
        stream.follow(hidden_states)
        return stream.flush()

    def joint_stream(self, stack: Stack, given: Mapping[str, Any], backend: str) -> ResidualStream:
        """The stream of image and text together, which ``given`` goes on with, or a new one."""
        image, text = (given[name] for name in stack.streams)
        if stack.path in self.streams and image is self.shown[0] and text is self.shown[1]:
            return self.streams[stack.path]
        order = [text, image] if stack.is_text_first else [image, text]
        return self.stream(stack.path, torch.cat(order, dim=1), backend)

    def show_joint_stream(
        self, stack: Stack, text_tokens: int, ends: bool = False
    ) -> dict[str, Tensor]:
        """Its image and text as views: without the pending branches, unless the stream ends."""
        stream = self.streams[stack.path]
        joint = stream.flush() if ends else stream.hidden_states
        if stack.is_text_first:
            text, image = joint[:, :text_tokens], joint[:, text_tokens:]
        else:
            image, text = joint[:, :-text_tokens], joint[:, -text_tokens:]
        self.shown = image, text
        if ends:
            del self.streams[stack.path]
            self.shown = ()
        return dict(zip(stack.streams, (image, text), strict=True))

    def leave_joint_stream(self, stack: Stack, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """End the stream of both, if there is one, and return its image and text."""
        if stack.path not in self.streams:
            return {}
        self.joint_stream(stack, given, self.runner.backend)
        return self.show_joint_stream(stack, given[stack.streams[1]].shape[1], ends=True)

    def note_latents(self, latents: Any) -> None:
        """See whether the halves of the batch are one image twice, when a run begins."""
        if not self.runner.begins or not isinstance(latents, Tensor) or latents.is_meta:
            return
        half, rest = divmod(len(latents), 2)
        self.is_guidance_pair = rest == 0 and torch.equal(latents[:half], latents[half:])

    def note_mask(self, mask: Tensor | None) -> None:
        """Count the text tokens of each sample when a run begins."""
        if not self.runner.begins:
            return
        self.key_lengths = None
        if mask is not None:
            self._counts.store("key_lengths", _count_keys(mask))
            self.key_lengths = self._counts.load("key_lengths")


Mode = Literal["own", "as_is", "fused", "off"]


@dataclass
class Call:
    """A call of the transformer that is under way.

    Attributes:
        run: the pass that it belongs to.
        given: the transformer's arguments, by name.
        mode: how the block under way runs: its own code with outputs recorded (``own``), its own
            code with cached modules (``as_is``), sub-layers (``fused``), or nothing of the cache.
        is_ended: whether its last block has run.
    """

    run: Pass
    given: Mapping[str, Any]
    mode: Mode = "off"
    is_ended: bool = False


@dataclass
class _Context:
    """The passes of one context of one thread."""

    passes: list[Pass] = field(default_factory=list)
    num_calls: int = 0
    generation: int = 0


class _ThreadState(threading.local):
    """The contexts of one thread, the context under way, and the call under way."""

    def __init__(self) -> None:
        self.contexts: dict[str, _Context] = {}
        self.named: list[tuple[str, tuple[int, int | None] | None]] = []
        self.call: Call | None = None


class Session:
    """A policy on a transformer.

    Attributes:
        policy: the decisions.
        options: how it is carried out.
        binding: where the described parts lie in the transformer.
    """

    def __init__(
        self,
        transformer: nn.Module,
        binding: Binding,
        policy: Policy,
        options: Options,
        scheduler: Any = None,
    ) -> None:
        self.policy = policy
        self.options = options
        self.binding = binding
        self._scheduler = scheduler
        self._transformer = weakref.ref(transformer)
        self._threads = _ThreadState()
        # all threads forget their runs when it grows
        self._generation = 0
        self._table: Table | None = None
        self.statistics = Statistics()
        self._num_short_runs = 0
        self._refusals: dict[tuple[str, int], str | None] = {}
        self.graphs: Any = None
        self.base_score = policy.selector.base_score
        self.takes_entropy = self.base_score == "attention_entropy"
        self.scores_attention = self.base_score in _ATTENTION_SCORES

    def __deepcopy__(self, memo: dict[int, Any]) -> "Session":
        """A cache of the copied transformer's own; in a part copied alone nothing ever calls it."""
        transformer = memo.get(id(self.transformer), self.transformer)
        session = Session(transformer, self.binding, self.policy, self.options, self._scheduler)
        memo[id(self)] = session
        if self.graphs is not None:
            session.graphs = self.graphs.copy_for(transformer)
        return session

    def __reduce__(self) -> Any:
        # runs are not pickled
        arguments = self._transformer(), self.binding, self.policy, self.options
        return Session, arguments

    @property
    def transformer(self) -> nn.Module:
        """The transformer."""
        transformer = self._transformer()
        assert transformer is not None, "interceptors live in the transformer"
        return transformer

    @transformer.setter
    def transformer(self, transformer: nn.Module) -> None:
        self._transformer = weakref.ref(transformer)

    @property
    def call(self) -> Call | None:
        """The call under way in this thread."""
        return self._threads.call

    @contextmanager
    def context(
        self,
        name: str,
        step_index: int | None = None,
        num_inference_steps: int | None = None,
        **_: Any,
    ) -> Iterator[None]:
        """Name the caller of the calls inside, and perhaps say their place."""
        told = None if step_index is None else (step_index, num_inference_steps)
        self._threads.named.append((name, told))
        try:
            yield
        finally:
            self._threads.named.pop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the modules answer for themselves inside a call that is under way."""
        call, self._threads.call = self._threads.call, None
        try:
            yield
        finally:
            self._threads.call = call

    def forget_runs(self) -> None:
        """End all runs of all threads; buffers and graphs stay."""
        self._generation += 1

    def release_memory(self) -> None:
        """Free all buffers of all threads."""
        self.forget_runs()
        named = self._threads.named
        self._threads = _ThreadState()
        self._threads.named = named
        if self.graphs is not None:
            self.graphs.clear()

    @contextmanager
    def calling(self, given: Mapping[str, Any]) -> Iterator[Call]:
        """Begin a call: find its pass and its place; refuse the call if that cannot be told."""
        threads = self._threads
        if threads.call is not None:
            raise UnsupportedInputError(
                "token cache: the transformer must not be called from within its own call"
            )
        name, told = threads.named[-1] if threads.named else (_DEFAULT_CONTEXT, None)
        run = self._find_pass(self._context(name), given)
        spec = self.binding.spec
        place = run.tracker.locate(
            None if told is not None else read_timestep(given.get(spec.timestep)),
            self._read_table(),
            told,
            self.policy.num_inference_steps,
            self.options.steps == "rescale",
        )
        run.runner.place(place.index, place.total, place.begins)
        if place.begins:
            self._refusals.clear()
            self._note_new_run(run)
        run.num_steps += 1
        run.streams.clear()
        run.shown = ()
        threads.call = call = Call(run, given)
        try:
            yield call
        except BaseException:
            # the features of half a step belong to no run
            run.forget()
            raise
        finally:
            threads.call = None
        if call.is_ended and run.runner.plan is not None and run.runner.last_index is not None:
            self.statistics.count(run.runner.plan, run.runner.last_index)
        if not call.is_ended:
            run.forget()
            raise UnsupportedInputError(
                f"token cache: {spec.transformer} did not call its described blocks; the cache "
                "cannot work on this model"
            )

    def _note_new_run(self, run: Pass) -> None:
        """Warn once where every call begins a run, so that nothing is ever saved."""
        self._num_short_runs = self._num_short_runs + 1 if run.num_steps == 1 else 0
        run.num_steps = 0
        if self._num_short_runs == _MAX_SHORT_RUNS:
            logger.warning(
                "token cache: %d runs of one step each: nothing is saved. A run is told by its "
                "conditioning (%s) and by timesteps that do not turn back; name the caller by "
                "token_cache_context(..., step_index=...) if that does not hold here.",
                _MAX_SHORT_RUNS,
                ", ".join(self.binding.spec.conditioning) or "none",
            )

    def _context(self, name: str) -> _Context:
        context = self._threads.contexts.setdefault(name, _Context())
        if context.generation != self._generation:
            context.generation = self._generation
            for one in context.passes:
                one.forget()
        return context

    def _find_pass(self, context: _Context, given: Mapping[str, Any]) -> Pass:
        """The pass with the call's conditioning, or one whose run is over, or a new one."""
        context.num_calls += 1
        tensors = read_conditioning(given, self.binding.spec.conditioning)
        run = next((one for one in context.passes if one.conditioning.is_same(tensors)), None)
        if run is None:
            free = [one for one in context.passes if one.is_over]
            run = min(free, key=lambda one: one.last_call) if free else None
            if run is None:
                run = Pass(self.policy, self.options, self.binding.spec.time_rises)
                context.passes.append(run)
            run.forget()
            run.conditioning = Conditioning(tensors)
        run.last_call = context.num_calls
        if len(context.passes) > 1:
            # a run that was broken off is not called again, while others go on
            oldest = context.num_calls - 2 * len(context.passes)
            context.passes = [one for one in context.passes if one.last_call > oldest]
        return run

    def _read_table(self) -> Table | None:
        scheduler = self._scheduler() if callable(self._scheduler) else self._scheduler
        timesteps = getattr(scheduler, "timesteps", None)
        if not isinstance(timesteps, Tensor) or timesteps.numel() == 0:
            return None
        if self._table is None or self._table.source is not timesteps:
            self._table = Table(timesteps)
        return self._table

    def fuses(self, stack: Stack, layer: int, block: nn.Module) -> bool:
        """Tell whether a block is composed of sub-layers; asked anew in each run."""
        key = stack.path, layer
        if key not in self._refusals:
            self._refusals[key] = self.find_refusal(stack, layer, block)
        # a hook may be put on in the middle of a run
        return self._refusals[key] is None and not compat.has_hooks(block)

    def find_refusal(self, stack: Stack, layer: int, block: nn.Module) -> str | None:
        """Say why a block runs its own code around cached modules; None if it is composed."""
        if self.options.tier == "as_is":
            return "tier='as_is' was asked for"
        return find_refusal(stack, self.binding.parts[stack.path][layer], block)

    def score(self, attention: Attention, lse: Tensor | None) -> Tensor:
        """The policy's base scores (B, N) of an attention's keys."""
        backend = self.options.backend
        if self.base_score == "attention_received":
            return attention.received(lse, backend)
        # 1 - mean_h |v[b, n, h]|: the papers sum over heads; the ranking is the same
        rows = attention.key if self.base_score == "key_norm" else attention.value
        return 1 - ops.head_norms(rows, backend=backend)

    def passes(self) -> list[tuple[str, Pass]]:
        """The passes of this thread, with the names of their contexts."""
        return [
            (name, one)
            for name, context in self._threads.contexts.items()
            for one in context.passes
        ]


def _count_keys(mask: Tensor) -> Tensor:
    """Count the text tokens of each sample, (B,) int32; one flag is read back to the host."""
    if mask.dim() == 2:
        keeps, discards = mask == 1, mask == 0
    else:
        keeps, discards = mask[:, 0] == 0, mask[:, 0] < _DISCARDED
    counts = keeps.sum(dim=-1, dtype=torch.int32)
    comes_first = torch.arange(mask.shape[-1], device=mask.device) < counts[:, None]
    is_prefix = torch.where(comes_first, keeps, discards).all() & (counts > 0).all()
    if not is_prefix:
        raise UnsupportedInputError(
            "apply_token_cache: encoder_attention_mask must keep the first tokens of each prompt, "
            "at least one, and discard the rest, got one that does not"
        )
    return counts
