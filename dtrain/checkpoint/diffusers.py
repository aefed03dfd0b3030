"""What diffusers calls the parts of our models, processes and sampling settings: in tensors and plain values.

    DiT   → DiTTransformer2DModel   with model.frequency_shift 1, without qk_norm
    UNet  → UNet2DModel
    Gaussian process of any schedule and prediction → DDIMScheduler
    rectified flow                                  → FlowMatchEulerDiscreteScheduler

diffusers' own DDIMPipeline draws from a UNet of a Gaussian process that has no classes and no learned variance. All
else is drawn by `pipeline.py`, which lies beside this file and is copied into the folder.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dtrain.config import Eval
from dtrain.config.guidance import CLASS, scale_of
from dtrain.diffusion.edm import EDM
from dtrain.diffusion.flow import MODEL_TIME, RectifiedFlow
from dtrain.diffusion.gamma import GammaDiffusion
from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.diffusion.process import Process
from dtrain.errors import UserError
from dtrain.models.dit import DiT
from dtrain.models.kl_autoencoder import KLAutoencoder
from dtrain.models.unet import UNet

PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SPACINGS = ("trailing", "leading")  # others are listed by diffusers' DDIM, but not walked
OWN_PIPELINE = "PixelPipeline"  # the class in pipeline.py
DIFFUSERS = "0.42.1"  # the version that the tests load folders with


@dataclass(frozen=True)
class Exported:
    """A model and how to draw from it, as diffusers reads them."""

    folder: str  # of the model in a pipeline: transformer or unet
    config: dict[str, Any]  # config.json of that folder
    weights: dict[str, Tensor]  # diffusion_pytorch_model.safetensors; views of the model's own where nothing is split
    scheduler: dict[str, Any]  # scheduler/scheduler_config.json
    index: dict[str, Any]  # model_index.json
    steps: int  # the default number of denoising steps
    left_out: list[str]  # sampling settings of the run that the folder's pipeline does not follow, as `eval.key value`

    @property
    def own_pipeline(self) -> bool:
        """Whether the folder needs our pipeline.py."""
        return self.index["_class_name"] != "DDIMPipeline"


def to_diffusers(
    model: DiT | UNet,
    process: Process,
    how: Eval,
    class_names: Sequence[str] | None = None,
) -> Exported:
    """The model, its process and its sampling settings in diffusers' terms; classes without a name get their number.

    Raises UserError for a model that has no counterpart there.
    """
    if isinstance(process, EDM):
        raise UserError(
            "diffusers' EDM schedulers tell a model ln σ/4, and one of diffusion.process edm is told ln σ on another "
            "scale; take --format safetensors"
        )
    folder, config, weights = _dit(model) if isinstance(model, DiT) else _unet(model)
    flow = isinstance(process, RectifiedFlow)
    steps = how.steps if flow else _dividing(process.schedule.timesteps, how.steps)
    scheduler = _flow_scheduler(process) if flow else _scheduler(process, how)
    index: dict[str, Any] = {
        "_class_name": "DDIMPipeline",
        "_diffusers_version": DIFFUSERS,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        folder: ["diffusers", config["_class_name"]],
    }
    if folder != "unet" or model.num_classes or flow or model.out_channels != model.channels:
        index["_class_name"] = ["pipeline", OWN_PIPELINE]
        names = [*(class_names or ())][: model.num_classes]
        names += [str(i) for i in range(len(names), model.num_classes)]
        index["id2label"] = {str(i): name for i, name in enumerate(names)}
        index["num_inference_steps"] = steps
        index["guidance_scale"] = scale_of(how.guidance, CLASS)
        index["eta"] = 0.0 if flow else _eta(how)
    left_out = _left_out(how, flow, steps) + ["diffusion.noise gamma"] * isinstance(process, GammaDiffusion)
    return Exported(folder, config, weights, scheduler, index, steps, left_out)


def _eta(how: Eval) -> float:
    return 1.0 if how.eta == "sigma_hat" else how.eta


def _dividing(timesteps: int, steps: int) -> int:
    """The largest number of steps up to `steps` that divides T: for others diffusers' DDIM leaves its own timesteps."""
    return next(s for s in range(steps, 0, -1) if timesteps % s == 0)


def _left_out(how: Eval, flow: bool, steps: int) -> list[str]:
    """Settings that determine the run's own samples and not those that the folder's pipeline draws."""
    drawn = {
        "sampler": "euler" if flow else "ddim",
        "steps": steps,
        "spacing": "trailing" if flow or how.spacing not in SPACINGS else how.spacing,
        "eta": 0.0 if flow else _eta(how),
        "clip": False if flow else how.clip,
        "guidance_interval": (0.0, 1.0),
        "guidance_rescale": 0.0,
    }
    return [f"eval.{key} {getattr(how, key)}" for key, value in drawn.items() if getattr(how, key) != value]


def _scheduler(process: GaussianDiffusion, how: Eval) -> dict[str, Any]:
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": DIFFUSERS,
        "num_train_timesteps": process.schedule.timesteps,
        "trained_betas": process.schedule.beta.tolist(),  # a zero terminal SNR is in them already
        "rescale_betas_zero_snr": False,
        "prediction_type": PREDICTION[process.prediction],
        "timestep_spacing": how.spacing if how.spacing in SPACINGS else "trailing",
        "steps_offset": 0,
        "clip_sample": how.clip,
        "clip_sample_range": 1.0,
        "thresholding": False,
        "set_alpha_to_one": True,
    }


