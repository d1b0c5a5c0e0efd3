"""A tiny model of every described class, with random weights, and its inputs at a step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import randn
from .models import tiny_dit, tiny_flux, tiny_pixart
from .stdit import STDiT3
from .uvit import UViT

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A class of models.

    Attributes:
        build: makes a model.
        inputs: the arguments of a call, from the step, the prompt and the batch.
    """

    build: Callable[[], Any]
    inputs: Callable[[int, int, int], Inputs]


def _tiny(name: str, seed: int = 0, **config: Any) -> Any:
    import diffusers

    return _randomise(getattr(diffusers, name)(**config), seed)


def _randomise(model: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15, generator=generator)
    for module in model.modules():
        # weights of norms near 1, so that attention is not nearly uniform
        if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            module.weight.data += 1
    return model.eval().requires_grad_(False)


def _falling(step: int, batch: int) -> Tensor:
    return torch.full((batch,), 900.0 - 60 * step)


def _sd3(step: int, prompt: int, batch: int) -> Inputs:
    return {
        "hidden_states": randn(batch, 4, 8, 8, seed=step),
        "encoder_hidden_states": randn(batch, 5, 16, seed=50 + prompt),
        "pooled_projections": randn(batch, 12, seed=70 + prompt),
        "timestep": _falling(step, batch),
    }


def _qwen(step: int, prompt: int, batch: int) -> Inputs:
    return {
        "hidden_states": randn(batch, 16, 8, seed=step),
        "encoder_hidden_states": randn(batch, 5, 12, seed=50 + prompt),
        "encoder_hidden_states_mask": torch.ones(batch, 5, dtype=torch.long),
        "timestep": _falling(step, batch) / 1000,
        "img_shapes": [[(1, 4, 4)]] * batch,
    }


def _wan(step: int, prompt: int, batch: int) -> Inputs:
    return {
        "hidden_states": randn(batch, 4, 2, 8, 8, seed=step),
        "encoder_hidden_states": randn(batch, 5, 16, seed=50 + prompt),
        "timestep": _falling(step, batch),
    }


def _hunyuan_video(step: int, prompt: int, batch: int) -> Inputs:
    return {
        "hidden_states": randn(batch, 4, 2, 4, 4, seed=step),
        "encoder_hidden_states": randn(batch, 5, 16, seed=50 + prompt),
        "encoder_attention_mask": torch.ones(batch, 5),
        "pooled_projections": randn(batch, 8, seed=70 + prompt),
        "timestep": _falling(step, batch),
        "guidance": torch.full((batch,), 3500.0),
    }


def _hunyuan_video_15(step: int, prompt: int, batch: int) -> Inputs:
    return {
        "hidden_states": randn(batch, 4, 2, 4, 4, seed=step),
        "encoder_hidden_states": randn(batch, 5, 16, seed=50 + prompt),
        "encoder_attention_mask": torch.ones(batch, 5),
        "encoder_hidden_states_2": randn(batch, 3, 8, seed=60 + prompt),
        "encoder_attention_mask_2": torch.ones(batch, 3),
        "image_embeds": randn(batch, 2, 10, seed=80 + prompt),
        "timestep": _falling(step, batch),
    }


def _chroma(step: int, prompt: int, batch: int) -> Inputs:
    return {
        "hidden_states": randn(batch, 16, 4, seed=step),
        "encoder_hidden_states": randn(batch, 5, 10, seed=50 + prompt),
        "timestep": _falling(step, batch) / 1000,
        "img_ids": torch.arange(48).view(16, 3) % 4.0,
        "txt_ids": torch.zeros(5, 3),
    }


def _cogvideox(step: int, prompt: int, batch: int) -> Inputs:
    return {
        "hidden_states": randn(batch, 2, 4, 8, 8, seed=step),
        "encoder_hidden_states": randn(batch, 5, 16, seed=50 + prompt),
        "timestep": _falling(step, batch).long(),
    }


def _ltx(step: int, prompt: int, batch: int) -> Inputs:
    return {
        "hidden_states": randn(batch, 16, 4, seed=step),
        "encoder_hidden_states": randn(batch, 5, 16, seed=50 + prompt),
        "encoder_attention_mask": torch.ones(batch, 5),
        "timestep": _falling(step, batch),
        "num_frames": 1,
        "height": 4,
        "width": 4,
    }


def _ltx2(step: int, prompt: int, batch: int) -> Inputs:
    return {
        "hidden_states": randn(batch, 16, 4, seed=step),
        "audio_hidden_states": randn(batch, 6, 4, seed=step + 30),
        "encoder_hidden_states": randn(batch, 5, 16, seed=50 + prompt),
        "audio_encoder_hidden_states": randn(batch, 5, 16, seed=60 + prompt),
        "timestep": _falling(step, batch),
        "num_frames": 1,
        "height": 4,
        "width": 4,
        "audio_num_frames": 6,
    }


