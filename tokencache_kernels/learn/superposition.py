"""Superpose a transformer's cached and fresh features, to learn which of them a step needs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import CacheMissError, UnsupportedInputError, fail
from ..integrations.diffusers.binding import attention_site, bind, resolve, site_of
from ..integrations.diffusers.descriptions import find_spec
from ..models import ModelSpec, Parallel
from ..policies import Site

# takes the generator of the run; gives clean latents (B, C, H, W) and class labels (B,)
Draw = Callable[[torch.Generator], tuple[Tensor, Tensor]]


class Superposition:
    """Hooks on all sub-layers of a transformer: one forward records, another blends.

    The outputs are those that a cache keeps: after the output projection, before the gate. Outside
    the two contexts the model is as it was; ``remove`` takes the hooks off.

    Attributes:
        features: the outputs of the last recording, without a gradient; of attention among the
            tokens of two streams a pair.
    """

    def __init__(
        self, transformer: nn.Module, backend: str = "auto", *, spec: ModelSpec | None = None
    ) -> None:
        """Hook a described model; its weights should not require a gradient.

        Args:
            transformer: the model.
            backend: the backend of ``ops.blend``.
            spec: the description of a model that is not described yet.

        Raises:
            UnsupportedInputError: the model is not described.
        """
        self.features: dict[Site, Any] = {}
        self._is_recording = False
        self._weights: Mapping[Site, Tensor] = {}
        self._backend = backend
        self._handles = [
            module.register_forward_hook(partial(self._finish, site))
            for site, module in find_sublayers(transformer, spec).items()
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
            weights: (), (N,) or (B, N) each; see ``ops.blend``. Of attention among the tokens of
                two streams (): it is one weight for both.

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

    def _finish(self, site: Site, module: nn.Module, inputs: object, output: Any) -> Any:
        if self._is_recording:
            self.features[site] = _map(Tensor.detach, output)
        if site not in self._weights:
            return output
        weight = self._weights[site]
        blend = partial(ops.blend, backend=self._backend)
        return _map(lambda kept, fresh: blend(kept, fresh, weight), self.features[site], output)


def _map(function: Callable[..., Tensor], *outputs: Any) -> Any:
    """Apply a function to the tensors of a module's output, which may be a pair."""
    if isinstance(outputs[0], tuple):
        return tuple(_map(function, *parts) for parts in zip(*outputs, strict=True))
    return None if outputs[0] is None else function(*outputs)


def find_sublayers(transformer: Any, spec: ModelSpec | None = None) -> dict[Site, nn.Module]:
    """Find the modules whose outputs are cached, in the order in which they run.

    Args:
        transformer: the model.
        spec: the description of a model that is not described yet.

    Raises:
        UnsupportedInputError: the model is not described, or its description does not fit.
    """
    binding = bind(find_spec("Superposition", transformer, spec), transformer)
    sublayers: dict[Site, nn.Module] = {}
    for stack, layer, block in binding.blocks(transformer):
        for part in binding.parts[stack.path][layer]:
            if isinstance(part, Parallel):
                sublayers[attention_site(stack, layer)] = resolve(block, part.attention)
                sublayers[site_of(stack, part, layer)] = resolve(block, part.fc2)
            else:
                sublayers[site_of(stack, part, layer)] = resolve(block, part.module)
    return sublayers


def check_conditioning(op: str, transformer: Any) -> None:
    """Refuse a model that sees more than a class: training draws latents and labels.

    Raises:
        UnsupportedInputError: the model is not described, or has other conditioning.
    """
    spec = find_spec(op, transformer, None)
    if spec.conditioning != ("class_labels",):
        raise UnsupportedInputError(
            f"{op}: transformer must be conditioned by class_labels alone, got {spec.transformer}"
        )


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
