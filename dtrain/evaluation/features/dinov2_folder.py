"""A folder with a DINOv2 of transformers, as its config.json describes it. Imports no torch, reads no weights."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from dtrain.config.encoders import INDEX, WEIGHTS
from dtrain.config.folders import config_json
from dtrain.errors import UserError, from_where

SIZES = {384: "vits", 768: "vitb", 1024: "vitl", 1536: "vitg"}  # by the width of a token
HINT = "copy a folder of facebook/dinov2-large that transformers has saved"


class Dinov2Folder(NamedTuple):
    """name: as in `fd_dinov2_vitl14`. width: of a token, which is the features' number of dimensions."""

    place: Path
    name: str
    width: int

    @classmethod
    def of(cls, folder: str | None) -> "Dinov2Folder":
        """What `eval.weights` names. Raises UserError where it names no DINOv2."""
        if folder is None:
            raise UserError(f"eval.features dinov2 needs its folder in eval.weights; {HINT}")
        tree = config_json(folder, "a DINOv2", HINT)
        kind = tree.get("model_type") if isinstance(tree, dict) else None
        if kind != "dinov2":
            raise UserError(f"{folder} describes {kind or 'no model of transformers'}, and no dinov2; {HINT}")
        width, patch = tree.get("hidden_size", 768), tree.get("patch_size", 14)
        if not (isinstance(width, int) and isinstance(patch, int) and width > 0 and 0 < patch <= 224):
            raise UserError(f"{folder} does not describe its DINOv2; copy it again")
        if not any((Path(folder) / name).is_file() for name in (WEIGHTS, INDEX)):
            raise UserError(f"{folder} has no {WEIGHTS}{from_where(folder)}; copy it there")
        return cls(Path(folder), f"dinov2_{SIZES.get(width, f'width{width}_')}{patch}", width)

    def digest(self) -> str:
        """sha256 of its description and weights, by name. Raises UserError where they cannot be read."""
        found = hashlib.sha256()
        try:
            for path in sorted(self.place.iterdir()):
                if path.name == "config.json" or path.suffix == ".safetensors":
                    with open(path, "rb") as file:
                        found.update(f"\0{path.name}\0".encode() + hashlib.file_digest(file, "sha256").digest())
        except OSError as e:
            raise UserError(f"{self.place} cannot be read: {e.strerror}") from None
        return found.hexdigest()
