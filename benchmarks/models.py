"""The stage ``models``: whole steps and sampling runs of full-size models with random weights.

The dense model is given the fastest attention that PyTorch has here, and is timed as it is called
(``stream``), as a replayed graph (``graph``) and as ``torch.compile`` makes it, in a graph
(``compiled``). The contenders of a case run in turn, each with modules of its own around the same
weights. A run is timed by its transformer calls alone, step by step, and once more with guidance
and the scheduler's arithmetic, as a pipeline has them; text encoders and decoders are left out.
"""

import argparse
import contextlib
import faulthandler
import importlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokencache_kernels.policies import (
    Action,
    DuCaConfig,
    LearningToCacheConfig,
    Policy,
    StepPlan,
    TablePredictor,
    ToCaConfig,
    TokenCacheConfig,
    fora,
    make_plan,
)

from .kernels import has_failed, release_memory
from .records import describe_run
from .stages import (
    FIRST_RUN,
    MAX_SECONDS,
    Journal,
    Record,
    describe_error,
    in_time,
    is_wanted,
    work_through,
)
from .timing import capture, summarise, time_in_turn, time_parts

if TYPE_CHECKING:
    from .subjects import Call, Subject

# rounding in half a hundred layers; a graph of ours is held to far less by the tests
MAX_ERROR = 5e-2
FUSED_ATTENTIONS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)


@dataclass(frozen=True)
class Model:
    """A model and its published setting.

    Attributes:
        make: the name of the function of ``subjects`` that builds it.
        preset: of ToCa and DuCa, with these changes.
        num_steps: of the sampler.
        policies: the others that it is timed under.
        samples: how many runs of each contender.
        seconds: the upper bound of a case of it, roughly.
        precomputes: whether there is modulation to precompute.
        is_compiled_whole: else block by block, if nothing lies between blocks.
    """

    make: str
    preset: str
    num_steps: int
    policies: tuple[str, ...]
    samples: int = 10
    seconds: int = 150
    precomputes: bool = True
    is_compiled_whole: bool = True
    refresh_interval: int = 3


MODELS = {
    "flux-1-dev-1024px": Model(
        "make_flux", "flux-1-dev", 50, ("fora", "duca"), samples=3, seconds=250,
        is_compiled_whole=False, refresh_interval=6,
    ),
    "dit-xl-256px": Model(
        "make_dit", "dit-xl-ddim50", 50, ("toca-unmixed", "fora", "duca", "l2c", "tokencache")
    ),
    "pixart-alpha-256px": Model(
        "make_pixart", "pixart-alpha", 20, ("toca-unmixed", "fora", "duca"), precomputes=False
    ),
}  # fmt: skip
# the most telling first: models with the batch that the network sees, and which contenders
PLAN = (
    ("flux-1-dev-1024px", 1, "toca"),
    ("dit-xl-256px", 16, "toca"),
    ("dit-xl-256px", 2, "toca"),
    ("dit-xl-256px", 16, "compiled"),
    ("dit-xl-256px", 2, "compiled"),
    ("flux-1-dev-1024px", 1, "compiled"),
    ("pixart-alpha-256px", 2, "toca"),
    ("dit-xl-256px", 16, "policies"),
    ("flux-1-dev-1024px", 1, "policies"),
    ("pixart-alpha-256px", 16, "toca"),
    ("dit-xl-256px", 2, "policies"),
    ("pixart-alpha-256px", 2, "compiled"),
    ("pixart-alpha-256px", 2, "policies"),
)


@dataclass(frozen=True)
class Contender:
    """One way to run a model.

    Attributes:
        policy: ``dense``, or a policy's name.
        backend: ``torch`` for the dense model, ``published`` for ToCa's code, else of our ops.
        mode: ``stream``, ``graph`` or ``compiled``.
        modulation: ``per-step``, or ``precomputed`` for all steps of a run.
    """

    policy: str
    backend: str
    mode: str
    modulation: str = "per-step"

    @property
    def is_baseline(self) -> bool:
        """Tell whether nothing of it is ours."""
        return self.backend != "auto" and self.modulation == "per-step"

    @property
    def fields(self) -> Record:
        """As records name them."""
        return {**vars(self), "baseline": self.is_baseline}


