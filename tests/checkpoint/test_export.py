"""A folder that `dtrain checkpoints export` writes: loaded by diffusers, and drawn from by its own README."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMPipeline, DiffusionPipeline
from diffusers import logging as diffusers_logging
from diffusers.utils import dynamic_modules_utils
from PIL import Image
from safetensors.torch import load_file

from dtrain.checkpoint.diffusers import autoencoder_config, to_diffusers
from dtrain.checkpoint.export import WRITERS, export, load_weights, open_checkpoint
from dtrain.conditions.classes import Classes
from dtrain.config import load
from dtrain.diffusion.guidance import guided
from dtrain.diffusion.process import build as build_process
from dtrain.diffusion.samplers import sample
from dtrain.errors import UserError
from dtrain.models.build import allocate
from dtrain.models.published import load_published
from dtrain.run import RunDirectory
from tests.checkpoint.diffusers_models import CLASSES, randomised
from tests.checkpoint.exported import run_readme, run_readme_in_a_fork, trained
from tests.digits import CONFIG, tiny
from tests.training.runs import copied

UNET = "model={name: unet, width: 16, multipliers: [1, 2], res_blocks: 1, attention: [4], num_classes: 0}"
SOURCE = {"run": "tiny", "step": 40, "images": 960, "weights": "ema_0"}


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    return trained(digits, tmp_path_factory.mktemp("runs"), "diffusion.prediction=v")


@pytest.fixture(autouse=True)
def modules_elsewhere(tmp_path, monkeypatch):
    """diffusers copies a folder's code to its cache before it runs it."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def loaded(folder, **more):
    pipe = DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def own(folder):
    return loaded(folder, custom_pipeline=str(folder), trust_remote_code=True)


def ours(model, config, x_T, labels, how):
    """Our x_0 from the same noise, as the pipeline shows it: in [0, 1]."""
    null = Classes(config.model.num_classes, dropout=0.1).null
    network = guided(model, how.guidance, null, channels=config.data.channels)
    process = build_process(config.diffusion)
    denoiser = partial(lambda labels, x, t: network(x, t, y=labels), labels)
    return (sample(denoiser, process, x_T, how.sampler, how.steps, how.spacing, clip=how.clip) / 2 + 0.5).clamp(0, 1)


def noise(n):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(5))


def test_a_trained_run_in_diffusers_draws_our_images_from_the_same_noise(run, tmp_path, no_network):
    said = export(RunDirectory(run.run.path), tmp_path / "out", None, 0, "fp32", "diffusers")
    assert said.startswith(f"{tmp_path}/out: ema_0 of step 40, ")
    pipe = own(tmp_path / "out")
    model = load_weights(open_checkpoint(RunDirectory(run.run.path)), allocate(run), "ema_0").eval()
    for guidance in (1.0, 3.0):
        how = run.eval.model_copy(update={"guidance": guidance})
        wanted = ours(model, run, noise(4), torch.tensor([0, 3, 9, 3]), how)
        drawn = pipe([0, "3", 9, 3], guidance_scale=guidance, latents=noise(4), output_type="pt").images
        torch.testing.assert_close(drawn, wanted, rtol=0, atol=1e-4)
        assert float(((wanted > 0) & (wanted < 1)).float().mean()) > 0.1  # not all of it is cut off
    seeded = pipe([3], generator=torch.Generator().manual_seed(5), output_type="pt").images
    torch.testing.assert_close(seeded, pipe(["3"], latents=noise(1), output_type="pt").images, rtol=0, atol=0)
    (picture,) = pipe([3]).images
    assert (picture.size, picture.mode) == ((8, 8), "L")


