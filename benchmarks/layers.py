"""The stage ``layers``: whole cached layers of a partial step, beside the alternatives.

A run goes through all layers of a model, each with weights and caches of its own: the gated
additions over all tokens, the selection, and the MLP of the fresh tokens from its norm to its
scatter. Times are those of one layer. On a GPU all contenders run in turn over the same layers, as
they are called (``stream``) and as a replayed graph (``graph``, or ``compiled`` after
``torch.compile``). On a CPU the tokens are given, and the two products alone, which bound the
layer, are timed beside it.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokencache_kernels import backends, ops
from tokencache_kernels.blocks import (
    Layers,
    Mlp,
    MlpLayer,
    Modulation,
    ParallelLayer,
    ResidualStream,
)
from tokencache_kernels.policies import Site

from . import published
from .cases import TINY, Shape
from .kernels import (
    MAX_ERROR,
    Ceilings,
    add_shares,
    has_failed,
    measure_all_ceilings,
    name_dtype,
    prepare_run,
    release_memory,
    time_ways,
)
from .records import describe_run
from .stages import Journal, Record, in_time, is_wanted, work_through

# a tenth of the tokens fresh and more: DiT-XL/2, and all tokens of FLUX
LEADING = (
    Shape("dit-xl-256px-16-10%", 16, 256, 26, 1152, 4608, L=28),
    Shape("flux-1024px-10%", 1, 4608, 460, 3072, 12288, L=19),
    Shape("dit-xl-256px-64-10%", 64, 256, 26, 1152, 4608, L=28),
    Shape("dit-xl-512px-8-30%", 8, 1024, 307, 1152, 4608, L=28),
    Shape("flux-1024px-30%", 1, 4608, 1382, 3072, 12288, L=19),
    Shape("flux-1024px-50%", 1, 4608, 2304, 3072, 12288, L=19),
    Shape("flux-1024px-single", 1, 4608, 614, 3072, 12288, L=38, extra=3072),
)
# where caching breaks even: by channels, tokens and percentage of fresh ones
PERCENTAGES = (10, 30, 100, 5, 20, 50, 75)
GRID = tuple(
    Shape(f"{D}-channels-{N}-tokens-{percent}%", 2, N, N * percent // 100, D, 4 * D, L=L)
    for D, L in ((1152, 28), (3072, 19))
    for N in (256, 1024, 4096)
    for percent in PERCENTAGES
)
# few layers, but too many for any cache
ON_CPU = tuple(
    Shape(f"dit-xl-256px-{B}-{S}", B, 256, S, 1152, 4608, L=8)
    for B in (2, 8)
    for S in (26, 64, 128)
)
TINY_SINGLE = replace(TINY, name="tiny-single", extra=TINY.D)
STALENESS_WEIGHT = 0.25 / 3


class Layer(NamedTuple):
    """The inputs of one layer, and the ``cache`` of its MLP, which it writes.

    ``attention`` is its cached branch; in a single block of FLUX there is none, and ``attended``
    goes into fc2 beside the hidden channels.
    """

    gate: Tensor
    shift: Tensor
    scale: Tensor
    cache: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor
    attention: Tensor | None
    attended: Tensor | None


@dataclass(frozen=True)
class Work:
    """The tensors of a run.

    Attributes:
        x: (B, N, D), the residual stream before the first layer; no run writes it.
        before: (B, N, D), the branch of the layer before the first one, still to be added.
        layers: in their order.
        linears: their fc1 and fc2 as a model has them, of the same weights.
        scores: (L, B, N) float32.
        staleness: (L, B, N) int32, which selections write.
        fresh: (L, B, S) int64, the tokens of a run that selects nothing.
        grid: how the tokens lie where their place counts.
    """

    x: Tensor
    before: Tensor
    layers: list[Layer]
    linears: list[tuple[nn.Linear, nn.Linear]]
    scores: Tensor
    staleness: Tensor
    fresh: Tensor
    grid: tuple[int, int] | None


def make_work(shape: Shape, dtype: torch.dtype, device: torch.device) -> Work:
    """Random tensors, the same in every process."""
    B, N, D, M, L, extra = (getattr(shape, name) for name in ("B", "N", "D", "M", "L", "extra"))
    random = {"device": device, "generator": torch.Generator(device).manual_seed(0)}

    def normal(*sizes: int, std: float = 1.0) -> Tensor:
        return torch.randn(sizes, dtype=dtype, **random) * std

    def make_linear(rows: int, columns: int) -> nn.Linear:
        linear = nn.Linear(columns, rows, device="meta")
        linear.weight = nn.Parameter(normal(rows, columns, std=columns**-0.5), requires_grad=False)
        linear.bias = nn.Parameter(normal(rows), requires_grad=False)
        return linear

    linears = [(make_linear(M, D), make_linear(D, M + extra)) for _ in range(L)]
    layers = [
        Layer(
            *(normal(B, D) for _ in ("gate", "shift", "scale")),
            cache=normal(B, N, D),
            **{"fc1": fc1.weight, "fc1_bias": fc1.bias, "fc2": fc2.weight, "fc2_bias": fc2.bias},
            attention=None if extra else normal(B, N, D),
            attended=normal(B, N, extra) if extra else None,
        )
        for fc1, fc2 in linears
    ]
    scores = torch.rand(L, B, N, **random)
    return Work(
        x=normal(B, N, D),
        before=normal(B, N, D),
        layers=layers,
        linears=linears,
        scores=scores,
        staleness=torch.randint(0, 4, scores.shape, dtype=torch.int32, **random),
        fresh=scores.argsort(-1)[..., : shape.S].sort(-1).values,
        # FLUX packs its tokens, and its published code does not know where they lie
        grid=shape.grid if D < 3072 else None,
    )


# ours


def run_ours(work: Work, backend: str, is_selected_by_layer: bool = False) -> Tensor:
    """As the runner and the blocks go through a partial step; ``auto`` selects in any case."""
    select = partial(
        ops.select_tokens_,
        max_fresh=work.fresh.shape[-1], staleness_weight=STALENESS_WEIGHT,
        grid=work.grid, bonus=published.BONUS,
    )  # fmt: skip
    if is_selected_by_layer:
        selected = (select(*scores) for scores in zip(work.scores, work.staleness, strict=True))
    else:
        selected = zip(*select(work.scores, work.staleness), strict=True)
    return recompute(work, backend, selected)


def run_ours_on_given(work: Work, backend: str) -> Tensor:
    """The same where the tokens are given."""
    N = work.x.shape[1]
    selected = (
        (indices, ops.invert_indices(indices, N, backend=backend)) for indices in work.fresh.int()
    )
    return recompute(work, backend, selected)


def recompute(work: Work, backend: str, selected: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """All layers, given the indices and positions of each."""
    stream = ResidualStream(work.x, backend)
    before = work.before
    for layer, linears, fresh in zip(work.layers, work.linears, selected, strict=True):
        stream.add(before, layer.gate)
        if layer.attention is not None:
            stream.add(layer.attention, layer.gate)
        make_sub_layer(layer, linears, backend).recompute_(layer.cache, stream, *fresh)
        before = layer.cache
    return stream.hidden_states


def make_sub_layer(
    layer: Layer, linears: tuple[nn.Linear, nn.Linear], backend: str
) -> MlpLayer | ParallelLayer:
    """Build the block's part that recomputes the fresh tokens; a fused one never calls a module."""
    site, modulation = (
        Site("main", 0, "mlp"),
        Modulation(layer.shift, layer.scale, ops.RowNorm(eps=published.EPS)),
    )
    layers = Layers(*linears, "gelu_tanh")
    if layer.attended is None:
        return MlpLayer(site, layer.gate, modulation, Mlp(nn.Identity(), layers), backend)
    return ParallelLayer(
        site, layer.gate, modulation, lambda: layer.attended, nn.Identity(), layers, backend
    )


