"""Latents of a variational autoencoder: x_0 = (μ + σ · noise − mean) / deviation, the noise keyed by k."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from dtrain.batch import Batch
from dtrain.config.autoencoders import Normalisation
from dtrain.data.fields.picture import quantize
from dtrain.errors import NotFinite
from dtrain.first_stage.autoencoder import Autoencoder


class KL:
    """encoder: what `requirements.encoder` says of the autoencoder. cached: batches hold moments and no pictures.

    block, decode_block: rows that are encoded and decoded together.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        encoder: dict[str, Any],
        normalisation: Normalisation,
        cached: bool,
        block: int,
        decode_block: int,
    ):
        self._autoencoder, self._cached = autoencoder, cached
        self._block, self._decode_block = block, decode_block
        self.normalisation = normalisation
        self.fingerprint = hashlib.sha256(json.dumps([encoder, *normalisation], sort_keys=True).encode()).hexdigest()
        self._mean, self._deviation = (torch.tensor(column)[:, None, None] for column in normalisation)  # (C, 1, 1)

    def of_batch(self, batch: Batch) -> Tensor:
        moments = batch["moments"] if self._cached else self.moments(batch["image"])
        return self.latent(moments, batch["posterior"])

    def moments(self, pixels: Tensor) -> Tensor:
        """What a latent cache holds: mean and standard deviation float32 (n, 2, C, h, w) of pictures in [−1, 1]."""
        return self._autoencoder.moments(pixels, self._block)

    def latent(self, moments: Tensor, noise: Tensor) -> Tensor:
        """x_0 float32 (n, C, h, w), a sample of the posterior: noise (n, C, h, w) is standard normal."""
        mean, std = moments.unbind(1)
        return self._normalised(mean + std * noise)

    def encode(self, pixels: Tensor) -> Tensor:
        """By the posterior's mean: held-out pictures are looked at without noise."""
        return self._normalised(self.moments(pixels)[:, 0])

    def shown(self, moments: Tensor) -> Tensor:
        """Pictures uint8 (n, channels, S, S) of what a cache holds of them, (n, 2, C, h, w)."""
        return self.decode(self._normalised(moments[:, 0]))

    def decode(self, x_0: Tensor) -> Tensor:
        latents = x_0.float() * self._deviation.to(x_0.device) + self._mean.to(x_0.device)
        pixels = self._autoencoder.pixels(latents, self._decode_block)
        if not pixels.isfinite().all():
            raise NotFinite("the first stage decodes latents to what is not finite; take first_stage.precision fp32")
        return quantize(pixels)

    def _normalised(self, latents: Tensor) -> Tensor:
        return (latents - self._mean.to(latents.device)) / self._deviation.to(latents.device)