CASES = {
    "dit, v, zero terminal SNR, clipped": ["diffusion={prediction: v, zero_terminal_snr: true}", "eval.clip=true"],
    "dit, x0, cosine, leading": ["diffusion={prediction: x0, schedule: cosine}", "eval.spacing=leading"],
    "dit without classes": ["model.num_classes=0", "diffusion.prediction=v"],
    "dit, flow": ["diffusion={process: flow}", "eval.guidance=2"],
    "unet with classes, learned variance": [
        UNET, "model.num_classes=10", "diffusion={variance: learned_range, loss: hybrid, prediction: v}"
    ],
    "unet, flow": [UNET, "diffusion={process: flow}"],
    "unet, v": [UNET, "diffusion.prediction=v"],
    "unet, eps, clipped": [UNET, "eval.clip=true"],
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_any_process_in_diffusers_draws_our_images_from_the_same_noise(digits, tmp_path, name, no_network):
    config = tiny(digits, tmp_path, "eval.steps=10", *CASES[name])
    model, out, how = randomised(allocate(config)), tmp_path / "out", config.eval
    assert WRITERS["diffusers"](model, config, SOURCE, out) == []
    plain = name in ("unet, v", "unet, eps, clipped")
    pipe = loaded(out) if plain else own(out)  # as it is, or with our pipeline.py
    assert isinstance(pipe, DDIMPipeline) == plain
    assert (out / "pipeline.py").exists() != plain
    classes = config.model.num_classes
    more = {"use_clipped_model_output": how.clip, "num_inference_steps": 10} if plain else {}
    images = {"class_labels": [1, 3]} if classes else {"batch_size": 2}
    drawn = pipe(**images, **more, generator=torch.Generator().manual_seed(5), output_type="np").images
    drawn = torch.from_numpy(drawn).permute(0, 3, 1, 2)
    wanted = ours(model, config, noise(2), torch.tensor([1, 3]), how)
    torch.testing.assert_close(drawn, wanted, rtol=0, atol=1e-4)
    assert float(((wanted > 0) & (wanted < 1)).float().mean()) > 0.1


# Their time frequencies are the papers', which diffusers has not, nor has it a DiT told words or pictures, or JiT's.
NOT_OF_DIFFUSERS = (
    "imagenet",
    "digits-text",
    "digits-control",
    "digits-vdm",
    "digits-edm",
    "digits-jit",
    "digits-meanflow",
    "digits-ddgan",
    "digits-gan",
    "cifar10-latent",
    "cifar10-captions",
    "t2i",
)


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(CONFIG.parent.glob("*.yaml")) if not path.stem.startswith(NOT_OF_DIFFUSERS)],
    ids=lambda path: path.stem,
)
def test_every_shipped_config_has_a_model_that_diffusers_has_too(path, monkeypatch):
    """All its weights, by name and shape."""
    monkeypatch.setenv("DTRAIN_CIFAR10", "/photographs")
    config = load(path)
    if config.model.name == "kl_autoencoder":
        with torch.device("meta"):
            model = allocate(config)
            theirs = AutoencoderKL.from_config(autoencoder_config(model, config.data.image_size)).state_dict()
        assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in model.state_dict().items()}
        return
    with torch.device("meta"):
        exported = to_diffusers(allocate(config), build_process(config.diffusion), config.eval)
        theirs = CLASSES[exported.folder].from_config(exported.config).state_dict()
    assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in exported.weights.items()}
    assert exported.left_out == []


def test_the_readme_of_a_diffusers_folder_draws_where_dtrain_is_not_needed(run, tmp_path):
    export(RunDirectory(run.run.path), tmp_path / "out", None, 0, "fp32", "diffusers")
    assert "dtrain" not in (tmp_path / "out" / "pipeline.py").read_text().replace("Written by dtrain", "")
    picture = Image.open(run_readme(tmp_path / "out", tmp_path))
    assert picture.size == (8 * 64, 64)
    assert np.asarray(picture).std() > 10


def test_the_readme_of_a_unet_without_classes_draws_with_diffusers_own_pipeline(digits, tmp_path):
    config = trained(digits, tmp_path, UNET, "eval.clip=true")
    export(RunDirectory(config.run.path), tmp_path / "out", None, 0, "bf16", "diffusers")
    text = (tmp_path / "out" / "README.md").read_text()
    assert 'from_pretrained(".")' in text
    assert "use_clipped_model_output=True" in text
    assert Image.open(run_readme_in_a_fork(tmp_path / "out", tmp_path)).size == (8 * 64, 64)


def test_the_readme_of_pure_weights_draws_with_dtrain(run, tmp_path):
    export(RunDirectory(run.run.path), tmp_path / "out", None, 0, "fp32", "safetensors")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights.keys() == dict(allocate(run).named_parameters()).keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["step"] == 40
    assert Image.open(run_readme_in_a_fork(tmp_path / "out", tmp_path)).size == (8 * 64, 64)


def test_class_names_of_the_data_are_labels_there(digits, tmp_path, no_network):
    config = tiny(digits, tmp_path)
    named = tmp_path / "named.json"
    manifest = json.loads(config.data.manifest_path.read_text())
    named.write_text(json.dumps(manifest | {"classes": [f"digit, {i}" for i in range(10)]}))
    config = tiny(digits, tmp_path, f"data.manifest={named}", "eval.steps=2")
    WRITERS["diffusers"](randomised(allocate(config)), config, SOURCE, tmp_path / "out")
    pipe = own(tmp_path / "out")
    assert pipe.labels["digit, 7"] == 7
    assert len(pipe(["digit, 7", 2]).images) == 2
    for wrong in ("digit", "7", 10, -1):
        with pytest.raises(ValueError, match="there is no class"):
            pipe([wrong])
    with pytest.raises(ValueError, match="has 10 classes; give class_labels"):
        pipe(batch_size=2)


