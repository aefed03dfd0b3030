"""An exported model in diffusers' own classes and loop gives our outputs and our images."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from dtrain.checkpoint.diffusers import to_diffusers
from dtrain.config import Eval
from dtrain.diffusion.flow import RectifiedFlow
from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.diffusion.samplers import sample
from dtrain.diffusion.schedule import cosine, linear, with_zero_terminal_snr
from dtrain.errors import UserError
from dtrain.models.dit import DiT
from dtrain.models.unet import UNet
from tests.checkpoint.diffusers_models import CLASSES, randomised
from tests.longer import mostly_longer

EPS = GaussianDiffusion(linear(1000))


def dit(**changes):
    sizes = {"image_size": 8, "channels": 3, "patch": 2, "width": 32, "depth": 3, "heads": 4, "num_classes": 5}
    return randomised(DiT(**sizes | {"frequency_shift": 1} | changes))


def unet(**changes):
    sizes = {"image_size": 8, "channels": 3, "width": 16, "multipliers": [1, 2, 2], "res_blocks": 2, "attention": [4],
             "num_classes": 5}  # fmt: skip
    return randomised(UNet(**sizes | changes))


def load(exported, directory):
    """Through files, by diffusers' own from_pretrained."""
    model, scheduler = directory / exported.folder, directory / "scheduler"
    model.mkdir()
    scheduler.mkdir()
    (model / "config.json").write_text(json.dumps(exported.config))
    save_file(exported.weights, model / "diffusion_pytorch_model.safetensors")
    (scheduler / "scheduler_config.json").write_text(json.dumps(exported.scheduler))
    theirs = CLASSES[exported.folder].from_pretrained(model).eval()
    wanted, given = theirs.state_dict(), load_file(model / "diffusion_pytorch_model.safetensors")
    assert wanted.keys() == given.keys()  # nothing left as it was initialised
    return theirs, DDIMScheduler.from_pretrained(scheduler)


MODELS = {
    "dit": (dit, {}),
    "dit-unconditional": (dit, {"num_classes": 0}),
    "dit-learned": (dit, {"learn_sigma": True, "patch": 4, "image_size": 12}),
    "unet": (unet, {}),
    "unet-unconditional": (unet, {"num_classes": 0, "channels": 1, "attention": [8, 2], "multipliers": [1, 1, 3]}),
    "unet-learned": (unet, {"learn_sigma": True}),
    "unet-scale-shift": (unet, {"scale_shift": True, "head_width": 8, "res_blocks": 1, "dropout": 0.1}),
    "unet-adm": (unet, {"scale_shift": True, "head_width": 8, "resblock_updown": True, "group_norm_eps": 1e-5}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_exported_model_answers_as_ours(tmp_path, name):
    make, changes = MODELS[name]
    model = make(**changes)
    theirs, _ = load(to_diffusers(model, EPS, Eval()), tmp_path)
    x = torch.randn(3, model.channels, model.image_size, model.image_size, generator=torch.Generator().manual_seed(1))
    t, y = torch.tensor([0, 417, 999]), torch.tensor([0, 4, 5]) if model.num_classes else None
    ours = model(x, t, y)
    if name == "dit-unconditional":
        y = torch.tensor([0, 1, 0])  # diffusers' DiT must be told one; none adds anything
    assert float(ours.std()) > 0.1
    torch.testing.assert_close(theirs(x, timestep=t, class_labels=y).sample, ours, rtol=0, atol=1e-4)


PROCESSES = {
    "eps": EPS,
    "x0": GaussianDiffusion(linear(1000), "x0"),
    "v-cosine": GaussianDiffusion(cosine(500), "v"),
    "v-zero-terminal": GaussianDiffusion(with_zero_terminal_snr(linear(1000)), "v"),
}


WALKS = [(name, spacing, make) for name in PROCESSES for spacing in ("trailing", "leading") for make in (dit, unet)]
QUICK = [walk for walk in WALKS if walk[2] is dit]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "spacing", "make"),
    mostly_longer(WALKS, stay=[*QUICK, ("eps", "trailing", unet), ("v-cosine", "leading", unet)]),
)
def test_their_own_loop_draws_our_images_from_the_same_noise(tmp_path, name, spacing, make):
    process, model = PROCESSES[name], make()
    theirs, scheduler = load(to_diffusers(model, process, Eval(spacing=spacing)), tmp_path)
    y = torch.tensor([1, 3])
    x = x_T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    scheduler.set_timesteps(20)
    for t in scheduler.timesteps:
        x = scheduler.step(theirs(x, timestep=t.expand(2), class_labels=y).sample, t, x).prev_sample
    ours = sample(lambda x_t, t: model(x_t, t, y), process, x_T, "ddim", 20, spacing)
    scale = max(1.0, float(ours.abs().max()))
    torch.testing.assert_close(x / scale, ours / scale, rtol=0, atol=1e-4)


@torch.no_grad()
def test_published_frequencies_would_give_other_images_there():
    published = dit(frequency_shift=0)
    theirs = DiTTransformer2DModel(**{k: v for k, v in to_diffusers(dit(), EPS, Eval()).config.items() if k[0] != "_"})
    theirs.load_state_dict(to_diffusers(dit(), EPS, Eval()).weights)  # the same weights but for the frequencies
    x, t, y = torch.randn(1, 3, 8, 8), torch.tensor([999]), torch.tensor([1])
    difference = theirs.eval()(x, timestep=t, class_labels=y).sample - published(x, t, y)
    assert float(difference.abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: dit(frequency_shift=0), r"train with model\.frequency_shift 1, or export --format safetensors"),
        (lambda: dit(qk_norm=True), r"no qk_norm; train without model\.qk_norm"),
        (lambda: dit(mlp_ratio=2), "four times the width"),
    ],
)
def test_what_has_no_counterpart_is_refused(model, message):
    with pytest.raises(UserError, match=message):
        to_diffusers(model(), EPS, Eval())


def test_sampling_settings_that_no_pipeline_follows_are_named():
    how = Eval(steps=30, spacing="quad", sampler="ancestral", guidance_rescale=0.5)
    exported = to_diffusers(dit(), EPS, how)
    assert exported.left_out == [
        "eval.sampler ancestral", "eval.steps 30", "eval.spacing quad", "eval.guidance_rescale 0.5"
    ]  # fmt: skip
    assert exported.index["num_inference_steps"] == 25  # 30 does not divide 1,000
    assert exported.scheduler["timestep_spacing"] == "trailing"
    flow = to_diffusers(dit(), RectifiedFlow(), Eval(sampler="heun", steps=30, clip=True))
    assert flow.left_out == ["eval.sampler heun", "eval.clip True"]
    assert to_diffusers(dit(), EPS, Eval(steps=20, eta=0.5, clip=True, guidance=3)).left_out == []
