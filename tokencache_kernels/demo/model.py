"""The demo's diffusion transformer: its shape, its noise schedule, and where its weights lie."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .data import IMAGE_SIZE, NUM_CLASSES

NULL_CLASS = NUM_CLASSES  # the label that stands for "no class" in classifier-free guidance
WEIGHTS = Path(__file__).parent / "weights" / "digits_dit.safetensors"
SHAPE: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 6,
    "sample_size": IMAGE_SIZE,
    "patch_size": 2,
    "num_embeds_ada_norm": NUM_CLASSES,
    "norm_num_groups": 1,
}


def build_model() -> Any:
    """Build the untrained ``DiTTransformer2DModel``: 6 blocks, 128 wide, 16 x 16 = 256 tokens."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(**SHAPE)
    for block in model.transformer_blocks:
        # diffusers would drop the label in every block on its own; training does it once an image
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return model


def build_scheduler() -> Any:
    """Build the DDIM scheduler of the noise schedule that the model was trained on."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=2e-2,
        # clipping the clean image at every step leaves blotches in guided samples
        clip_sample=False,
        timestep_spacing="trailing",
    )


def save_weights(model: torch.nn.Module, path: Path = WEIGHTS) -> None:
    """Write the weights in float16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, path)


def load_model(path: Path = WEIGHTS) -> Any:
    """Load the shipped model in evaluation mode, in float32.

    Raises:
        ValueError: the file is truncated, or holds no weights of this model.
        FileNotFoundError: there is no such file.
    """
    model = build_model()
    try:
        model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    # PyTorch's own message lists every weight
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"load_model: path must hold the weights of the demo's model, whole, got {path}"
        ) from error
    return model.eval().requires_grad_(False)
