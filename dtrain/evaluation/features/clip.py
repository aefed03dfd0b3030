"""CLIP's two towers from a local folder: pictures and words as vectors of one space (Radford et al. 2021)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dtrain.conditions.encoders import pretrained
from dtrain.conditions.requirements import fingerprint
from dtrain.data.fields.tokens import OfFolder
from dtrain.evaluation.features.networks import Network
from dtrain.evaluation.requirements import ClipFolder


class Clip(Network):
    """Pictures are resized as for all extractors and rounded to levels, as CLIP's own preprocessing has them."""

    def __init__(self, folder: str, device: torch.device | str = "cpu"):
        """Raises UserError where the folder or transformers is not there."""
        super().__init__(device)
        known = ClipFolder.of(folder)
        self.name, self.size, self.dimensions, self._length = "clip", known.size, known.width, known.length
        self.fingerprint = fingerprint(folder, "fp32", 1)
        self._model = pretrained(folder, "CLIPModel", torch.float32).to(self.device).eval().requires_grad_(False)
        self._tokens, self._padding = OfFolder(str(Path(folder))), known.padding
        shape = (3, 1, 1)
        self._mean, self._deviation = (torch.tensor(v, device=self.device).view(shape) for v in known.normalisation)

    def forward(self, pixels: Tensor) -> Tensor:
        """Vectors of length 1."""
        levels = (pixels.clamp(0, 255).round() / 255 - self._mean) / self._deviation
        seen = self._model.vision_model(pixel_values=levels).pooler_output
        return F.normalize(self._model.visual_projection(seen), dim=-1)  # (n, D)

    @torch.inference_mode()
    def words(self, captions: list[str]) -> Tensor:
        """float32 (n, D), vectors of length 1. A caption of more tokens than CLIP takes is cut, and keeps its end."""
        tokens = torch.full((len(captions), self._length), self._padding)
        mask = torch.zeros_like(tokens)
        for row, caption in enumerate(captions):
            own = self._tokens(caption)
            if len(own) > self._length:
                own = [*own[: self._length - self._tokens.closing], *own[len(own) - self._tokens.closing :]]
            tokens[row, : len(own)] = torch.tensor(own)
            mask[row, : len(own)] = 1
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        said = self._model.text_model(input_ids=tokens, attention_mask=mask).pooler_output
        return F.normalize(self._model.text_projection(said), dim=-1)  # (n, D)