def _krea2(step: int, prompt: int, batch: int) -> Inputs:
    return {
        "hidden_states": randn(batch, 16, 4, seed=step),
        "encoder_hidden_states": randn(batch, 5, 2, 16, seed=50 + prompt),
        "timestep": _falling(step, batch) / 1000,
        "position_ids": torch.arange(63).view(21, 3) % 4,
        "encoder_attention_mask": torch.ones(batch, 5, dtype=torch.bool),
    }


def _lumina2(step: int, prompt: int, batch: int) -> Inputs:
    return {
        "hidden_states": randn(batch, 4, 8, 8, seed=step),
        "encoder_hidden_states": randn(batch, 5, 16, seed=50 + prompt),
        "encoder_attention_mask": torch.ones(batch, 5, dtype=torch.bool),
        "timestep": 1 - _falling(step, batch) / 1000,
    }


def _z_image(step: int, prompt: int, batch: int) -> Inputs:
    return {
        "x": [randn(4, 1, 8, 8, seed=100 * step + one) for one in range(batch)],
        "t": 1 - _falling(step, batch) / 1000,
        "cap_feats": [randn(5, 16, seed=50 + prompt + one) for one in range(batch)],
    }


def _flux2(step: int, prompt: int, batch: int) -> Inputs:
    return {
        "hidden_states": randn(batch, 16, 4, seed=step),
        "encoder_hidden_states": randn(batch, 5, 10, seed=50 + prompt),
        "timestep": _falling(step, batch) / 1000,
        "guidance": torch.full((batch,), 3.5),
        "img_ids": torch.arange(64).view(16, 4) % 4.0,
        "txt_ids": torch.zeros(5, 4),
    }


def _uvit(step: int, prompt: int, batch: int) -> Inputs:
    return {
        "x": randn(batch, 2, 8, 8, seed=step),
        "timesteps": _falling(step, batch) + 0.5,
        "y": (torch.arange(batch) + prompt) % 10,
    }


def _trunk(step: int, prompt: int, batch: int) -> Inputs:
    return {
        "hidden_states": randn(batch, 2, 8, 8, seed=step),
        # the trunk itself reads neither
        "timestep": _falling(step, batch),
        "encoder_hidden_states": randn(batch, 3, 8, seed=50 + prompt),
    }


def _build_trunk() -> Any:
    from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UTransformer2DModel

    return _randomise(
        UTransformer2DModel(
            num_attention_heads=3, attention_head_dim=8, in_channels=2, out_channels=6,
            num_layers=4, sample_size=8, patch_size=2, activation_fn="gelu", norm_type="layer_norm",
            block_type="plain", pre_layer_norm=True, use_patch_pos_embed=True,
        )
    )  # fmt: skip


def _stdit(step: int, prompt: int, batch: int) -> Inputs:
    mask = torch.ones(batch, 5, dtype=torch.long)
    mask[:, 3 + prompt :] = 0
    return {
        "x": randn(batch, 4, 3, 8, 8, seed=step),
        "timestep": _falling(step, batch),
        "y": randn(batch, 5, 10, seed=50 + prompt),
        "mask": mask,
        "fps": torch.full((batch,), 24.0),
    }


def _latte(step: int, prompt: int, batch: int) -> Inputs:
    return {
        "hidden_states": randn(batch, 4, 2, 8, 8, seed=step),
        "encoder_hidden_states": randn(batch, 5, 16, seed=50 + prompt),
        "timestep": _falling(step, batch).long(),
    }


def _dit(step: int, prompt: int, batch: int) -> Inputs:
    return {
        "hidden_states": randn(batch, 2, 8, 8, seed=step),
        "timestep": _falling(step, batch).long(),
        "class_labels": (torch.arange(batch) + prompt) % 10,
    }