def _flow_scheduler(process: RectifiedFlow) -> dict[str, Any]:
    if process.prediction != "velocity":
        raise UserError(
            f"diffusers' flow takes a model's answer as the velocity, and this one was trained with "
            f"diffusion.prediction {process.prediction}; export --format safetensors"
        )
    if process.time_scale != MODEL_TIME:
        raise UserError(
            f"diffusers tells a flow's model {MODEL_TIME} t, and this one was trained with diffusion.time_scale "
            f"{process.time_scale}; export --format safetensors or published"
        )
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": DIFFUSERS,
        "num_train_timesteps": MODEL_TIME,
        "shift": 1.0,
    }


# -- DiT ------------------------------------------------------------------------------------------------------------


def _dit(model: DiT) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    if model.t_embedder.shift != 1:
        raise UserError(
            "diffusers' DiT spaces its time frequencies unlike the published one, so weights trained with "
            "model.frequency_shift 0 would give other images there; train with model.frequency_shift 1, "
            "or export --format safetensors"
        )
    heads, width = model.blocks[0].attn.heads, model.pos_embed.shape[-1]
    state = model.state_dict()
    if any("q_norm" in name for name in state):
        raise UserError("diffusers' DiT has no qk_norm; train without model.qk_norm, or export --format safetensors")
    if model.blocks[0].mlp.fc1.out_features != 4 * width:
        raise UserError("diffusers' DiT has an MLP of four times the width; this model cannot be exported to it")
    if not model.num_classes:  # diffusers' DiT always has classes: one, and the null label, that add nothing
        state["y_embedder.embedding_table.weight"] = model.pos_embed.new_zeros(2, width)
    config = {
        "_class_name": "DiTTransformer2DModel",
        "_diffusers_version": DIFFUSERS,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": model.channels,
        "out_channels": model.out_channels,
        "num_layers": len(model.blocks),
        "sample_size": model.image_size,
        "patch_size": model.patch,
        "num_embeds_ada_norm": model.num_classes or 1,
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
                weights[f"transformer_blocks.{i}.norm1.emb.{renamed(name, DIT_CONDITION)}"] = value.clone()
        else:
            _put(weights, renamed(name, DIT), value)
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


# -- autoencoder ----------------------------------------------------------------------------------------------------


def autoencoder_config(model: KLAutoencoder, image_size: int) -> dict[str, Any]:
    """config.json of an AutoencoderKL, whose parameters have our names. Its latents are as they come, unscaled."""
    levels = len(model.widths)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS,
        "in_channels": model.channels,
        "out_channels": model.channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": model.widths,
        "layers_per_block": model.res_blocks,
        "latent_channels": model.latent_channels,
        "norm_num_groups": model.groups,
        "mid_block_add_attention": model.attention,
        "sample_size": image_size,
        "scaling_factor": 1.0,
        "force_upcast": False,
    }


# -- UNet -----------------------------------------------------------------------------------------------------------


def _unet(model: UNet) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    attentive = [model.image_size >> i in model.attention for i in range(len(model.multipliers))]
    own = model.resblock_updown
    down, up = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if own else ("DownBlock2D", "UpBlock2D")
    config = {
        "_class_name": "UNet2DModel",
        "_diffusers_version": DIFFUSERS,
        "sample_size": model.image_size,
        "in_channels": model.channels,
        "out_channels": model.out_channels,
        "block_out_channels": [model.width * m for m in model.multipliers],
        "layers_per_block": model.res_blocks,
        "down_block_types": ["AttnDownBlock2D" if a else down for a in attentive],
        "up_block_types": ["AttnUpBlock2D" if a else up for a in reversed(attentive)],
        "downsample_type": "resnet" if model.resblock_updown else "conv",
        "upsample_type": "resnet" if model.resblock_updown else "conv",
        "attention_head_dim": model.head_width,
        "norm_num_groups": model.groups,
        "attn_norm_num_groups": model.groups,
        "norm_eps": model.eps,
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
        _put(weights, renamed(name, UNET), value)
    return "unet", config, weights


UNET = [
    (r"^t_embedder\.mlp\.0", "time_embedding.linear_1"),
    (r"^t_embedder\.mlp\.2", "time_embedding.linear_2"),
    (r"^y_embedder\.embedding_table", "class_embedding"),
    (r"^norm_out", "conv_norm_out"),
    (r"^middle1", "mid_block.resnets.0"),
    (r"^middle2", "mid_block.resnets.1"),
    (r"^middle_attention", "mid_block.attentions.0"),
    (r"^down\.(\d+)\.resample\.(weight|bias)", r"down_blocks.\1.downsamplers.0.conv.\2"),
    (r"^down\.(\d+)\.resample", r"down_blocks.\1.downsamplers.0"),
    (r"^up\.(\d+)\.resample", r"up_blocks.\1.upsamplers.0"),
    (r"^(down|up)\.(\d+)\.blocks", r"\1_blocks.\2.resnets"),
    (r"^(down|up)\.(\d+)\.attentions", r"\1_blocks.\2.attentions"),
    (r"(attentions\.\d+)\.norm", r"\1.group_norm"),
    (r"(attentions\.\d+)\.attn\.qkv", r"\1.qkv"),
    (r"(attentions\.\d+)\.attn\.proj", r"\1.to_out.0"),
    (r"\.condition\.", ".time_emb_proj."),
    (r"\.skip\.", ".conv_shortcut."),
]


def renamed(name: str, rules: list[tuple[str, str]]) -> str:
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