@dataclass(frozen=True)
class Case:
    """Contenders for one model and batch: ``part`` says which."""

    name: str
    batch: int
    part: str
    device: torch.device
    rehearse: bool

    @property
    def key(self) -> Record:
        """The common fields of its records."""
        shape = f"{self.name}-{self.batch}"
        return {"case": "model", "shape": shape, "dtype": "bfloat16", "part": self.part}

    @property
    def model(self) -> Model:
        """The model, with few steps in a rehearsal."""
        model = MODELS[self.name]
        return replace(model, num_steps=8, samples=2, seconds=0) if self.rehearse else model

    @property
    def seconds(self) -> int:
        """Upper bound in seconds, roughly."""
        return self.model.seconds

    @property
    def contenders(self) -> list[Contender]:
        """The dense model in a graph first: the others are compared with it."""
        on_gpu = self.device.type == "cuda"
        graph = "graph" if on_gpu else "stream"
        dense, toca = Contender("dense", "torch", graph), Contender("toca", "auto", graph)
        if self.part == "compiled":
            found = [dense, replace(dense, mode="compiled"), toca]
            if self.model.precomputes:
                found.append(replace(toca, modulation="precomputed"))
        elif self.part == "policies":
            found = [dense, *(replace(toca, policy=name) for name in self.model.policies)]
            if self.model.precomputes:
                found.append(replace(dense, mode="stream", modulation="precomputed"))
        else:
            found = [
                *(dense, toca),
                *(replace(one, mode="stream") for one in (dense, toca)),
                Contender("toca", "published", "stream"),
            ]
            if self.model.precomputes:
                plain = replace(toca, mode="stream")
                found += [replace(one, modulation="precomputed") for one in (toca, plain)]
        return list(dict.fromkeys(found))

    def make_subject(self) -> "Subject":
        """Build the model on the device, with the arguments of its calls."""
        from . import subjects

        return getattr(subjects, self.model.make)(self.batch, self.device, is_tiny=self.rehearse)

    def make_policy(self, name: str, subject: "Subject") -> Policy | None:
        """The policy of that name, None for the dense model."""
        model, shape = self.model, subject.shape
        settings = {
            "num_inference_steps": model.num_steps, "refresh_interval": model.refresh_interval
        }  # fmt: skip
        num_layers, num_tokens = shape.stacks[0].num_layers, shape.output_tokens
        return {
            "dense": lambda: None,
            # as published, where a step may be full in the first block alone; and as we preset it
            "toca": lambda: ToCaConfig.preset(model.preset, **settings, mixed_steps=True),
            "toca-unmixed": lambda: ToCaConfig.preset(model.preset, **settings),
            "duca": lambda: DuCaConfig.preset(model.preset, **settings),
            "fora": lambda: fora(model.refresh_interval, model.num_steps),
            "l2c": lambda: make_router(model.num_steps, num_layers),
            "tokencache": lambda: make_token_cache(model.num_steps, num_layers, num_tokens),
        }[name]()


def make_router(num_steps: int, num_layers: int) -> LearningToCacheConfig:
    """A router like the published one: it skips half of all, early most and late hardly any."""
    computed = 1 - torch.arange(num_steps) / num_steps
    random = torch.rand(num_steps, 2 * num_layers, generator=torch.Generator().manual_seed(0))
    return LearningToCacheConfig(torch.where(random < computed[:, None], 5.0, -5.0))


def make_token_cache(num_steps: int, num_layers: int, num_tokens: int) -> TokenCacheConfig:
    """A predictor that knows nothing: three tokens in ten are computed in each pruned block."""
    generator = torch.Generator().manual_seed(0)
    predictor = TablePredictor(num_layers, num_tokens, num_steps).requires_grad_(False)
    predictor.logits.normal_(generator=generator)
    ranked = predictor.logits.sigmoid().sort(dim=-1, descending=True).values
    predictor.importance.copy_(ranked)
    return TokenCacheConfig(predictor, num_steps)


