"""What diffusers calls the parts of our models and processes: pure renaming, in tensors and plain values.

    DiT   → DiTTransformer2DModel   with classes and model.frequency_shift 1, without qk_norm
    UNet  → UNet2DModel             without a learned variance, which its pipelines cannot take apart
    Gaussian process of any schedule and prediction → DDIMScheduler

Everything else is refused: there is nothing in diffusers it could become.
"""

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dtrain.diffusion.flow import RectifiedFlow
from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.errors import UserError
from dtrain.models.dit import DiT
from dtrain.models.unet import UNet

PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


@dataclass(frozen=True)
class Exported:
    """A model and a scheduler as diffusers reads them."""

    folder: str  # of the model in a pipeline: transformer or unet
    config: dict[str, Any]  # config.json of that folder
    weights: dict[str, Tensor]  # diffusion_pytorch_model.safetensors; views of the model's own where nothing is split
    scheduler: dict[str, Any]  # scheduler/scheduler_config.json


def to_diffusers(model: DiT | UNet, process: GaussianDiffusion | RectifiedFlow, spacing: str = "trailing") -> Exported:
    """The model and the process in diffusers' terms. Raises UserError for what has no counterpart there."""
    if isinstance(process, RectifiedFlow):
        raise UserError(
            "a flow cannot be exported to diffusers: its DiT and UNet come with schedulers of other processes"
        )
    if spacing not in ("trailing", "leading", "linspace"):
        raise UserError(f"diffusers knows no spacing {spacing}; take trailing or leading")
    folder, config, weights = _dit(model) if isinstance(model, DiT) else _unet(model)
    return Exported(folder, config, weights, _scheduler(process, spacing))


def _scheduler(process: GaussianDiffusion, spacing: str) -> dict[str, Any]:
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": process.schedule.timesteps,
        "trained_betas": process.schedule.beta.tolist(),
        "prediction_type": PREDICTION[process.prediction],
        "timestep_spacing": spacing,
        "steps_offset": 0,
        "clip_sample": False,
        "set_alpha_to_one": True,
    }


# -- DiT ------------------------------------------------------------------------------------------------------------


def _dit(model: DiT) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    if not model.num_classes:
        raise UserError("diffusers' DiT has classes, but model.num_classes is 0; this model cannot be exported to it")
    if model.t_embedder.shift != 1:
        raise UserError(
            "diffusers' DiT spaces its time frequencies unlike the published one, so weights trained with "
            "model.frequency_shift 0 would give other images there; train with model.frequency_shift 1"
        )
    heads, width = model.blocks[0].attn.heads, model.pos_embed.shape[-1]
    state = model.state_dict()
    if any("q_norm" in name for name in state):
        raise UserError("diffusers' DiT has no qk_norm; a model with model.qk_norm cannot be exported to it")
    if model.blocks[0].mlp.fc1.out_features != 4 * width:
        raise UserError("diffusers' DiT has an MLP of four times the width; this model cannot be exported to it")
    config = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": model.channels,
        "out_channels": model.out_channels,
        "num_layers": len(model.blocks),
        "sample_size": model.image_size,
        "patch_size": model.patch,
        "num_embeds_ada_norm": model.num_classes,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "attention_bias": True,
    }
    weights: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "pos_embed":
            continue  # diffusers computes the same
        if name.startswith(("t_embedder.", "y_embedder.")):
            for i in range(len(model.blocks)):  # each block there has its own, here they share one
                weights[f"transformer_blocks.{i}.norm1.emb.{_renamed(name, DIT_CONDITION)}"] = value.clone()
        else:
            _put(weights, _renamed(name, DIT), value)
    return "transformer", config, weights


DIT_CONDITION = [
    (r"^t_embedder\.mlp\.0", "timestep_embedder.linear_1"),
    (r"^t_embedder\.mlp\.2", "timestep_embedder.linear_2"),
    (r"^y_embedder\.", "class_embedder."),
]
DIT = [
    (r"^x_embedder\.", "pos_embed."),
    (r"^final_layer\.adaLN_modulation\.1", "proj_out_1"),
    (r"^final_layer\.linear", "proj_out_2"),
    (r"^blocks\.", "transformer_blocks."),
    (r"\.adaLN_modulation\.1", ".norm1.linear"),
    (r"\.attn\.qkv", ".attn1.qkv"),
    (r"\.attn\.proj", ".attn1.to_out.0"),
    (r"\.mlp\.fc1", ".ff.net.0.proj"),
    (r"\.mlp\.fc2", ".ff.net.2"),
]


# -- UNet -----------------------------------------------------------------------------------------------------------


def _unet(model: UNet) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    if model.out_channels != model.channels:
        raise UserError("diffusers' UNet pipelines cannot take a learned variance; train with a fixed one to export")
    attentive = [model.image_size >> i in model.attention for i in range(len(model.multipliers))]
    config = {
        "_class_name": "UNet2DModel",
        "sample_size": model.image_size,
        "in_channels": model.channels,
        "out_channels": model.channels,
        "block_out_channels": [model.width * m for m in model.multipliers],
        "layers_per_block": model.res_blocks,
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attentive],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attentive)],
        "attention_head_dim": model.head_width,
        "norm_num_groups": model.groups,
        "attn_norm_num_groups": model.groups,
        "norm_eps": 1e-6,
        "dropout": model.dropout,
        "resnet_time_scale_shift": "scale_shift" if model.scale_shift else "default",
        "num_class_embeds": model.num_classes + 1 if model.num_classes else None,
        "time_embedding_type": "positional",
        "freq_shift": 0,
        "flip_sin_to_cos": True,
        "downsample_padding": 1,
    }
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        _put(weights, _renamed(name, UNET), value)
    return "unet", config, weights


UNET = [
    (r"^t_embedder\.mlp\.0", "time_embedding.linear_1"),
    (r"^t_embedder\.mlp\.2", "time_embedding.linear_2"),
    (r"^y_embedder\.embedding_table", "class_embedding"),
    (r"^norm_out", "conv_norm_out"),
    (r"^middle1", "mid_block.resnets.0"),
    (r"^middle2", "mid_block.resnets.1"),
    (r"^middle_attention", "mid_block.attentions.0"),
    (r"^down\.(\d+)\.resample", r"down_blocks.\1.downsamplers.0.conv"),
    (r"^up\.(\d+)\.resample", r"up_blocks.\1.upsamplers.0"),
    (r"^(down|up)\.(\d+)\.blocks", r"\1_blocks.\2.resnets"),
    (r"^(down|up)\.(\d+)\.attentions", r"\1_blocks.\2.attentions"),
    (r"(attentions\.\d+)\.norm", r"\1.group_norm"),
    (r"(attentions\.\d+)\.attn\.qkv", r"\1.qkv"),
    (r"(attentions\.\d+)\.attn\.proj", r"\1.to_out.0"),
    (r"\.condition\.", ".time_emb_proj."),
    (r"\.skip\.", ".conv_shortcut."),
]


def _renamed(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _put(weights: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Under its name; queries, keys and values, which we keep as one, as three."""
    if ".qkv." not in name:
        weights[name] = value
        return
    for part, third in zip(("to_q", "to_k", "to_v"), value.chunk(3), strict=True):
        weights[name.replace(".qkv.", f".{part}.")] = third.contiguous()
