"""ToCa (arXiv:2410.05317), and its variants: FORA, random tokens."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from ..errors import fail
from .carriers import REUSE, Carrier, Taylor
from .decisions import Action, Decision, Site, Step, count_fresh
from .routers import FactorRouter, Router
from .schedules import AdaptiveSchedule, IntervalSchedule, LastStepFull, Schedule
from .selectors import RandomSelector, ScoreSelector, Selector

# the gain of a token in a whole cycle of waiting; a step of waiting gives 1 / refresh_interval of
# it
STALENESS_GAIN = 0.25
# published code divides the layer by 27 in every model, also where there are not 28 layers
PUBLISHED_LAYERS = 28


@dataclass(frozen=True)
class ToCaConfig:
    """A token-wise policy: when (schedule), where (router), which (selector), how (carrier)."""

    schedule: Schedule
    router: Router
    selector: Selector
    num_inference_steps: int
    name: str = "custom"
    carrier: Carrier = REUSE

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            fail("ToCaConfig", "num_inference_steps", "be at least 1", self.num_inference_steps)

    @classmethod
    def preset(
        cls,
        name: str,
        *,
        num_inference_steps: int | None = None,
        num_layers: int = PUBLISHED_LAYERS,
        fresh_ratio: float | None = None,
        refresh_interval: int | None = None,
        mixed_steps: bool = False,
        seed: int | None = None,
        shares_guidance: bool | None = None,
        last_step_full: bool = False,
    ) -> "ToCaConfig":
        """Build the published setting of a model, or a variation of it.

        Args:
            name: ``"dit-xl-ddim50"``, ``"dit-xl-ddpm250"``, ``"pixart-alpha"``, ``"opensora"`` or
                ``"flux-1-dev"``.
            num_inference_steps: the sampler's steps.
            num_layers: the depth over which the ratio changes; the default is the published one
                for every model.
            fresh_ratio: the base ratio, in [0, 1]. At 0 full steps are evenly spaced, as published:
                that is FORA.
            refresh_interval: the length of a cycle (N in the paper).
            mixed_steps: whether a step may be full in block 0 alone, as in the published code of
                DiT and PixArt; see ``AdaptiveSchedule``.
            seed: if given, draw the tokens at random with this seed instead of scoring them.
            shares_guidance: whether both halves of the batch select the same tokens; None: as
                published. False where the batch has no guidance in it, or where its two passes are
                two calls.
            last_step_full: whether the last step is full, too; False: as published.
        """
        if name not in _PRESETS:
            fail("ToCaConfig.preset", "name", f"be one of {', '.join(_PRESETS)}", repr(name))
        row = _PRESETS[name]
        interval = row.refresh_interval if refresh_interval is None else refresh_interval
        ratio = row.fresh_ratio if fresh_ratio is None else fresh_ratio
        schedule = row.schedule(interval)
        if isinstance(schedule, AdaptiveSchedule):
            schedule = replace(schedule, mixed_steps=mixed_steps)
            if ratio == 0:
                schedule = replace(schedule, slope=0.0, dense_window=None)
        elif ratio == 0:
            # without fresh tokens the published schedules have no warmup
            schedule = replace(schedule, warmup=1, phase=0)
        selector: ScoreSelector | RandomSelector = (
            row.selector(staleness_weight=STALENESS_GAIN / interval)
            if seed is None
            else RandomSelector(seed)
        )
        if shares_guidance is not None:
            selector = replace(selector, shares_guidance=shares_guidance)
        return cls(
            schedule=LastStepFull(schedule) if last_step_full else schedule,
            router=row.router(ratio, num_layers),
            selector=selector,
            num_inference_steps=(
                row.num_inference_steps if num_inference_steps is None else num_inference_steps
            ),
            name=name,
        )

    @classmethod
    def constant(
        cls,
        fresh_ratio: float,
        refresh_interval: int,
        num_inference_steps: int,
        *,
        selector: Selector | None = None,
        name: str = "constant",
        last_step_full: bool = False,
    ) -> "ToCaConfig":
        """Recompute the same share of tokens in every layer and step; self-attention is reused.

        Args:
            fresh_ratio: that share, in [0, 1].
            refresh_interval: the first of every so many steps is full.
            num_inference_steps: the sampler's steps.
            selector: which tokens; None: by attention received and staleness.
            name: how the policy is called in reports.
            last_step_full: whether the last step is full, too.
        """
        schedule: Schedule = IntervalSchedule(refresh_interval)
        if last_step_full:
            schedule = LastStepFull(schedule)
        if selector is None:
            selector = ScoreSelector(staleness_weight=STALENESS_GAIN / refresh_interval)
        router = FactorRouter(fresh_ratio, module_weight={"attn": 0.0})
        return cls(schedule, router, selector, num_inference_steps, name)

    @property
    def num_layers(self) -> int | None:
        """None: the policy fits any depth."""
        return None

    @property
    def predictor(self) -> None:
        """None: no network scores tokens."""
        return None

    def decide(self, site: Site, step: Step, num_tokens: int) -> Decision:
        """Decide the work at ``site`` in ``step``; ``num_tokens`` is the length of its sequence."""
        if self.schedule.is_full(site, step):
            return Decision(Action.FULL, num_tokens)
        num_fresh = count_fresh(self.router.fresh_ratio(site, step), num_tokens)
        return Decision(Action.PARTIAL if num_fresh else Action.REUSE, num_fresh)


def fora(
    refresh_interval: int, num_inference_steps: int, *, last_step_full: bool = False
) -> ToCaConfig:
    """FORA (arXiv:2407.01425): every so many steps are full, and the others recompute no token.

    ``last_step_full`` makes the last step full, too; as published it is not.
    """
    return ToCaConfig.constant(
        0.0, refresh_interval, num_inference_steps, name="fora", last_step_full=last_step_full
    )


def taylor_seer(
    refresh_interval: int,
    num_inference_steps: int,
    order: int = 2,
    *,
    last_step_full: bool = False,
) -> ToCaConfig:
    """TaylorSeer (arXiv:2503.06923): no token is recomputed between full steps, all are forecast.

    Full are the first three steps, from which the differences are taken, and then every
    ``refresh_interval``-th; if ``last_step_full``, also the last one.
    """
    schedule: Schedule = IntervalSchedule(refresh_interval, warmup=3, phase=2)
    return ToCaConfig(
        LastStepFull(schedule) if last_step_full else schedule,
        FactorRouter(0.0),
        ScoreSelector("none"),
        num_inference_steps,
        name="taylor-seer",
        carrier=Taylor(order),
    )


def random_tokens(
    fresh_ratio: float, refresh_interval: int, num_inference_steps: int, seed: int = 0
) -> ToCaConfig:
    """A constant share of tokens, drawn at random."""
    return ToCaConfig.constant(
        fresh_ratio,
        refresh_interval,
        num_inference_steps,
        selector=RandomSelector(seed),
        name="random",
    )


@dataclass(frozen=True)
class _Preset:
    """The published constants of one model; the first three are the ones that users change."""

    num_inference_steps: int
    refresh_interval: int
    fresh_ratio: float
    schedule: Callable[..., AdaptiveSchedule | IntervalSchedule]
    router: Callable[..., FactorRouter]
    selector: Callable[..., ScoreSelector]


_dit_schedule = partial(AdaptiveSchedule, slope=0.4, counts_down=True, dense_window=(0.2, 0.4))
_dit_router = partial(FactorRouter, counts_down=True, module_weight={"attn": 0.0, "mlp": 2.5})
_dit_selector = partial(ScoreSelector, "attention_received", tile=2, bonus=0.6)
_entropy_selector = partial(ScoreSelector, "attention_entropy", shares_guidance=True)

_PRESETS = {
    "dit-xl-ddim50": _Preset(
        num_inference_steps=50,
        refresh_interval=3,
        fresh_ratio=0.07,
        schedule=_dit_schedule,
        router=partial(_dit_router, depth_slope=-0.2, time_slope=2.0),
        selector=_dit_selector,
    ),
    "dit-xl-ddpm250": _Preset(
        num_inference_steps=250,
        refresh_interval=4,
        fresh_ratio=0.07,
        schedule=_dit_schedule,
        router=partial(_dit_router, depth_slope=0.8, time_slope=0.4),
        selector=_dit_selector,
    ),
    "pixart-alpha": _Preset(
        num_inference_steps=20,
        refresh_interval=3,
        fresh_ratio=0.30,
        schedule=partial(AdaptiveSchedule, slope=-0.2, counts_down=False),
        router=partial(
            FactorRouter,
            depth_slope=0.6,
            time_slope=0.9,
            module_weight={"attn": 0.0, "cross": 0.6, "mlp": 1.6},
        ),
        selector=partial(_entropy_selector, tile=4, bonus=0.4),
    ),
    "opensora": _Preset(
        num_inference_steps=30,
        refresh_interval=3,
        fresh_ratio=0.10,
        schedule=partial(IntervalSchedule, warmup=3, module_multiple={"cross": 2}),
        router=partial(FactorRouter, module_weight={"attn": 0.0, "cross": -0.005, "mlp": 1.495}),
        selector=_entropy_selector,
    ),
    "flux-1-dev": _Preset(
        num_inference_steps=50,
        refresh_interval=4,
        fresh_ratio=0.10,
        schedule=partial(IntervalSchedule, warmup=3, phase=2),
        router=partial(
            FactorRouter,
            depth_slope=0.5,
            module_weight={"attn": 0.0},
            stream_weight={"double": 0.4, "single": 1.6},
        ),
        selector=partial(ScoreSelector, "attention_received"),
    ),
}
