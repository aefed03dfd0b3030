"""Low-rank adapters as diffusers keeps them: of each layer lora_A.weight and lora_B.weight, the scale within B."""

from torch import Tensor

from dtrain.checkpoint.diffusers import DIT, UNET, renamed
from dtrain.errors import UserError
from dtrain.models.adapted import Adapted


def adapters_of_diffusers(network: Adapted, model: str) -> dict[str, Tensor]:
    """Name → tensor of pytorch_lora_weights.safetensors, for a base that was exported to diffusers.

    model: dit or unet. Queries, keys and values, which dtrain keeps as one layer, are three with one A. Raises
    UserError where the model attends to words, which diffusers' own does not.
    """
    folder, rules = ("unet", UNET) if model == "unet" else ("transformer", DIT)
    found: dict[str, Tensor] = {}
    for name, adapter in network.adapters():
        if ".cross." in name:
            raise UserError("diffusers' model has no attention to words; take --format safetensors, or --merge")
        place = f"{folder}.{renamed(name, rules)}"
        whole = network.scale * adapter.B.weight.detach()
        parts = {place: whole}
        if place.endswith("qkv"):
            parts = {
                place[: -len("qkv")] + to: part
                for to, part in zip(("to_q", "to_k", "to_v"), whole.chunk(3), strict=True)
            }
        for layer, b in parts.items():
            found[f"{layer}.lora_A.weight"] = adapter.A.weight.detach().clone()
            found[f"{layer}.lora_B.weight"] = b.contiguous()
    return found