def test_steps_that_diffusers_cannot_walk_exactly_are_warned_of(digits, tmp_path, caplog, no_network):
    config = tiny(digits, tmp_path)
    WRITERS["diffusers"](randomised(allocate(config)), config, SOURCE, tmp_path / "out")
    pipe = own(tmp_path / "out")
    diffusers_logging.enable_propagation()
    pipe([1], num_inference_steps=3)
    diffusers_logging.disable_propagation()
    assert "3 steps do not divide 1000" in caplog.text


def test_an_export_overwrites_nothing_and_says_what_it_cannot_do(run, tmp_path):
    directory = RunDirectory(run.run.path)
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"is there already; name a new folder, or an empty one"):
        export(directory, tmp_path, None, 0, "fp32", "diffusers")
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]
    with pytest.raises(UserError, match="there is no EMA 1: run tiny has 1, counted from 0"):
        export(directory, tmp_path / "out", None, 1, "fp32", "diffusers")
    with pytest.raises(UserError, match="--format onnx is not one of safetensors, published, diffusers"):
        export(directory, tmp_path / "out", None, 0, "fp32", "onnx")


def test_a_flow_that_counts_time_as_sit_does_is_published_turned_round_and_comes_back(digits, tmp_path):
    more = ["diffusion.process=flow", "diffusion.time_scale=1", "model.frequency_shift=0"]
    config = tiny(digits, tmp_path, *more)
    model = randomised(allocate(config))
    WRITERS["published"](model, config, SOURCE, tmp_path / "published")
    WRITERS["safetensors"](model, config, SOURCE, tmp_path / "own")
    published = tmp_path / "published" / "model.safetensors"
    assert load_file(published).keys() == dict(model.named_parameters()).keys()
    assert torch.equal(load_file(published)["final_layer.linear.bias"], -model.final_layer.linear.bias)
    for file, tolerance in ((published, 1e-6), (tmp_path / "own" / "model.safetensors", 0)):
        again = load_published(allocate(config), file, data_at_one=config.diffusion.data_at_one)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(again.get_parameter(name), parameter, rtol=tolerance, atol=tolerance)
    model.t_embedder.shift = 1
    with pytest.raises(UserError, match="diffusers tells a flow's model 1000 t"):
        WRITERS["diffusers"](model, config, SOURCE, tmp_path / "diffusers")


def test_a_flow_that_predicts_x0_is_published_with_its_sign_and_refused_by_diffusers(digits, tmp_path):
    more = ["diffusion={process: flow, prediction: x0, time_scale: 1}", "model.frequency_shift=1"]
    config = tiny(digits, tmp_path, *more)
    model = randomised(allocate(config))
    WRITERS["published"](model, config, SOURCE, tmp_path / "published")
    published = load_file(tmp_path / "published" / "model.safetensors")
    assert torch.equal(published["final_layer.linear.bias"], model.final_layer.linear.bias)
    assert not torch.equal(published["t_embedder.mlp.0.weight"], model.t_embedder.mlp[0].weight)
    assert "the answer is x_0" in (tmp_path / "published" / "README.md").read_text()
    with pytest.raises(UserError, match=r"takes a model's answer as the velocity, .* diffusion.prediction x0"):
        WRITERS["diffusers"](model, config, SOURCE, tmp_path / "diffusers")


def test_edm_is_refused_by_diffusers_because_its_model_is_told_another_number(digits, tmp_path):
    config = tiny(digits, tmp_path, "diffusion.process=edm")
    with pytest.raises(UserError, match=r"tell a model ln σ/4, .* take --format safetensors"):
        WRITERS["diffusers"](allocate(config), config, SOURCE, tmp_path / "diffusers")


def test_a_run_with_published_frequencies_is_refused_before_a_folder_is_made(digits, tmp_path):
    config = tiny(digits, tmp_path, "model.frequency_shift=0")
    with pytest.raises(UserError, match=r"train with model\.frequency_shift 1"):
        WRITERS["diffusers"](randomised(allocate(config)), config, SOURCE, tmp_path / "out")
    assert not Path(tmp_path / "out").exists()


def test_what_was_left_out_and_unnamed_classes_are_told(digits, finished_run, tmp_path):
    config = copied(finished_run, digits, tmp_path, "eval.sampler=dpmpp_2m")
    directory = RunDirectory(config.run.path)
    directory.save_config(config.model_copy(update={"data": config.data.model_copy(update={"shards": "/gone"})}))
    lines = export(directory, tmp_path / "out", None, None, "fp32", "diffusers").splitlines()
    assert lines[1] == "not in it, as diffusers draws otherwise: eval.sampler dpmpp_2m"
    assert lines[2].startswith("classes go by their numbers: /gone/manifest.json has no names of them")
    assert "drawn otherwise in eval.sampler dpmpp_2m" in (tmp_path / "out" / "README.md").read_text()