def _pixart(step: int, prompt: int, batch: int) -> Inputs:
    return {
        "hidden_states": randn(batch, 2, 8, 8, seed=step),
        "encoder_hidden_states": randn(batch, 5, 10, seed=50 + prompt),
        "timestep": _falling(step, batch).long(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _flux(step: int, prompt: int, batch: int) -> Inputs:
    return {
        "hidden_states": randn(batch, 16, 4, seed=step),
        "encoder_hidden_states": randn(batch, 5, 10, seed=50 + prompt),
        "pooled_projections": randn(batch, 6, seed=70 + prompt),
        "timestep": _falling(step, batch) / 1000,
        "guidance": torch.full((batch,), 3.5),
        "img_ids": torch.arange(48).view(16, 3) % 4.0,
        "txt_ids": torch.zeros(5, 3),
    }


FAMILIES: dict[str, Family] = {
    "DiTTransformer2DModel": Family(tiny_dit, _dit),
    "PixArtTransformer2DModel": Family(tiny_pixart, _pixart),
    "FluxTransformer2DModel": Family(tiny_flux, _flux),
    "SD3Transformer2DModel": Family(
        lambda: _tiny(
            "SD3Transformer2DModel", sample_size=8, patch_size=2, in_channels=4, num_layers=3,
            attention_head_dim=8, num_attention_heads=3, joint_attention_dim=16,
            caption_projection_dim=24, pooled_projection_dim=12, out_channels=4,
            pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
        ), _sd3,
    ),
    "QwenImageTransformer2DModel": Family(
        lambda: _tiny(
            "QwenImageTransformer2DModel", patch_size=2, in_channels=8, out_channels=2,
            num_layers=3, attention_head_dim=12, num_attention_heads=2, joint_attention_dim=12,
            axes_dims_rope=(4, 4, 4),
        ), _qwen,
    ),
    "WanTransformer3DModel": Family(
        lambda: _tiny(
            "WanTransformer3DModel", patch_size=(1, 2, 2), num_attention_heads=2,
            attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
            ffn_dim=48, num_layers=3, cross_attn_norm=True, rope_max_seq_len=32,
        ), _wan,
    ),
    "HunyuanVideoTransformer3DModel": Family(
        lambda: _tiny(
            "HunyuanVideoTransformer3DModel", in_channels=4, out_channels=4,
            num_attention_heads=2, attention_head_dim=12, num_layers=2, num_single_layers=2,
            num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True,
            text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 4, 4),
        ), _hunyuan_video,
    ),
    "HunyuanVideo15Transformer3DModel": Family(
        lambda: _tiny(
            "HunyuanVideo15Transformer3DModel", in_channels=4, out_channels=4,
            num_attention_heads=2, attention_head_dim=12, num_layers=3, num_refiner_layers=1,
            patch_size=1, patch_size_t=1, text_embed_dim=16, text_embed_2_dim=8,
            image_embed_dim=10, rope_axes_dim=(4, 4, 4), target_size=16,
            task_type="i2v",
        ), _hunyuan_video_15,
    ),
    "ChromaTransformer2DModel": Family(
        lambda: _tiny(
            "ChromaTransformer2DModel", in_channels=4, num_layers=2, num_single_layers=2,
            attention_head_dim=12, num_attention_heads=2, joint_attention_dim=10,
            axes_dims_rope=(4, 4, 4), approximator_num_channels=8, approximator_hidden_dim=16,
            approximator_layers=1,
        ), _chroma,
    ),
    "CogVideoXTransformer3DModel": Family(
        lambda: _tiny(
            "CogVideoXTransformer3DModel", num_attention_heads=2, attention_head_dim=16,
            in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16, num_layers=3,
            sample_width=8, sample_height=8, sample_frames=5, patch_size=2,
            temporal_compression_ratio=4, max_text_seq_length=5,
        ), _cogvideox,
    ),
    "LTXVideoTransformer3DModel": Family(
        lambda: _tiny(
            "LTXVideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2,
            attention_head_dim=12, cross_attention_dim=24, num_layers=3, caption_channels=16,
        ), _ltx,
    ),
    "Lumina2Transformer2DModel": Family(
        lambda: _tiny(
            "Lumina2Transformer2DModel", sample_size=8, patch_size=2, in_channels=4,
            hidden_size=24, num_layers=3, num_refiner_layers=1, num_attention_heads=2,
            num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(32, 32, 32),
            cap_feat_dim=16,
        ), _lumina2,
    ),
    "ZImageTransformer2DModel": Family(
        lambda: _tiny(
            "ZImageTransformer2DModel", all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4,
            dim=24, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
            axes_dims=[4, 4, 4], axes_lens=[64, 64, 64],
        ), _z_image,
    ),
    "Flux2Transformer2DModel": Family(
        lambda: _tiny(
            "Flux2Transformer2DModel", patch_size=1, in_channels=4, num_layers=2,
            num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=10, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        ), _flux2,
    ),
    "LTX2VideoTransformer3DModel": Family(
        lambda: _tiny(
            "LTX2VideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2,
            attention_head_dim=12, cross_attention_dim=24, audio_in_channels=4,
            audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=8,
            audio_cross_attention_dim=16, num_layers=3, caption_channels=16,
            vae_scale_factors=(1, 1, 1), base_height=8, base_width=8,
        ), _ltx2,
    ),
    "Krea2Transformer2DModel": Family(
        lambda: _tiny(
            "Krea2Transformer2DModel", in_channels=4, num_layers=3, attention_head_dim=12,
            num_attention_heads=2, num_key_value_heads=1, intermediate_size=40,
            timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=2,
            text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=24,
            num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 4, 4),
        ), _krea2,
    ),
    "UViT": Family(lambda: _randomise(UViT(8, 2, 2, 24, 4, 3, 10)), _uvit),
    "UTransformer2DModel": Family(_build_trunk, _trunk),
    "STDiT3": Family(lambda: _randomise(STDiT3(24, 2, 3, 4, 10, 5)), _stdit),
    "LatteTransformer3DModel": Family(
        lambda: _tiny(
            "LatteTransformer3DModel", num_attention_heads=3, attention_head_dim=8, in_channels=4,
            out_channels=4, num_layers=3, sample_size=8, patch_size=2, cross_attention_dim=24,
            caption_channels=16, norm_type="ada_norm_single", norm_elementwise_affine=False,
            norm_eps=1e-6, video_length=2, activation_fn="gelu-approximate", num_embeds_ada_norm=10,
        ), _latte,
    ),
}  # fmt: skip


