"""The models of the stage ``models``: random weights, and the arguments of a pipeline.

Of the benchmarks, this file alone imports diffusers as it is imported itself.
"""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
)
from torch import Tensor, nn

from tokencache_kernels.models import SPECS, Sizes
from tokencache_kernels.policies import ModelShape, model_shape

DTYPE = torch.bfloat16
GUIDANCE = 4.0
NUM_CLASSES = 1000

Call = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class BoundCall:
    """A transformer's call on latents and timestep (B,)."""

    transformer: Any
    named: dict[str, Any]

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Return the prediction."""
        return self.transformer(latents, timestep=timestep, **self.named, return_dict=False)[0]


@dataclass
class Subject:
    """A model, and the arguments of its calls.

    Attributes:
        transformer: without hooks or gradients.
        shape: the source of its operation counts.
        published_shape: the shape of the published code of ToCa.
        latents: the start of a run.
        named: the arguments of a call beside latents and timestep.
        scheduler: of the published setting.
        timestep_divisor: the divisor of the scheduler's timesteps for the model.
    """

    transformer: nn.Module
    shape: ModelShape
    published_shape: ModelShape
    latents: Tensor
    named: dict[str, Any]
    scheduler: Any
    timestep_divisor: int = 1

    def copy_transformer(self) -> Any:
        """The modules anew around the same weights: hooks on them are not on the others."""
        tensors = itertools.chain(self.transformer.parameters(), self.transformer.buffers())
        return copy.deepcopy(self.transformer, {id(tensor): tensor for tensor in tensors})

    def bind(self, transformer: nn.Module) -> BoundCall:
        """The call of a transformer."""
        return BoundCall(transformer, self.named)

    def begin_run(self, num_steps: int) -> list[Tensor]:
        """Set the scheduler back; return the timesteps as the model wants them, on its device."""
        self.scheduler.set_timesteps(num_steps)
        B, device = len(self.latents), self.latents.device
        timesteps = self.scheduler.timesteps
        if self.timestep_divisor > 1:
            timesteps = timesteps / self.timestep_divisor
        return [timestep.expand(B).contiguous() for timestep in timesteps.to(device)]

    def advance(self, output: Tensor, index: int, latents: Tensor) -> Tensor:
        """The next latents, given the model's output in the step ``index`` of the run."""
        if output.shape[1] == 2 * latents.shape[1]:
            # the second half of the channels is a learned variance, that of the batch guidance's
            conditional, unconditional = output.chunk(2, dim=1)[0].chunk(2)
            guided = unconditional + GUIDANCE * (conditional - unconditional)
            output = torch.cat([guided, guided])
        timestep = self.scheduler.timesteps[index]
        return self.scheduler.step(output, timestep, latents, return_dict=False)[0]


@contextlib.contextmanager
def _built_on(device: torch.device) -> Iterator[None]:
    """Build a model inside in place: twelve billion parameters pass through no other memory."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(default)


def _finish(transformer: nn.Module) -> nn.Module:
    # also tensors made in float32, such as positions
    return nn.Module.to(transformer, DTYPE).eval().requires_grad_(False)


def make_dit(batch: int, device: torch.device, is_tiny: bool) -> Subject:
    """DiT-XL/2 at 256 px, with guidance in the second half of the batch."""
    heads, head_dim, layers, side = (2, 8, 2, 16) if is_tiny else (16, 72, 28, 32)
    with _built_on(device):
        transformer = DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            num_layers=layers,
            in_channels=4,
            out_channels=8,
            sample_size=side,
            num_embeds_ada_norm=NUM_CLASSES,
            norm_num_groups=1,
        )
        latents = torch.randn(batch // 2, 4, side, side).repeat(2, 1, 1, 1)
        labels = torch.randint(NUM_CLASSES, (batch,))
        # the null class of guidance
        labels[batch // 2 :] = NUM_CLASSES
    sizes = Sizes({"transformer_blocks": layers}, heads * head_dim, heads, 4 * heads * head_dim)
    shape = model_shape(
        SPECS["DiTTransformer2DModel"], sizes, batch=batch, image_tokens=(side // 2) ** 2
    )
    named = {"class_labels": labels}
    return Subject(_finish(transformer), shape, shape, latents, named, DDIMScheduler())


def make_pixart(batch: int, device: torch.device, is_tiny: bool) -> Subject:
    """PixArt-alpha at 256 px, prompts of 20 tokens padded to 120, with guidance."""
    heads, head_dim, layers, side = (2, 8, 2, 16) if is_tiny else (16, 72, 28, 32)
    padded, text_tokens, width = (8, 5, 16) if is_tiny else (120, 20, 4096)
    with _built_on(device):
        transformer = PixArtTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            num_layers=layers,
            sample_size=side,
            cross_attention_dim=heads * head_dim,
            caption_channels=width,
            norm_num_groups=1,
        )
        latents = torch.randn(batch // 2, 4, side, side).repeat(2, 1, 1, 1)
        named = {
            "encoder_hidden_states": torch.randn(batch, padded, width),
            "encoder_attention_mask": (torch.arange(padded) < text_tokens).repeat(batch, 1).long(),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
    sizes = Sizes({"transformer_blocks": layers}, heads * head_dim, heads, 4 * heads * head_dim)
    shape = model_shape(
        SPECS["PixArtTransformer2DModel"], sizes, batch=batch, image_tokens=(side // 2) ** 2,
        text_tokens=text_tokens,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler()
    return Subject(_finish(transformer), shape, shape, latents, named, scheduler)


def make_flux(batch: int, device: torch.device, is_tiny: bool) -> Subject:
    """FLUX.1-dev at 1024 px, whose guidance is an input."""
    heads, head_dim, doubles, singles, side = (2, 16, 2, 2, 4) if is_tiny else (24, 128, 19, 38, 64)
    axes = (4, 6, 6) if is_tiny else (16, 56, 56)
    text_tokens, width, pooled = (8, 16, 16) if is_tiny else (512, 4096, 768)
    with _built_on(device):
        transformer = FluxTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            num_layers=doubles,
            num_single_layers=singles,
            joint_attention_dim=width,
            pooled_projection_dim=pooled,
            guidance_embeds=True,
            axes_dims_rope=axes,
        )
        latents = torch.randn(batch, side * side, 64)
        places = torch.arange(side * side, dtype=torch.float32)
        named = {
            "encoder_hidden_states": torch.randn(batch, text_tokens, width),
            "pooled_projections": torch.randn(batch, pooled),
            "img_ids": torch.stack([0 * places, places // side, places % side], dim=-1),
            "txt_ids": torch.zeros(text_tokens, 3, dtype=torch.float32),
            "guidance": torch.full((batch,), 3.5, dtype=torch.float32),
        }
    spec = SPECS["FluxTransformer2DModel"]
    blocks = {"transformer_blocks": doubles, "single_transformer_blocks": singles}
    sizes = Sizes(blocks, heads * head_dim, heads, 4 * heads * head_dim)
    shape, published_shape = (
        model_shape(
            spec, sizes, batch=batch, image_tokens=side * side, text_tokens=text_tokens,
            projects_again=projects_again,
        )
        for projects_again in (False, True)
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler()
    return Subject(_finish(transformer), shape, published_shape, latents, named, scheduler, 1000)