def run_stage(options: argparse.Namespace, deadline: float) -> int:
    """Time the cases that have no records yet until the deadline; end with a table."""
    try:
        importlib.import_module(".subjects", __package__)
    except ImportError as error:
        print(f"models: diffusers must be installed, which builds the models, got {error}")
        return 1
    if options.device.type != "cuda" and not options.rehearse:
        print("models: the device must be cuda, or the run a rehearsal, got full size on the CPU")
        return 1
    facts = describe_run(options.device, options.commit, options.session)
    journal = Journal(options.out, "models", {**facts, "rehearsal": options.rehearse})
    cases = [
        case
        for case in list_cases(options.device, options.rehearse)
        if is_wanted(case.key, options.only)
    ]
    measure = in_time(partial(time_case, journal=journal), journal, deadline)
    work_through(journal, cases, measure, deadline)
    return has_failed(journal.records)


def list_cases(device: torch.device, rehearse: bool) -> list[Case]:
    """The most informative first; in a rehearsal nothing is compiled, and batches are small."""
    cases = [Case(*what, device, rehearse) for what in PLAN]
    if not rehearse:
        return cases
    return [case for case in cases if case.batch <= 2 and case.part != "compiled"]


# runs and steps


def make_call(contender: Contender, case: Case, subject: "Subject") -> "Call":
    """The contender's call of the model, on modules of its own."""
    from tokencache_kernels.integrations.diffusers import apply_token_cache, precompute_modulation

    transformer = subject.copy_transformer()
    policy = case.make_policy(contender.policy, subject)
    if contender.backend == "published":
        from .published_models import apply_published

        apply_published(transformer, policy)
    elif policy is not None:
        graphs = {"cuda_graphs": True} if contender.mode == "graph" else {}
        apply_token_cache(transformer, policy, backend=contender.backend, **graphs)
    if contender.modulation == "precomputed":
        precompute_modulation(transformer, subject.scheduler)
    if contender.mode == "compiled":
        compile_transformer(transformer, case.model.is_compiled_whole)
    call = subject.bind(transformer)
    if policy is None and contender.mode != "stream":
        return capture_call(call, subject.latents, subject.begin_run(1)[0])
    return call


def compile_transformer(transformer: Any, is_whole: bool) -> None:
    """Compile with everything that the compiler can try; the graph is ours, as for the others."""
    torch.compiler.reset()
    singles = getattr(transformer, "single_transformer_blocks", ())
    parts = [transformer] if is_whole else [*transformer.transformer_blocks, *singles]
    for part in parts:
        part.compile(mode="max-autotune-no-cudagraphs", dynamic=False, fullgraph=True)


def capture_call(call: "Call", latents: Tensor, timestep: Tensor) -> "Call":
    """Replay one captured call, on inputs that are copied to where it found its own."""
    inputs = latents.clone(), timestep.clone()
    outputs = []

    def run() -> None:
        outputs[:] = [call(*inputs)]

    run()
    replay = capture(run)

    def replay_call(*given: Tensor) -> Tensor:
        for place, tensor in zip(inputs, given, strict=True):
            place.copy_(tensor)
        replay()
        return outputs[0]

    return replay_call


def list_calls(call: "Call", subject: "Subject", num_steps: int) -> list[Callable[[], Tensor]]:
    """The transformer calls of a run, all on the same latents."""
    timesteps = subject.begin_run(num_steps)
    return [partial(call, subject.latents, timestep) for timestep in timesteps]


def list_steps(call: "Call", subject: "Subject", num_steps: int) -> list[Callable[[], None]]:
    """The steps of a run: call, guidance and scheduler."""
    timesteps, latents = subject.begin_run(num_steps), [subject.latents]

    def take_step(index: int) -> None:
        output = call(latents[0], timesteps[index])
        latents[0] = subject.advance(output, index, latents[0])

    return [partial(take_step, index) for index in range(num_steps)]


