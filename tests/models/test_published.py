import pickle

import pytest
import torch
from safetensors.torch import save_file

from dtrain.errors import UserError
from dtrain.models.layers import positions
from dtrain.models.published import load_published
from tests.models.small import small


def published(image_size=8, learn_sigma=True):
    """A state dict with the published names and shapes, of random numbers but for the positions."""
    D, O = 32, 6 if learn_sigma else 3  # noqa: E741
    layers = {"x_embedder.proj": (D, 3, 2, 2), "t_embedder.mlp.0": (D, 256), "t_embedder.mlp.2": (D, D)}
    layers |= {"final_layer.linear": (4 * O, D), "final_layer.adaLN_modulation.1": (2 * D, D)}
    for i in range(2):
        layers |= {f"blocks.{i}.attn.qkv": (3 * D, D), f"blocks.{i}.attn.proj": (D, D)}
        layers |= {f"blocks.{i}.mlp.fc1": (4 * D, D), f"blocks.{i}.mlp.fc2": (D, 4 * D)}
        layers |= {f"blocks.{i}.adaLN_modulation.1": (6 * D, D)}
    generator = torch.Generator().manual_seed(0)
    state = {f"{k}.weight": torch.randn(v, generator=generator) for k, v in layers.items()}
    state |= {f"{k}.bias": torch.randn(v[:1], generator=generator) for k, v in layers.items()}
    state["y_embedder.embedding_table.weight"] = torch.randn(6, D, generator=generator)
    state["pos_embed"] = positions(image_size // 2, D)
    return state


def save(state, path):
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    return path


@pytest.mark.parametrize("name", ["DiT.pt", "DiT.safetensors"])
def test_published_weights_load_by_their_own_names(tmp_path, name):
    state = published()
    model = load_published(small(learn_sigma=True), save(state, tmp_path / name))
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_at_another_size_the_positions_are_recomputed(tmp_path):
    path = save(published(image_size=8), tmp_path / "DiT.pt")
    model = load_published(small(image_size=12, learn_sigma=True), path)
    assert torch.equal(model.pos_embed, positions(6, 32))
    assert torch.equal(model.blocks[1].mlp.fc1.weight, published()["blocks.1.mlp.fc1.weight"])
    assert not model.pos_embed.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 7}, "`y_embedder.embedding_table.weight` has shape"),
        ({"num_classes": 0}, "which this model lacks"),
        ({"learn_sigma": False}, "`final_layer.linear.bias` has shape|`final_layer.linear.weight` has shape"),
        ({"depth": 3}, "has no `blocks.2"),
        ({"qk_norm": True}, "has no `blocks.0.attn.k_norm.weight`"),
    ],
)
def test_weights_of_another_architecture_are_refused_and_nothing_is_changed(tmp_path, change, message):
    path = save(published(), tmp_path / "DiT.pt")
    model = small(**{"learn_sigma": True} | change)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load_published(model, path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_file_that_would_run_code_is_refused(tmp_path):
    path, evidence = tmp_path / "DiT.pt", tmp_path / "code-was-run"
    torch.save({"x_embedder.proj.weight": Trap(str(evidence))}, path)
    with pytest.raises(UserError, match="could run code"):
        load_published(small(), path)
    path.write_bytes(pickle.dumps(Trap(str(evidence)), protocol=2))
    with pytest.raises(UserError, match="could run code"):
        load_published(small(), path)
    assert not evidence.exists()


@pytest.mark.parametrize("name", ["DiT.pt", "DiT.safetensors"])
def test_a_damaged_missing_or_nested_file_is_refused_in_one_line(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(UserError, match="cannot read"):
        load_published(small(), path)
    save(published(), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged") as error:
        load_published(small(), path)
    assert "\n" not in str(error.value)
    torch.save({"optimizer": published()}, tmp_path / "whole.pt")
    with pytest.raises(UserError, match="not a plain state dict"):
        load_published(small(), tmp_path / "whole.pt")
