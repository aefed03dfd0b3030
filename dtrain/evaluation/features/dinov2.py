"""DINOv2 from a local folder: the token of the class after the last norm (Oquab et al. 2023).

Its Fréchet distance agrees with people's judgement better than Inception's (Stein et al. 2023, FD-DINOv2).
"""

import torch
from torch import Tensor

from dtrain.conditions.encoders import pretrained
from dtrain.evaluation.features.dinov2_folder import Dinov2Folder
from dtrain.evaluation.features.networks import Network, fingerprint

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue in [0, 1]


class Dinov2(Network):
    """Pictures are resized to 224 pixels as for all extractors and rounded to levels, as a picture file has them."""

    size = 224

    def __init__(self, folder: str | None, device: torch.device | str = "cpu"):
        """Raises UserError where the folder or transformers is not there."""
        super().__init__(device)
        known = Dinov2Folder.of(folder)
        self.name, self.dimensions = known.name, known.width
        self.fingerprint = fingerprint("dinov2 class token at 224, rounded", known.digest())
        self._model = pretrained(str(known.place), "Dinov2Model", torch.float32).to(self.device).eval()
        self._mean, self._deviation = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (MEAN, DEVIATION))

    def forward(self, pixels: Tensor) -> Tensor:
        levels = (pixels.clamp(0, 255).round() / 255 - self._mean) / self._deviation
        return self._model(pixel_values=levels).last_hidden_state[:, 0]  # (n, D)
