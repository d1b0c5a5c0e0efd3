"""Superpose a transformer's cached and fresh features, to learn which of them a step needs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import CacheMissError, UnsupportedInputError, fail
from ..policies import Site

# takes the generator of the run; gives clean latents (B, C, H, W) and class labels (B,)
Draw = Callable[[torch.Generator], tuple[Tensor, Tensor]]

# the model classes supported, by name
_SUPPORTED = ("DiTTransformer2DModel",)


class Superposition:
    """Hooks on all sub-layers of a transformer: one forward records, another blends.

    The outputs are those that a cache keeps: after the output projection, before the gate. Outside
    the two contexts the model is as it was; ``remove`` takes the hooks off.

    Attributes:
        features: the outputs of the last recording, without a gradient.
    """

    def __init__(self, transformer: nn.Module, backend: str = "auto") -> None:
        """Hook a ``DiTTransformer2DModel``; its weights should not require a gradient.

        Raises:
            UnsupportedInputError: the model is of another class.
        """
        self.features: dict[Site, Tensor] = {}
        self._is_recording = False
        self._weights: Mapping[Site, Tensor] = {}
        self._backend = backend
        self._handles = [
            module.register_forward_hook(partial(self._finish, site))
            for site, module in find_sublayers(transformer).items()
        ]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the outputs of every sub-layer that runs inside, in place of all kept before."""
        self.features = {}
        self._is_recording = True
        try:
            yield
        finally:
            self._is_recording = False

    @contextmanager
    def blending(self, weights: Mapping[Site, Tensor]) -> Iterator[None]:
        """Blend the recorded with the fresh outputs of the sub-layers named.

        ``out = (1 - weight) * recorded + weight * fresh``, with a gradient to the weight and to
        the fresh output; sub-layers without a weight stay fresh.

        Args:
            weights: (), (N,) or (B, N) each; see ``ops.blend``.

        Raises:
            CacheMissError: a sub-layer named was not recorded.
        """
        for site in weights:
            if site not in self.features:
                raise CacheMissError(f"blending: {site} must be recorded first, got nothing")
        self._weights = weights
        try:
            yield
        finally:
            self._weights = {}

    def remove(self) -> None:
        """Take the hooks off, and forget the features."""
        for handle in self._handles:
            handle.remove()
        self.features = {}

    def _finish(self, site: Site, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        if self._is_recording:
            self.features[site] = output.detach()
        if site not in self._weights:
            return output
        return ops.blend(self.features[site], output, self._weights[site], backend=self._backend)


def find_sublayers(transformer: Any) -> dict[Site, nn.Module]:
    """Find the modules whose outputs are cached, in the order in which they run.

    Raises:
        UnsupportedInputError: the model is not a ``DiTTransformer2DModel``.
    """
    name = type(transformer).__name__
    if name not in _SUPPORTED:
        raise UnsupportedInputError(
            f"Superposition: transformer must be one of {', '.join(_SUPPORTED)}, got {name}"
        )
    sublayers: dict[Site, nn.Module] = {}
    for layer, block in enumerate(transformer.transformer_blocks):
        sublayers[Site("main", layer, "attn")] = block.attn1
        sublayers[Site("main", layer, "mlp")] = block.ff
    return sublayers


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Run the model in evaluation mode and without gradients to its weights inside."""
    was_training = model.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(was_training)
        for parameter in trained:
            parameter.requires_grad_()


def check_scheduler(op: str, scheduler: Any) -> int:
    """Refuse steps of which none can be cached, or that are not DDIM's; count them."""
    num_steps = len(scheduler.timesteps)
    if num_steps < 2:
        fail(op, "scheduler", "be set to at least 2 steps", num_steps)
    if not hasattr(scheduler, "alphas_cumprod") or scheduler.timesteps.is_floating_point():
        wanted = "have alphas_cumprod and whole timesteps, as DDIM has"
        fail(op, "scheduler", wanted, type(scheduler).__name__)
    if scheduler.config.prediction_type != "epsilon":
        got = repr(scheduler.config.prediction_type)
        fail(op, "scheduler", "have prediction_type 'epsilon'", got)
    return num_steps


def run_step_before(
    transformer: Any,
    scheduler: Any,
    latents: Tensor,
    labels: Tensor,
    noise: Tensor,
    steps: Tensor,
) -> Tensor:
    """Noise clean latents up to the step before ``steps`` (B,), and take one DDIM step."""
    timesteps = scheduler.timesteps
    before = timesteps[steps - 1].to(latents.device)
    noisy = scheduler.add_noise(latents, noise, before)
    # a model with a learned variance gives that after the noise
    predicted = transformer(noisy, timestep=before, class_labels=labels).sample
    predicted = predicted[:, : latents.shape[1]]
    kept_before, kept = (
        scheduler.alphas_cumprod[time][:, None, None, None].to(latents)
        for time in (timesteps[steps - 1], timesteps[steps])
    )
    clean = (noisy - (1 - kept_before).sqrt() * predicted) / kept_before.sqrt()
    return kept.sqrt() * clean + (1 - kept).sqrt() * predicted
