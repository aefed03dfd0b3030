"""README.md of an exported folder: what the weights are, and about ten lines that draw a picture with them."""

from typing import Any

from dtrain.checkpoint.diffusers import Exported
from dtrain.config import Config, Data, DiT, MMDiT, UNet
from dtrain.config.guidance import CLASS, scale_of

SHOWN = 8  # images of the picture


def of_diffusers(exported: Exported, config: Config, source: dict[str, Any], class_names: list[str] | None) -> str:
    """Lines that need torch and diffusers, and not dtrain."""
    how, classes, side = config.eval, config.model.num_classes, _shown_side(config.data.image_size)
    own = ', custom_pipeline=".", trust_remote_code=True)  # runs ./pipeline.py' if exported.own_pipeline else ")"
    what = ["labels"] if classes else [f"batch_size={SHOWN}"]
    what += [f"guidance_scale={scale_of(how.guidance, CLASS)}"] if classes else []
    what += [f"num_inference_steps={exported.steps}"]
    if not exported.own_pipeline:
        what += [f"eta={how.eta}"] if how.eta not in (0, "sigma_hat") else []
        what += ["use_clipped_model_output=True"] if how.clip else []
    code = ["import torch", "from diffusers import DiffusionPipeline"]
    code += ["from diffusers.utils import make_image_grid", ""]
    code += [f'pipe = DiffusionPipeline.from_pretrained("."{own}']
    if classes:
        code += [f"labels = list(pipe.labels)[:{SHOWN}]  # classes by name or number"]
    code += ["generator = torch.Generator().manual_seed(0)"]
    code += [f"images = pipe({', '.join(what)}, generator=generator).images"]
    code += [f'make_image_grid(images, rows=1, cols=len(images), resize={side}).save("picture.png")']
    card = "---\nlibrary_name: diffusers\npipeline_tag: unconditional-image-generation\n---\n"
    head = _head(config.data, config.model, source, class_names)
    parts = [card + head, _block("In this folder, with diffusers:", code)]
    if exported.left_out:
        parts.append(f"The run's own samples were drawn otherwise in {', '.join(exported.left_out)}.")
    return "\n".join(parts) + "\n"


def of_safetensors(config: Config, source: dict[str, Any], class_names: list[str] | None) -> str:
    """Lines that need dtrain."""
    how, classes, side = config.eval, config.model.num_classes, _shown_side(config.data.image_size)
    what = f"labels=range({min(SHOWN, classes)}), guidance={how.guidance!r}" if classes else str(SHOWN)
    code = ["import numpy as np", "from PIL import Image", "", "import dtrain", ""]
    code += ['model = dtrain.load(".")  # model.model is the plain torch module']
    code += [f"images = model.sample({what}, steps={how.steps}, seed=0)  # uint8 (n, H, W, C)"]
    code += ["picture = Image.fromarray(np.hstack(images).squeeze())"]
    code += [f'picture.resize(({side} * len(images), {side})).save("picture.png")']
    head = _head(config.data, config.model, source, class_names)
    return "\n".join([head, _block("In this folder, with dtrain:", code)]) + "\n"


def of_adapters(config: Config, source: dict[str, Any]) -> str:
    """What the adapters are of; a base of diffusers takes them."""
    return (
        f"Low-rank adapters in diffusers' layout, of step {source['step']} of the run {source['run']}: to each layer's "
        f"weight lora_B lora_A is added, the scale within lora_B.\n\nThe base is {config.base_source}, whose weights "
        f"have the sha256 {source['base']}; `dtrain checkpoints export` writes it for diffusers.\n"
    )


def of_published(config: Config, source: dict[str, Any], class_names: list[str] | None) -> str:
    """Lines that need torch and safetensors, and the class that the reader has of the published program."""
    answer = {"velocity": "the velocity towards data", "x0": "x_0"}
    turned = f"Data are at t = 1, and the answer is {answer[at]}.\n\n" if (at := config.diffusion.data_at_one) else ""
    code = ["from safetensors.torch import load_file", "", 'state = load_file("model.safetensors")']
    code += ["print(*((name, tuple(value.shape)) for name, value in state.items()), sep=chr(10))"]
    head = _head(config.data, config.model, source, class_names)
    return "\n".join([head, turned + _block("Names and shapes are those of the published programs:", code)]) + "\n"


def of_autoencoder(config: Config, source: dict[str, Any]) -> str:
    """Lines that need torch and diffusers, and not dtrain."""
    side, channels = config.data.image_size, config.data.channels
    code = ["import numpy as np", "import torch", "from diffusers import AutoencoderKL", "from PIL import Image", ""]
    code += ['vae = AutoencoderKL.from_pretrained(".")']
    code += [f"latent = torch.randn(1, {config.model.latent_channels}, {side // config.model.downscale}, "
             f"{side // config.model.downscale}, generator=torch.Generator().manual_seed(0))"]  # fmt: skip
    code += ["with torch.no_grad():", "    picture = vae.decode(latent).sample[0]  # in [-1, 1]"]
    code += ["levels = ((picture + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()"]
    code += ['Image.fromarray(np.squeeze(levels)).save("picture.png")']
    weights = _named(source["weights"])
    head = [f"# {source['run']}", "", f"An autoencoder of {side}×{side} pictures with {channels} channels."]
    head += [f"{weights} of step {source['step']:,} ({source['images']:,} images seen), trained with dtrain.", ""]
    return "\n".join([*head, _block("In this folder, with diffusers:", code)]) + "\n"


def _shown_side(image_size: int) -> int:
    return max(64, image_size)


def _block(introduction: str, code: list[str]) -> str:
    return "\n".join([introduction, "", "```python", *code, "```", ""])


def _head(data: Data, model: DiT | MMDiT | UNet, source: dict[str, Any], class_names: list[str] | None) -> str:
    side, classes = data.image_size, model.num_classes
    kind = {"dit": "DiT", "mmdit": "MMDiT", "unet": "UNet"}[model.name]
    weights = _named(source["weights"])
    colours = "grey" if data.channels == 1 else "RGB"
    lines = [f"# {source['run']}", ""]
    lines += [f"A {kind} for {side}×{side} {colours} pixels, {f'{classes} classes' if classes else 'without classes'}."]
    lines += [f"{weights} of step {source['step']:,} ({source['images']:,} images seen), trained with dtrain."]
    if class_names:
        named = [f"{i} {name}" for i, name in enumerate(class_names[:20])] + ["…"] * (len(class_names) > 20)
        lines += ["", f"Classes: {', '.join(named)}"]
    return "\n".join([*lines, ""])


def _named(weights: str) -> str:
    kind, _, which = weights.partition("_")
    return {"fp32": "Raw weights", "ema": f"EMA {which}"}.get(kind, f"EMA of sigma_rel {which}")
