"""What the config says of a model's parameters is true of the model: equal there, equal here."""

from itertools import combinations

import torch

from dtrain.config import architecture, validate
from dtrain.models.build import allocate

DIT = {"name": "dit", "depth": 2, "width": 32, "heads": 2, "patch": 2}
UNET = {"name": "unet", "width": 8, "multipliers": [1, 2], "attention": []}
MMDIT = {"name": "mmdit", "depth": 2, "width": 32, "heads": 2, "patch": 2}
MODELS = [
    DIT,
    DIT | {"depth": 3},
    DIT | {"width": 64},
    DIT | {"heads": 4},
    DIT | {"patch": 4},
    DIT | {"num_classes": 3},
    DIT | {"qk_norm": True},
    DIT | {"qk_norm": True, "heads": 4},
    DIT | {"frequency_shift": 1},
    DIT | {"norm": "rms"},
    DIT | {"mlp": "swiglu"},
    DIT | {"positions": "rotary"},
    DIT | {"patch_bottleneck": 4},
    DIT | {"patch_bottleneck": 6},
    DIT | {"num_classes": 3, "context_tokens": 2},
    DIT | {"num_classes": 3, "context_tokens": 2, "context_from": 1},
    DIT | {"num_classes": 3, "context_tokens": 4},
    DIT | {"fourier": [7]},
    DIT | {"fourier": [7, 8]},
    MMDIT,
    MMDIT | {"depth": 3},
    MMDIT | {"width": 64},
    MMDIT | {"heads": 4},
    MMDIT | {"patch": 4},
    MMDIT | {"num_classes": 3},
    UNET,
    UNET | {"width": 16},
    UNET | {"multipliers": [1, 1]},
    UNET | {"multipliers": [1, 2, 2]},
    UNET | {"res_blocks": 1},
    UNET | {"attention": [16]},
    UNET | {"attention": [8]},
    UNET | {"attention": [8, 16]},
    UNET | {"head_width": 4},
    UNET | {"scale_shift": True},
    UNET | {"dropout": 0.5},
    UNET | {"num_classes": 3},
    UNET | {"fourier": [7, 8]},
]
OTHERS = [("data", {"image_size": 32}), ("data", {"channels": 1}), ("data", {"flip": True})]
OTHERS += [("diffusion", {"variance": "learned_range", "loss": "hybrid"}), ("diffusion", {"variance": "fixed_large"})]
OTHERS += [("diffusion", {"process": "flow"}), ("optim", {"lr": 1.0})]


def configuration(model: dict, section: str = "data", values: dict | None = None):
    tree = {"data": {"shards": "nowhere", "image_size": 16, "batch_size": 8}, "model": model, "train": {"steps": 1}}
    if model["name"] == "mmdit":
        tree["conditions"] = {"text": {"length": 8, "width": 32, "depth": 1}}
    return validate(tree | {section: tree.get(section, {}) | (values or {})}, "a test")


def parameters(config) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in allocate(config).named_parameters()}


def test_two_configs_agree_in_their_architecture_just_where_their_models_have_the_same_parameters():
    configs = [configuration(model) for model in MODELS]
    configs += [
        configuration(model, *other) for model in (DIT, MMDIT, UNET, UNET | {"attention": [16]}) for other in OTHERS
    ]
    told, built = [architecture(c) for c in configs], [parameters(c) for c in configs]
    assert 20 < len({str(b) for b in built}) < len(built) - 9  # many differ, and many do not
    for (a, x), (b, y) in combinations(zip(told, built, strict=True), 2):
        assert (a == b) == (x == y), (a, b)
