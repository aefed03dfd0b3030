"""An autoencoder out of a folder of diffusers, frozen, in its own precision. The only file that imports diffusers."""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dtrain.config.autoencoders import described
from dtrain.errors import UserError
from dtrain.files import read_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Autoencoder:
    """Pixels in [−1, 1] to the moments of their latents, and latents to pixels; float32 outside, no gradient.

    Rows are computed in blocks of a fixed size, the last one filled up: a batch of another size rounds otherwise.
    module: of weights in this precision, which holds for all that it computes, whatever autocast it is called under.
    """

    def __init__(self, module: torch.nn.Module, precision: str, device: torch.device):
        self.module = module.to(device).eval().requires_grad_(False)
        self._dtype, self._device = DTYPES[precision], device

    def moments(self, pixels: Tensor, block: int) -> Tensor:
        """Mean and standard deviation float32 (n, 2, C, h, w) of pictures float32 (n, channels, S, S)."""
        return self._in_blocks(self._moments, pixels, block)

    def pixels(self, latents: Tensor, block: int) -> Tensor:
        """Pictures float32 (n, channels, S, S) of latents float32 (n, C, h, w)."""
        return self._in_blocks(lambda z: self.module.decode(z).sample.float(), latents, block)

    def _moments(self, pixels: Tensor) -> Tensor:
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        answer = self.module.encode(pixels)
        if not hasattr(answer, "latent_dist"):  # AutoencoderTiny says no more than the latent itself
            mean = answer.latents.float()
            return torch.stack([mean, torch.zeros_like(mean)], dim=1)
        posterior = DiagonalGaussianDistribution(answer.latent_dist.parameters.float())
        return torch.stack([posterior.mean, posterior.std], dim=1)

    @torch.no_grad()
    def _in_blocks(self, function: Callable[[Tensor], Tensor], rows: Tensor, size: int) -> Tensor:
        found = []
        with torch.autocast(self._device.type, enabled=False):
            for part in rows.to(self._device, self._dtype).split(size):
                filled = (
                    torch.cat([part, part[-1:].expand(size - len(part), *part.shape[1:])]) if size > len(part) else part
                )
                found.append(function(filled)[: len(part)])
        return torch.cat(found)


def load(folder: str, precision: str, device: torch.device) -> Autoencoder:
    """Raises UserError where the folder's files are not there, or not those of the class that its config.json names."""
    module = _read(folder, _class(described(folder).kind), DTYPES[precision])
    return Autoencoder(module, precision, device)


def on_meta(folder: str, precision: str) -> torch.nn.Module:
    """The module of the folder's config.json without weights, to see what it takes. Raises UserError."""
    kind = _class(described(folder).kind)
    with torch.device("meta"), _quiet():
        return kind.from_config(read_json(Path(folder) / "config.json")).to(DTYPES[precision])


def _class(kind: str):
    try:
        if kind == "AutoencoderTiny":
            from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny as found
        else:
            from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as found
    except ImportError as e:
        raise UserError(
            f"first_stage.kind kl reads autoencoders with diffusers, which is not here ({e}); pip install diffusers"
        ) from None
    return found


def _read(folder: str, kind: type, dtype: torch.dtype) -> torch.nn.Module:
    from safetensors import SafetensorError

    options = {
        "local_files_only": True,
        "use_safetensors": True,
        "torch_dtype": dtype,
        "low_cpu_mem_usage": False,
    }
    try:
        with _quiet():
            module, found = kind.from_pretrained(str(folder), output_loading_info=True, **options)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as e:
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise UserError(f"diffusers cannot load {folder}: {reason}; save it again with save_pretrained") from None
    for key, what in (("missing_keys", "lack"), ("unexpected_keys", "also have"), ("mismatched_keys", "misfit")):
        if found[key]:  # diffusers would go on with random weights
            name = found[key][0] if isinstance(found[key][0], str) else found[key][0][0]
            raise UserError(
                f"the weights of {folder} {what} {name}, so they are of another {kind.__name__} than config.json"
            )
    return module


@contextmanager
def _quiet():
    """Without diffusers' own lines: what is wrong is said once."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