# the alternatives of a user


def add_branches(x: Tensor, before: Tensor, layer: Layer) -> Tensor:
    """The gated additions over all tokens."""
    x = x + layer.gate[:, None] * before
    return x if layer.attention is None else x + layer.gate[:, None] * layer.attention


def recompute_rows_(x: Tensor, layer: Layer, fresh: Tensor) -> None:
    """The MLP of the fresh tokens as published, one small kernel after another."""
    rows = published.gather_modulate(x, fresh, layer.shift, layer.scale)
    hidden = published.linear_gelu(rows, layer.fc1, layer.fc1_bias)
    if layer.attended is not None:
        hidden = torch.cat([published.gather_rows(layer.attended, fresh), hidden], dim=-1)
    published.linear_scatter_(layer.cache, fresh, hidden, layer.fc2, layer.fc2_bias)


def select_and_recompute_(
    x: Tensor,
    before: Tensor,
    layer: Layer,
    scores: Tensor,
    staleness: Tensor,
    num_fresh: int,
    grid: tuple[int, int] | None,
) -> Tensor:
    """A layer as published."""
    x = add_branches(x, before, layer)
    combined = published.combine_scores(scores, staleness, STALENESS_WEIGHT, grid)
    fresh = combined.argsort(dim=-1, descending=True)[:, :num_fresh]
    staleness.add_(1).scatter_(-1, fresh, 0)
    recompute_rows_(x, layer, fresh)
    return x


