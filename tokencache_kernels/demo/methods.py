"""The ways of saving work that the demo compares, each by a name such as ``toca-3``."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..policies import SHAPES, Policy, ToCaConfig, fora, make_plan
from .model import SHAPE

KNOWN = (
    "dense, fewer-<steps>, fora-<interval>, random-<interval>[-<percent>] or "
    "toca-<interval>[-<percent>]"
)
PRESET = "dit-xl-ddim50"


@dataclass(frozen=True)
class Method:
    """One way of drawing a picture that takes the dense model ``dense_steps`` steps."""

    name: str
    title: str
    dense_steps: int
    steps: int
    policy: Policy | None = None  # None runs the model as it is

    @property
    def flops_ratio(self) -> float:
        """How many times fewer FLOPs the blocks take than in the dense model's steps."""
        if self.policy is None:
            return self.dense_steps / self.steps
        return make_plan(self.policy, SHAPES["demo"]).flops_ratio


def parse_method(name: str, steps: int) -> Method:
    """Build the method called ``name``, for a picture that takes the dense model ``steps`` steps.

    ``random`` and ``toca`` follow the published setting of DiT-XL with that refresh interval, and
    with that percentage of fresh tokens as the base of its ratios.

    Raises:
        ValueError: there is no such method; the message lists those there are.
    """
    match = re.fullmatch(r"dense|(fewer|fora)-(\d+)|(random|toca)-(\d+)(?:-(\d+))?", name)
    numbers = [int(number) for number in re.findall(r"\d+", name)]
    if match is None or min(numbers, default=1) < 1 or max(numbers[1:], default=0) > 100:
        raise ValueError(f"parse_method: name must be {KNOWN}, got {name!r}")
    if name == "dense":
        return Method(name, "dense", steps, steps)
    family, number = name.split("-")[0], numbers[0]
    if family == "fewer":
        return Method(name, f"dense, {number} steps", steps, number)
    if family == "fora":
        return Method(name, f"FORA, every {number}", steps, steps, fora(number, steps))
    percent = numbers[1] if len(numbers) > 1 else None
    policy = ToCaConfig.preset(
        PRESET,
        num_inference_steps=steps,
        num_layers=SHAPE["num_layers"],
        refresh_interval=number,
        fresh_ratio=None if percent is None else percent / 100,
        seed=0 if family == "random" else None,
    )
    kind = "random tokens" if family == "random" else "ToCa"
    share = "" if percent is None else f", {percent} %"
    return Method(name, f"{kind}, every {number}{share}", steps, steps, policy)


@contextlib.contextmanager
def applied(model: Any, method: Method) -> Iterator[None]:
    """Run the model under the method's policy inside the block, and as it is again after it."""
    if method.policy is None:
        yield
        return
    from ..integrations.diffusers import apply_token_cache, remove_token_cache

    apply_token_cache(model, method.policy)
    try:
        yield
    finally:
        remove_token_cache(model)