def _wan_by_token(step: int, prompt: int, batch: int) -> Inputs:
    timestep = _falling(step, batch)[:, None].repeat(1, 32)
    # the tokens of the first frame are given
    timestep[:, :16] = 0
    return {**_wan(step, prompt, batch), "timestep": timestep}


def _wan_of_image(step: int, prompt: int, batch: int) -> Inputs:
    image = randn(batch, 3, 10, seed=80 + prompt)
    return {**_wan(step, prompt, batch), "encoder_hidden_states_image": image}


def _qwen_edit(step: int, prompt: int, batch: int) -> Inputs:
    return {
        **_qwen(step, prompt, batch),
        "hidden_states": randn(batch, 20, 8, seed=step),
        "img_shapes": [[(1, 4, 4), (1, 2, 2)]] * batch,
    }


def _flux_fill(step: int, prompt: int, batch: int) -> Inputs:
    masked = randn(batch, 16, 8, seed=90)
    given = _flux(step, prompt, batch)
    return {**given, "hidden_states": torch.cat([given["hidden_states"], masked], dim=2)}


def _flux_kontext(step: int, prompt: int, batch: int) -> Inputs:
    given, image = _flux(step, prompt, batch), randn(batch, 4, 4, seed=90)
    return {
        **given,
        "hidden_states": torch.cat([given["hidden_states"], image], dim=1),
        "img_ids": torch.cat([given["img_ids"], torch.ones(4, 3)]),
    }


def _flux_controlled(step: int, prompt: int, batch: int) -> Inputs:
    return {
        **_flux(step, prompt, batch),
        "controlnet_block_samples": [randn(batch, 16, 24, seed=step + 40)],
        "controlnet_single_block_samples": [randn(batch, 16, 24, seed=step + 41)],
    }


def _pixart_alpha(step: int, prompt: int, batch: int) -> Inputs:
    sizes = {
        "resolution": torch.full((batch, 2), 8.0),
        "aspect_ratio": torch.ones(batch, 1),
    }
    return {**_pixart(step, prompt, batch), "added_cond_kwargs": sizes}


# configurations and inputs of the same classes that take other ways through them
VARIANTS: dict[str, Family] = {
    "WanTransformer3DModel: a timestep of each token": Family(
        FAMILIES["WanTransformer3DModel"].build, _wan_by_token
    ),
    "WanTransformer3DModel: text and image": Family(
        lambda: _tiny(
            "WanTransformer3DModel", patch_size=(1, 2, 2), num_attention_heads=2,
            attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
            ffn_dim=48, num_layers=3, cross_attn_norm=True, rope_max_seq_len=32, image_dim=10,
            added_kv_proj_dim=24,
        ), _wan_of_image,
    ),
    "QwenImageTransformer2DModel: editing": Family(
        lambda: _tiny(
            "QwenImageTransformer2DModel", patch_size=2, in_channels=8, out_channels=2,
            num_layers=3, attention_head_dim=12, num_attention_heads=2, joint_attention_dim=12,
            axes_dims_rope=(4, 4, 4), zero_cond_t=True,
        ), _qwen_edit,
    ),
    "FluxTransformer2DModel: Fill": Family(
        lambda: tiny_flux(in_channels=12, out_channels=4), _flux_fill
    ),
    "FluxTransformer2DModel: Kontext": Family(tiny_flux, _flux_kontext),
    "FluxTransformer2DModel: ControlNet": Family(tiny_flux, _flux_controlled),
    "PixArtTransformer2DModel: sizes as conditions": Family(
        lambda: tiny_pixart(use_additional_conditions=True), _pixart_alpha
    ),
}  # fmt: skip
