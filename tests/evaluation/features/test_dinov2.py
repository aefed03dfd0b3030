"""DINOv2's features, against transformers' own preprocessing and model; a network with random weights stands for it."""

import pytest
import torch
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from dtrain.errors import UserError
from dtrain.evaluation.features.build import extractor
from dtrain.evaluation.features.dinov2_folder import Dinov2Folder
from dtrain.evaluation.requirements import named_features
from tests.command_line import command, failing
from tests.digits import tiny
from tests.ranks import run_ranks
from tests.training.runs import copied


def saved(place, width, layers):
    torch.manual_seed(0)
    how = {"hidden_size": width, "num_attention_heads": 2, "num_hidden_layers": layers, "image_size": 518}
    Dinov2Model(Dinov2Config(**how, patch_size=14)).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("dinov2"), 384, 2)


def test_features_are_the_class_token_of_transformers_own_pipeline(folder):
    images = torch.randint(0, 256, (3, 3, 32, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = extractor("dinov2", 32, 3, str(folder))(images)
    processor = BitImageProcessor(do_center_crop=False, size={"height": 224, "width": 224}, resample=3,
                                  image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])  # fmt: skip
    seen = processor(list(images), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = Dinov2Model.from_pretrained(folder)(pixel_values=seen).pooler_output
    assert found.shape == (3, 384)
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.9999
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()  # of pixels that round to the next level


def test_its_name_has_the_networks_size_and_its_fingerprint_the_weights(folder, tmp_path):
    one = extractor("dinov2", 32, 3, str(folder))
    assert (one.name, one.dimensions, one.classes) == ("dinov2_vits14", 384, 0)
    model = Dinov2Model.from_pretrained(folder)
    with torch.no_grad():
        model.layernorm.bias[0] += 1
    model.save_pretrained(tmp_path / "other")
    other = extractor("dinov2", 32, 3, str(tmp_path / "other"))
    assert (other.name, other.fingerprint == one.fingerprint) == ("dinov2_vits14", False)
    assert Dinov2Folder(folder, "dinov2_vits14", 384).digest() == Dinov2Folder.of(str(folder)).digest()


def test_what_is_no_dinov2_is_refused_before_anything_is_computed(folder, digits, tmp_path):
    asked = lambda *weights: named_features(tiny(digits, tmp_path, "eval.features=dinov2", *weights).eval, None)  # noqa: E731
    with pytest.raises(UserError, match=r"needs its folder in eval\.weights"):
        asked()
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match="describes clip, and no dinov2"):
        asked(f"eval.weights={tmp_path}/clip")
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "dinov2", "hidden_size": 1024}')
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        asked(f"eval.weights={tmp_path}/clip")


def test_the_command_gives_the_distance_under_the_networks_own_name(finished_run, digits, tmp_path):
    folder = saved(tmp_path / "network", 16, 1)
    run = copied(finished_run, digits, tmp_path).run.path
    arguments = ("evaluate", run, "-n", 16, "--steps", 2, "--features", "dinov2", "--weights")
    code, said = run_ranks(command, 1, *arguments, folder)[0]
    assert code == 0, said
    assert "fd_dinov2_width16_14" in said
    assert "there is no" in failing(*arguments, tmp_path / "nowhere")
