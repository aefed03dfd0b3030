"""Text encoders of transformers, from local folders: frozen, in a precision of their own, beside the network.

They are no part of the network: no optimizer, no checkpoint and no ZeRO stage knows their weights.
"""

from collections import OrderedDict
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from dtrain.conditions.requirements import fingerprint_of
from dtrain.config import Text
from dtrain.config.encoders import described
from dtrain.data.fields.tokens import missing
from dtrain.errors import UserError

KEPT_BYTES = 256 << 20  # of what captions became, so that one that comes again is not computed again
_CLASSES = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
}
_OTHERS = "AutoModel"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Frozen:
    """The last layer of the encoder in a folder, (n, L, E) in float32; read where it is first asked."""

    dtype = torch.float32

    def __init__(self, section: Text):
        self._section = section
        self._folder, self._precision, self._block = section.encoder, section.precision, section.block
        self.shape = (section.length, section.width)
        self._kept: OrderedDict[tuple[torch.device, bytes], Tensor] = OrderedDict()  # the newest last
        self._most = max(1, KEPT_BYTES // (4 * section.length * section.width))

    @cached_property
    def fingerprint(self) -> str:
        """As `requirements.fingerprint_of`."""
        return fingerprint_of(self._section)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Raises UserError where the folder or transformers is not there."""
        keys = [(tokens.device, row.tobytes()) for row in torch.where(mask, tokens, -1).cpu().numpy()]
        new = list({key: row for row, key in enumerate(keys) if key not in self._kept}.values())
        found = {}
        for start in range(0, len(new), self._block):
            rows = new[start : start + self._block]
            whole = rows + rows[-1:] * (self._block - len(rows))  # blocks of one size round alike
            made = self._encoded(tokens[whole], mask[whole])
            found |= {keys[row]: one for row, one in zip(rows, made, strict=False)}
        told = torch.stack([found[key] if key in found else self._kept[key] for key in keys])
        self._keep(found, keys)
        return told

    def _keep(self, found: dict, keys: list) -> None:
        self._kept |= found
        for key in keys:
            self._kept.move_to_end(key)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def _encoded(self, tokens: Tensor, mask: Tensor) -> Tensor:
        model = _read(self._folder, self._precision, str(tokens.device))
        with torch.autocast(tokens.device.type, enabled=False):
            return model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state.float()


@lru_cache(maxsize=4)
def _read(folder: str, precision: str, device: str) -> Any:
    """The encoder, in eval mode. One a process and device, whoever asks."""
    kind = _CLASSES.get(described(folder).kind, _OTHERS)
    return pretrained(folder, kind, _DTYPES[precision]).to(device).eval().requires_grad_(False)


def on_meta(section: Text) -> Any:
    """The frozen encoder of a condition without its weights, of which its config.json alone tells. Raises UserError."""
    folder = section.encoder
    kind = described(folder).kind
    try:
        import transformers

        with torch.device("meta"):
            tree = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            tree, kind = getattr(tree, "text_config", tree), _CLASSES.get(kind)
            model = transformers.AutoModel.from_config(tree) if kind is None else getattr(transformers, kind)(tree)
            return model.to(_DTYPES[section.precision])
    except ImportError as e:
        raise UserError(missing(folder, e)) from None
    except (OSError, ValueError, KeyError) as e:
        raise UserError(
            f"{folder}/config.json describes no encoder that can be laid out ({e}); copy it again"
        ) from None


def pretrained(folder: str, kind: str, dtype: torch.dtype) -> Any:
    """The model that transformers has saved in a local folder, as its class of this name. Raises UserError."""
    try:
        import transformers
    except ImportError as e:
        raise UserError(missing(folder, e)) from None
    transformers.utils.logging.disable_progress_bar()
    how = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    try:
        return getattr(transformers, kind).from_pretrained(folder, dtype=dtype, **how)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"the {kind} in {folder} cannot be read ({reason}); copy the folder again") from None