def run_all(call: "Call", subject: "Subject", num_steps: int) -> Tensor:
    """A whole run; the output of its last call, which nothing overwrites."""
    *others, last = list_calls(call, subject, num_steps)
    for other in others:
        other()
    return last().clone()


@contextlib.contextmanager
def best_attention(subject: "Subject") -> Iterator[str]:
    """Let PyTorch take the attention that is fastest here at the model's sizes; its name.

    By itself it goes by an order that knows neither the device nor the sizes.
    """
    if subject.latents.device.type != "cuda":
        yield "default"
        return
    shape = subject.shape
    (tokens,) = {m.num_keys for m in shape.stacks[0].modules if m.name == "attn"}
    sizes = (shape.batch, shape.heads, tokens, shape.hidden // shape.heads)
    query, key, value = torch.randn(
        3, *sizes, dtype=subject.latents.dtype, device=subject.latents.device
    )
    runs = {}
    for implementation in FUSED_ATTENTIONS:
        run = partial(_attend_by, implementation, query, key, value)
        with contextlib.suppress(RuntimeError):
            run()
            runs[implementation] = run
    times = time_in_turn(runs, query.device, samples=10)
    order = sorted(runs, key=lambda implementation: statistics.median(times[implementation]))
    with sdpa_kernel([*order, SDPBackend.MATH], set_priority=True):
        yield order[0].name.lower() if order else "math"


def _attend_by(implementation: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(implementation):
        return F.scaled_dot_product_attention(query, key, value)


def time_case(case: Case, journal: Journal) -> Iterator[Record]:
    """Records of each contender's run and steps; for one that fails, one with the error."""
    release_memory()
    subject = case.make_subject()
    with torch.no_grad(), best_attention(subject) as attention:
        common = {**case.key, "attention": attention, "steps": case.model.num_steps}
        calls, peaks = {}, {}
        for contender in case.contenders:
            if has_failed_before(contender, journal.of_case(case.key)):
                continue
            # leftovers of the one before would be taken for this one's
            release_memory()
            _enter(journal, case, contender)
            try:
                calls[contender], peaks[contender] = prepare_call(contender, case, subject)
            except Exception as error:
                yield {**common, **contender.fields, "error": describe_error(error)}
        runs: dict[Contender, list[list[float]]] = {contender: [] for contender in calls}
        pipelines: dict[Contender, list[float]] = {contender: [] for contender in calls}
        for sample in range(case.model.samples):
            for contender, call in calls.items():
                _enter(journal, case, contender)
                steps = list_calls(call, subject, case.model.num_steps)
                runs[contender].append(time_parts(steps, case.device))
                if sample == 0:
                    # the case may never end: the machine goes away
                    milliseconds = 1e3 * sum(runs[contender][0])
                    names = ("median_ms", "p20_ms", "p80_ms")
                    first = {**dict.fromkeys(names, milliseconds), "runs": 1}
                    yield {**common, **contender.fields, "what": FIRST_RUN, **first}
                if contender.mode == case.contenders[0].mode:
                    steps = list_steps(call, subject, case.model.num_steps)
                    pipelines[contender].append(sum(time_parts(steps, case.device)))
    for contender in calls:
        fields = {**common, **contender.fields, "peak_bytes": peaks[contender]}
        for record in make_records(case, contender, subject, runs[contender], pipelines[contender]):
            yield {**fields, **record}


def has_failed_before(contender: Contender, records: list[Record]) -> bool:
    """Tell whether it has ended a process before, or would fail again."""
    names = contender.fields.items()
    return any("error" in record and names <= record.items() for record in records)


def _enter(journal: Journal, case: Case, contender: Contender) -> None:
    # each may take as long as a whole case of another stage, and a compiler longer
    patience = 2 if contender.mode == "compiled" else 1
    faulthandler.dump_traceback_later(patience * MAX_SECONDS, exit=True)
    journal.enter(case.key, **contender.fields)


def prepare_call(contender: Contender, case: Case, subject: "Subject") -> tuple["Call", int | None]:
    """Prepare the contender's checked call, and measure the memory of a run of it.

    The memory includes its buffers, its temporaries and the weights, which all share.
    """
    on_gpu = case.device.type == "cuda"
    # a dense model does the same in every step
    num_steps = 1 if contender.policy == "dense" else case.model.num_steps
    before = torch.cuda.memory_reserved() if on_gpu else 0
    call = make_call(contender, case, subject)
    output = warm_up(call, contender, subject, num_steps)
    if not output.isfinite().all():
        raise ValueError("the result must be finite, got one that is not")
    plain = replace(contender, mode="stream", modulation="per-step")
    if plain != contender:
        wanted = run_all(make_call(plain, case, subject), subject, num_steps)
        error = ((output - wanted).float().norm() / wanted.float().norm()).item()
        if not error <= MAX_ERROR:
            raise ValueError(f"the result is off by {error:.2g} of its norm, allowed {MAX_ERROR}")
    if not on_gpu:
        return call, None
    release_memory()
    torch.cuda.reset_peak_memory_stats()
    run_all(call, subject, num_steps)
    weights = sum(tensor.nbytes for tensor in subject.transformer.parameters())
    return call, torch.cuda.max_memory_reserved() - before + weights


def warm_up(call: "Call", contender: Contender, subject: "Subject", num_steps: int) -> Tensor:
    """Run until nothing is new any more; the output of the last call."""
    run_all(call, subject, num_steps)
    if contender.policy == "dense" or contender.mode != "graph":
        return run_all(call, subject, num_steps)
    from tokencache_kernels.integrations.diffusers import count_graph_steps

    # each kind of step runs once, is captured, and is replayed from then on
    for _ in range(4):
        before = count_graph_steps(call.transformer).replayed
        output = run_all(call, subject, num_steps)
        if count_graph_steps(call.transformer).replayed - before == num_steps:
            return output
    got = count_graph_steps(call.transformer)
    raise ValueError(f"all steps of a run must be replayed in the end, got {got}")


# records


def make_records(
    case: Case,
    contender: Contender,
    subject: "Subject",
    runs: list[list[float]],
    pipelines: list[float],
) -> Iterator[Record]:
    """Make the records of whole runs, and of each kind of step, from the seconds of all steps."""
    policy = case.make_policy(contender.policy, subject)
    shape = subject.published_shape if contender.backend == "published" else subject.shape
    dense, num_steps = subject.shape.dense_flops, case.model.num_steps
    kinds, flops = ["dense_step"] * num_steps, [dense] * num_steps
    if policy is not None:
        plan = make_plan(policy, shape)
        kinds, flops = [name_step(step) for step in plan.steps], [s.flops for s in plan.steps]
    by_step = list(zip(*runs, strict=True))
    total = {"flops": sum(flops), "flops_ratio": num_steps * dense / sum(flops)}
    yield {
        "what": "run",
        **summarise([sum(run) for run in runs]),
        **total,
        "steps_ms": [1e3 * statistics.median(seconds) for seconds in by_step],
        "steps_flops": flops,
    }
    if pipelines:
        yield {"what": "run_with_scheduler", **summarise(pipelines), **total}
    for kind in dict.fromkeys(kinds):
        places = [index for index, name in enumerate(kinds) if name == kind]
        mean = sum(flops[index] for index in places) / len(places)
        yield {
            "what": kind,
            **summarise([seconds for index in places for seconds in by_step[index]]),
            "flops": mean,
            "flops_ratio": dense / mean if mean else None,
            "places": places,
        }


def name_step(step: StepPlan) -> str:
    """Name the kind of a step."""
    if step.is_full:
        return "full_step"
    if step.is_skipped:
        return "skipped_step"
    actions = {decision.action for decision in step.decisions.values()}
    return "reuse_step" if actions == {Action.REUSE} else "partial_step"
