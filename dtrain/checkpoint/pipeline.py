"""Draws images with the model of this folder. Written by dtrain; needs torch and diffusers alone.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
    images = pipe(["cat", 3], guidance_scale=2.0, generator=torch.manual_seed(0)).images

README.md beside it draws a picture.
"""

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

logger = logging.get_logger(__name__)


class PixelPipeline(DiffusionPipeline):
    """A DiT or a UNet that denoises pixels, told a class or none."""

    _optional_components = ["transformer", "unet"]  # noqa: RUF012  one of them is there; diffusers wants a list
    model_cpu_offload_seq = "transformer->unet"

    def __init__(
        self, scheduler, transformer=None, unet=None, id2label=None, num_inference_steps=50, guidance_scale=1.0, eta=0.0
    ):
        super().__init__()
        self.register_modules(scheduler=scheduler, transformer=transformer, unet=unet)
        defaults = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "eta": eta}
        self.register_to_config(id2label=id2label, **defaults)
        self.labels = {name: int(number) for number, name in (id2label or {}).items()}  # name → number

    @torch.no_grad()
    def __call__(
        self,
        class_labels=None,
        batch_size=1,
        guidance_scale=None,
        num_inference_steps=None,
        eta=None,
        generator=None,
        latents=None,
        output_type="pil",
        return_dict=True,
    ):
        """Images of `class_labels`, a list of names or numbers; of a model without classes, `batch_size` images.

        guidance_scale: s in uncond + s·(cond − uncond), 1 is none. eta: the noise of DDIM, 0 to 1. latents: the noise
        to begin with, (n, C, H, W). output_type: pil, np (n, H, W, C) or pt (n, C, H, W), both in [0, 1]. What is not
        given is as the model was evaluated while it trained.
        """
        default = self.config
        steps = default.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = default.guidance_scale if guidance_scale is None else guidance_scale
        network = self.transformer if self.transformer is not None else self.unet
        device, classes = self._execution_device, len(self.labels)
        if (class_labels is None) == bool(classes):
            raise ValueError(f"this model has {classes} classes; give class_labels where there are any, and only there")
        if classes:
            labels = torch.tensor([self._number(label) for label in class_labels], device=device)
        else:  # a DiT of diffusers always has a class, which adds nothing here
            labels = None if network is self.unet else torch.zeros(batch_size, dtype=torch.long, device=device)
        guided = bool(classes) and scale != 1
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, classes)])  # the null label follows the classes

        channels, side = network.config.in_channels, network.config.sample_size
        shape = (len(class_labels) if classes else batch_size, channels, side, side)
        x = latents if latents is not None else randn_tensor(shape, generator, device=device, dtype=network.dtype)
        for t in self.progress_bar(self._timesteps(steps, device)):
            rows = torch.cat([x, x]) if guided else x
            output = network(rows, t.expand(len(rows)), class_labels=labels).sample[:, :channels]  # without a variance
            if guided:
                towards, away = output.chunk(2)
                output = away + scale * (towards - away)
            x = self.scheduler.step(output, t, x, **self._step(default.eta if eta is None else eta, generator))[0]

        images = (x / 2 + 0.5).clamp(0, 1).float()
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _number(self, label):
        number = self.labels.get(label, label) if isinstance(label, str) else label
        if isinstance(number, str) or not 0 <= number < len(self.labels):
            raise ValueError(f"there is no class {label!r}; there are {', '.join(self.labels)}")
        return int(number)

    def _timesteps(self, steps, device):
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):  # equal steps from 1 down to 0
            self.scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], device=device)
            return self.scheduler.timesteps
        if self.scheduler.config.num_train_timesteps % steps:
            total = self.scheduler.config.num_train_timesteps
            logger.warning(f"{steps} steps do not divide {total}, where diffusers' schedulers are not exact")
        self.scheduler.set_timesteps(steps, device=device)
        return self.scheduler.timesteps

    def _step(self, eta, generator):
        """What a step of this scheduler takes beside its images."""
        if not isinstance(self.scheduler, DDIMScheduler):
            return {}
        return {"eta": eta, "generator": generator, "use_clipped_model_output": self.scheduler.config.clip_sample}