def run_published(work: Work, run_layer: Callable[..., Tensor] = select_and_recompute_) -> Tensor:
    """Each layer selects its own tokens."""
    x, before = work.x, work.before
    for layer, *scores in zip(work.layers, work.scores, work.staleness, strict=True):
        x = run_layer(x, before, layer, *scores, work.fresh.shape[-1], work.grid)
        before = layer.cache
    return x


def run_published_on_given(work: Work) -> Tensor:
    """The same where the tokens are given."""
    x, before = work.x, work.before
    for layer, fresh in zip(work.layers, work.fresh, strict=True):
        x = add_branches(x, before, layer)
        recompute_rows_(x, layer, fresh)
        before = layer.cache
    return x


def pack_rows(
    x: Tensor, before: Tensor, layer: Layer, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The additions, and the rows (B * S,) of all samples' tokens, normalised and modulated."""
    x = add_branches(x, before, layer)
    B, _, D = x.shape
    packed = F.layer_norm(x.flatten(0, 1)[rows].view(B, -1, D), (D,), eps=published.EPS)
    packed = packed * (1 + layer.scale[:, None]) + layer.shift[:, None]
    attended = None if layer.attended is None else layer.attended.flatten(0, 1)[rows]
    return x, packed.flatten(0, 1), attended


def choose_rows(
    scores: Tensor, staleness: Tensor, num_fresh: int, grid: tuple[int, int] | None
) -> Tensor:
    """The library's selection for all layers at once: rows (L, B * S) of all samples' tokens."""
    combined = published.combine_scores(scores, staleness, STALENESS_WEIGHT, grid)
    fresh = combined.topk(num_fresh, dim=-1, sorted=False).indices
    staleness.add_(1).scatter_(-1, fresh, 0)
    _, B, N = scores.shape
    return (fresh + N * torch.arange(B, device=fresh.device)[:, None]).flatten(1)


def run_library(work: Work, pack: Callable[..., Any], choose: Callable[..., Tensor]) -> Tensor:
    """The fewest launches that PyTorch's own parts give: fused row pass and GELU, one selection."""
    x, before = work.x, work.before
    chosen = choose(work.scores, work.staleness, work.fresh.shape[-1], work.grid)
    for layer, rows in zip(work.layers, chosen, strict=True):
        x, packed, attended = pack(x, before, layer, rows)
        hidden = torch._addmm_activation(layer.fc1_bias, packed, layer.fc1.t(), use_gelu=True)
        if attended is not None:
            hidden = torch.cat([attended, hidden], dim=-1)
        out = torch.addmm(layer.fc2_bias, hidden, layer.fc2.t())
        layer.cache.flatten(0, 1).index_copy_(0, rows, out)
        before = layer.cache
    return x


def compute_all_rows(x: Tensor, before: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """A layer that caches nothing, without its attention, which caching saves as well."""
    x = add_branches(x, before, layer)
    rows = F.layer_norm(x, x.shape[-1:], eps=published.EPS)
    rows = rows * (1 + layer.scale[:, None]) + layer.shift[:, None]
    hidden = published.linear_gelu(rows, layer.fc1, layer.fc1_bias)
    if layer.attended is not None:
        hidden = torch.cat([layer.attended, hidden], dim=-1)
    return x, F.linear(hidden, layer.fc2, layer.fc2_bias)


def run_dense(work: Work, run_layer: Callable[..., Any] = compute_all_rows) -> Tensor:
    """All tokens of every layer."""
    x, before = work.x, work.before
    for layer in work.layers:
        x, before = run_layer(x, before, layer)
    return x


def run_products(work: Work, multiply: Callable[..., Tensor]) -> Tensor:
    """The two products of the fresh tokens alone."""
    rows = work.x[:, : work.fresh.shape[-1]].contiguous()
    for layer in work.layers:
        rows = multiply(multiply(rows, layer.fc1, layer.fc1_bias), layer.fc2, layer.fc2_bias)
    return rows


# the stage


@dataclass(frozen=True)
class Case:
    """A model's layers of one shape.

    ``is_leading``: against every contender; ``is_compiled``: also against ``torch.compile``.
    """

    shape: Shape
    dtype: torch.dtype
    device: torch.device
    selects: bool = True
    is_leading: bool = True
    is_compiled: bool = False

    @property
    def key(self) -> Record:
        """The common fields of its records."""
        return {
            "case": "layer" if self.selects else "layer-of-given-tokens",
            "shape": self.shape.name,
            "dtype": name_dtype(self.dtype),
        }

    @property
    def bytes(self) -> int:
        """The least bytes of one layer: each input read once, each output written once."""
        B, N, S, D, extra = (getattr(self.shape, name) for name in ("B", "N", "S", "D", "extra"))
        # a single block of FLUX has no attention branch, but rows of attention that fc2 reads
        features = B * D * ((3 if extra else 4) * N + S) + B * S * extra
        selection = 4 * B * (4 * N + S) if self.selects else 0
        return (features + self.num_weights) * self.dtype.itemsize + selection

    @property
    def flops(self) -> int:
        """The floating-point operations of its products."""
        return 2 * self.shape.B * self.shape.S * self.num_weights

    @property
    def seconds(self) -> int:
        """Upper bound in seconds, roughly; compilers take nearly all."""
        return 100 if self.is_compiled else 0

    @property
    def num_weights(self) -> int:
        """The number of weights in both matrices."""
        return self.shape.D * (2 * self.shape.M + self.shape.extra)

    def make_work(self, depth: int | None = None) -> Work:
        """All layers, or so many."""
        shape = replace(self.shape, L=depth or self.shape.L)
        return make_work(shape, self.dtype, self.device)


@dataclass(frozen=True)
class Way:
    """One way through the layers; ``make_run`` gives it, compiled if it is.

    ``is_comparable``: it does the work of the paper's composition, and is timed only if the result
    is the same.
    """

    name: str
    make_run: Callable[[], Callable[[Work], Tensor]]
    modes: tuple[str, ...]
    is_baseline: bool = False
    is_comparable: bool = True


def run_stage(options: argparse.Namespace, deadline: float) -> int:
    """Time the cases that have no records yet until the deadline; end with a table."""
    facts = describe_run(options.device, options.commit, options.session)
    journal = Journal(options.out, "layers", {**facts, "rehearsal": options.rehearse})
    cases = [
        case
        for case in list_cases(options.device, options.rehearse)
        if is_wanted(case.key, options.only)
    ]
    if options.no_compiled:
        cases = [replace(case, is_compiled=False) for case in cases]
    # another process may be here for the table alone
    dtypes = {case.dtype for case in cases} if time.monotonic() < deadline else set()
    ceilings = measure_all_ceilings(dtypes, options, journal)
    measure = partial(time_case, ceilings=ceilings, journal=journal, rehearse=options.rehearse)
    work_through(journal, cases, in_time(measure, journal, deadline), deadline)
    return has_failed(journal.records)


def list_cases(device: torch.device, rehearse: bool) -> list[Case]:
    """The most informative first."""
    if rehearse:
        given = Case(TINY, torch.float32, device, selects=False)
        return [*(Case(shape, torch.bfloat16, device) for shape in (TINY, TINY_SINGLE)), given]
    if device.type == "cpu":
        return [
            Case(shape, dtype, device, selects=False)
            for shape in ON_CPU
            for dtype in (torch.bfloat16, torch.float32)
        ]
    # compiling takes long, and all tokens are the same ones at each percentage
    compiled = (*LEADING, *GRID[:: len(PERCENTAGES)])
    return [
        Case(
            shape, torch.bfloat16, device,
            is_leading=shape in LEADING, is_compiled=shape in compiled,
        )
        for shape in (*LEADING, *GRID)
    ]  # fmt: skip


def list_ways(case: Case) -> Iterator[Way]:
    """The published way, ours, then the other baselines."""
    on_gpu = case.device.type == "cuda"
    graph = ("graph",) if on_gpu else ("stream",)
    both = ("stream", "graph") if on_gpu else ("stream",)
    eager = run_published if case.selects else run_published_on_given
    yield Way("eager", _ready(eager), both, is_baseline=True)
    if case.selects:
        yield Way("auto", _ready(run_ours, backend="auto"), both)
    else:
        yield Way("native", _ready(run_ours_on_given, backend="native"), both)
    yield Way("dense", _ready(run_dense), graph, is_baseline=True, is_comparable=False)
    if not case.selects:
        packed = partial(ops.linear, backend="native")
        for name, multiply in (("products", packed), ("eager-products", F.linear)):
            products = _ready(run_products, multiply=multiply)
            yield Way(name, products, both, is_baseline=True, is_comparable=False)
        return
    if case.is_leading:
        by_layer = _ready(run_ours, backend="auto", is_selected_by_layer=True)
        yield Way("auto-selecting-by-layer", by_layer, graph)
        for backend in ("triton", "native"):
            if backends.unavailable(backend, "row_pass", case.device, case.dtype) is None:
                yield Way(backend, _ready(run_ours, backend=backend), graph)
        library = partial(make_library_run, case.is_compiled)
        yield Way("library", library, graph, is_baseline=True)
        if case.is_compiled:
            compiled = partial(compile_layer, run_published, select_and_recompute_)
            yield Way("eager", compiled, ("compiled",), is_baseline=True)
    if case.is_compiled:
        compiled = partial(compile_layer, run_dense, compute_all_rows)
        yield Way("dense", compiled, ("compiled",), is_baseline=True, is_comparable=False)


def _ready(run: Callable[..., Tensor], **settings: Any) -> Callable[[], Callable[[Work], Tensor]]:
    """Wrap a run that needs no preparation."""
    return lambda: partial(run, **settings)


def compile_layer(
    run: Callable[..., Tensor], layer: Callable[..., Any]
) -> Callable[[Work], Tensor]:
    """The run with its layer compiled, for sizes that never change."""
    # each case compiles the same code anew, and after some times the compiler would give up
    torch.compiler.reset()
    # the graph is ours, as for the others
    return partial(run, run_layer=_compile(layer, "max-autotune-no-cudagraphs"))


def make_library_run(is_compiled: bool) -> Callable[[Work], Tensor]:
    """Compose the run of PyTorch's own parts."""
    if not is_compiled:
        return partial(run_library, pack=pack_rows, choose=choose_rows)
    torch.compiler.reset()
    return partial(run_library, pack=_compile(pack_rows), choose=_compile(choose_rows))


def _compile(function: Callable[..., Any], mode: str = "default") -> Callable[..., Any]:
    return torch.compile(function, mode=mode, dynamic=False, fullgraph=True)


def time_case(
    case: Case, ceilings: dict[torch.dtype, Ceilings], journal: Journal, rehearse: bool
) -> Iterator[Record]:
    """A record for each contender; for one that fails, one with the error in place of times."""
    release_memory()
    common = {
        **case.key,
        "sizes": vars(case.shape),
        "bytes": case.bytes,
        "flops": case.flops,
        **ceilings[case.dtype].fields,
    }
    work = case.make_work()

    def prepare(way: Way, mode: str) -> tuple[Callable[[], object], Record]:
        run = way.make_run()
        if way.is_comparable:
            check_result(case, run)
        return prepare_run([partial(run, work)], mode), {}

    ways, depth = list_ways(case), case.shape.L
    timed = time_ways(ways, prepare, depth, case.key, common, case.device, journal, rehearse)
    yield from add_shares(timed, ceilings[case.dtype])


def check_result(case: Case, run: Callable[[Work], Tensor]) -> None:
    """Compare the tensors after two layers with those of the paper's composition."""
    results = []
    for go in (run, run_published if case.selects else run_published_on_given):
        work = case.make_work(2)
        x = go(work)
        results.append(
            torch.cat([t.flatten().float() for t in (x, *(y.cache for y in work.layers))])
        )
    ours, wanted = results
    error = ((ours - wanted).norm() / wanted.norm()).item()
    if not error <= MAX_ERROR:
        raise ValueError(f"the result is off by {error:.2g} of its norm, allowed {MAX_ERROR}")
