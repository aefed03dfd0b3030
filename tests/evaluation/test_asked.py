"""Whether samples show what they were asked for: CLIP's score as transformers has it, and a classifier's agreement."""

import numpy as np
import pytest
import torch
from PIL import Image

from dtrain.errors import UserError
from dtrain.evaluation.evaluate import asked_of, labels_of
from dtrain.evaluation.metrics.asked import Agreement, ClipScore
from dtrain.evaluation.opened import open_generator
from dtrain.evaluation.reference import Reference
from dtrain.run import RunDirectory
from dtrain.tracking.journal import read
from dtrain.training.check import check_start
from tests.conditions.encoder_folders import SIDE, TOKENS, written
from tests.digits import tiny
from tests.encoding.caches import captioned
from tests.training.runs import trained

transformers = pytest.importorskip("transformers")

WORDS = ("the digit three left of the digit seven", "a nine", " ", "two of four")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return written("clip model", tmp_path_factory.mktemp("clip"))


class Classifier(torch.nn.Module):
    """Which tenth of 0…255 the mean level lies in."""

    def __init__(self):
        super().__init__()
        self.size = 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean((1, 2, 3))
        return -(mean[:, None] - 25.5 * (torch.arange(10) + 0.5)).abs()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "tenths.pt"
    torch.jit.script(Classifier()).save(str(path))
    return path


@torch.no_grad()
def scored(clip, pictures: list[Image.Image], captions) -> torch.Tensor:
    """By CLIPModel's own forward, of transformers' own preprocessing."""
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    pixels = transformers.CLIPImageProcessor.from_pretrained(clip)(pictures, return_tensors="pt")["pixel_values"]
    scores = []
    for row, words in enumerate(captions):
        text = tokenizer(words, truncation=True, max_length=TOKENS, return_tensors="pt")
        text = {key: text[key] for key in ("input_ids", "attention_mask")}
        cosine = model(pixel_values=pixels[row : row + 1], **text).logits_per_image[0, 0] / model.logit_scale.exp()
        scores.append(100 * max(float(cosine), 0.0))
    return torch.tensor(scores, dtype=torch.float64)


@pytest.mark.parametrize(("side", "tolerance"), [(SIDE, 1e-3), (11, 0.3)])
def test_a_clip_score_is_what_transformers_clip_model_gives(clip, side, tolerance):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, side, side), dtype=np.uint8))
    found = ClipScore(str(clip), "text", torch.device("cpu"))(images, torch.zeros(4), {"text": list(WORDS)})
    pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in images]
    expected = scored(clip, pictures, WORDS)
    asked = torch.tensor([bool(one.strip()) for one in WORDS])
    assert found.isnan().tolist() == (~asked).tolist()
    assert (found - expected)[asked].abs().max() < tolerance
    assert expected[asked].max() > 1


def test_agreement_is_the_share_of_samples_of_the_class_that_was_asked_for(classifier):
    levels = torch.tensor([10, 30, 250, 77], dtype=torch.uint8)
    images = levels.view(4, 1, 1, 1).expand(4, 1, 8, 8).contiguous()
    found = Agreement(str(classifier), 10, torch.device("cpu"))(images, torch.tensor([0, 1, 8, 3]), {})
    assert found.tolist() == [1, 1, 0, 1]
    with pytest.raises(UserError, match=r"gives 10 scores, and model.num_classes is 11"):
        Agreement(str(classifier), 11, torch.device("cpu"))


def asked(folder, clip, classifier, *overrides):
    """A run that is told classes and words, evaluated at its end."""
    return tiny(
        *(folder, folder, f"data.shards={folder / 'train'}", f"data.holdout={folder / 'holdout' / 'manifest.json'}"),
        *(
            "train.steps=2",
            "eval.every=2",
            "eval.num_samples=30",
            "eval.batch_size=8",
            "eval.steps=2",
            "ema.0.decay=0.5",
        ),
        *("conditions.text.length=12", "conditions.text.width=32", "conditions.text.depth=1", "data.streams=1"),
        *("eval.metrics=[fd,clip_score,agreement]", f"eval.clip_model={clip}", f"eval.classifier={classifier}"),
        *overrides,
    )


def test_both_are_equal_on_one_rank_and_two_and_are_means_over_the_samples_that_were_drawn(tmp_path, clip, classifier):
    captioned(tmp_path / "train")
    captioned(tmp_path / "holdout", 12, first=42)
    configs = [asked(tmp_path, clip, classifier, f"run.name=on-{ranks}") for ranks in (1, 2)]
    found = []
    for ranks, config in zip((1, 2), configs, strict=True):
        trained(config, ranks)
        (line,) = [line for line in read(config.run.path / "journal.jsonl") if line["event"] == "eval"]
        found.append({name: line["metrics"][name] for name in ("clip_score", "agreement")})
        assert {"clip_model", "classifier"} <= line["context"].keys()
    assert found[0] == pytest.approx(found[1], abs=1e-3)
    config, device = configs[0], torch.device("cpu")
    opened = open_generator(RunDirectory(config.run.path), config, device)
    reference = Reference.open(config, device)
    blocks = [list(range(first, min(first + 8, 30))) for first in range(0, 30, 8)]
    pictures, captions, agrees = [], [], []
    for ids in blocks:
        labels, said = labels_of(ids, config.eval, 10, reference), asked_of(ids, reference)
        images = opened.generator.draw(ids, labels, config.eval, said=said)
        pictures += [Image.fromarray(one[0].numpy()).convert("RGB") for one in images]
        captions += said["text"]
        agrees += (Classifier()(images.float()).argmax(1) == labels).tolist()
    kept = [row for row, words in enumerate(captions) if words]
    assert 0 < len(kept) < 30
    expected = scored(clip, [pictures[row] for row in kept], [captions[row] for row in kept])
    assert found[0]["clip_score"] == pytest.approx(float(expected.mean()), abs=0.3)
    assert found[0]["agreement"] == pytest.approx(sum(agrees) / 30)


def test_what_is_missing_is_one_line_that_says_what_to_copy_where(tmp_path, clip, classifier):
    captioned(tmp_path / "train", 14)
    captioned(tmp_path / "holdout", 14)
    bare = tmp_path / "bare"
    bare.mkdir()
    said = []
    for name in ("config.json", "model.safetensors", "tokenizer_config.json", "preprocessor_config.json"):
        with pytest.raises(UserError) as e:
            check_start(asked(tmp_path, bare, classifier), 1)
        said.append((name, str(e.value)))
        (bare / name).write_bytes((clip / name).read_bytes())
    assert all(name in line and "\n" not in line for name, line in said)
    assert "copy a folder that transformers has saved" in said[0][1]
    assert all("copy it from where the folder comes from" in line for _, line in said[1:])
    assert "starts: 2 steps" in check_start(asked(tmp_path, bare, classifier), 1)
    with pytest.raises(UserError, match=r"no TorchScript file .*none.pt; eval.classifier names it, so copy it there"):
        check_start(asked(tmp_path, clip, tmp_path / "none.pt"), 1)
    for overrides, words in (
        (("eval.clip_model=null",), "eval.metrics clip_score needs a network of your own; name it in eval.clip_model"),
        (("model.num_classes=0",), "agreement is of what samples are asked for; it needs a model that has classes"),
    ):
        with pytest.raises(UserError, match=words):
            asked(tmp_path, clip, classifier, *overrides)
