"""Sections that come in kinds, and choices that exclude each other: the errors stay one clear line."""

import pytest
import torch
import yaml

from dtrain.conditions.build import build
from dtrain.config import EDM, Config, DiT, Flow, Gaussian, UNet, Variational, validate
from dtrain.errors import UserError

DIT = {"name": "dit", "depth": 1, "width": 32, "heads": 2, "patch": 2}
BASE = {"data": {"shards": "d", "image_size": 8, "channels": 1, "batch_size": 8}, "train": {"steps": 1}}
GAMMA = {"noise": "gamma"}
LEARNED = {"process": "edm", "uncertainty": "learned"}
KIND = {"model": {"name": "dit", "size": "S/2", "num_classes": 10}}


def config(**sections):
    return validate(BASE | KIND | sections, "x.yaml")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"name": "dit", "dept": 2}}, "unknown key `model.dept` in x.yaml; did you mean `model.depth`?"),
        ({"model": {"name": "unet", "widht": 32}}, "unknown key `model.widht` in x.yaml; did you mean `model.width`?"),
        ({"model": {"name": "unet"}}, "`model.width` is missing in x.yaml"),
        ({"model": {"name": "unett"}}, "is 'unett': take dit, mmdit, unet or kl_autoencoder"),
        ({"model": {"depth": 2}}, "`model.name` is missing in x.yaml: take dit, mmdit, unet or"),
        ({"model": {"name": "unet", "width": 8, "multipliers": [1, 0]}}, "`model.multipliers.1` in x.yaml is 0: "),
        ({"model": {"name": "unet", "width": 8}}, "model.attention 16 is the side of no level"),
        ({"model": {"name": "unet", "width": 8, "multipliers": [1] * 5}}, "does not halve 4 times"),
        ({"diffusion": {"shedule": "cosine"}}, "did you mean `diffusion.schedule`?"),
        ({"diffusion": {"process": "flow", "schedule": "cosine"}}, "unknown key `diffusion.schedule` in x.yaml; known"),
        ({"diffusion": {"process": "flo"}}, "is 'flo': take gaussian, flow, meanflow, edm, vdm or ddgan"),
        ({"diffusion": {"prediction": "x"}}, "`diffusion.prediction` in x.yaml is 'x': input should be 'eps'"),
        ({"diffusion": {"timesteps": 20}}, "take at least 21"),
        ({"diffusion": {"zero_terminal_snr": True}}, "x0 = (x_t − σ ε)/0; take prediction v"),
        ({"diffusion": {"zero_terminal_snr": True, "prediction": "v", "weighting": "min_snr"}}, "would have weight 0"),
        ({"diffusion": {"loss": "hybrid"}}, "nothing to train with variance fixed_small"),
        ({"diffusion": {"variance": "learned_range"}}, "take loss hybrid"),
        ({"diffusion": {"loss": "vlb", "weighting": "min_snr"}}, "the bound has weights of its own"),
        ({"diffusion": {"loss": "vlb", "times": "logit_normal"}}, "no longer be the bound"),
        ({"diffusion": {"theta_0": 0.002}}, "theta_0 0.002 has no effect on noise normal; take noise gamma"),
        ({"diffusion": GAMMA | {"variance": "fixed_large"}}, "whose steps are drawn from a beta law"),
        ({"diffusion": GAMMA | {"variance": "learned_range", "loss": "hybrid"}}, "no effect on noise gamma"),
        ({"diffusion": GAMMA | {"loss": "vlb"}}, "loss vlb cannot go with noise gamma: the bound is of normal noise"),
        ({"diffusion": GAMMA | {"prediction": "v", "zero_terminal_snr": True}}, "whose shape would be infinite"),
        ({"diffusion": GAMMA, "eval": {"sampler": "heun"}}, "the ODE of normal noise, and diffusion.noise is gamma"),
        ({"diffusion": GAMMA, "eval": {"sampler": "lcm"}}, "lcm adds normal noise, and diffusion.noise is gamma; take"),
        ({"diffusion": GAMMA, "eval": {"eta": 0.5}}, "eval.eta 0.5 adds normal noise, and diffusion.noise is gamma"),
        ({"diffusion": GAMMA, "eval": {"metrics": ["bpd"]}}, "of normal noise, and diffusion.noise is gamma"),
        ({"eval": {"sampler": "euler"}}, "eval.sampler euler does not walk a gaussian process"),
        ({"eval": {"sampler": "ddim"}, "diffusion": {"process": "flow"}}, "take euler or heun"),
        ({"eval": {"sampler": "heun", "eta": 0.5}}, "eval.eta 0.5 has no effect on sampler heun"),
        ({"eval": {"sampler": "lcm", "eta": 0.5}}, "eval.eta 0.5 has no effect on sampler lcm"),
        ({"eval": {"sampler": "lcm", "guidance": 2, "guidance_renoise": "away"}}, "cannot go with sampler lcm, whose"),
        ({"eval": {"sampler": "lcm"}, "diffusion": {"process": "edm"}}, "lcm does not walk a edm process; take ddim"),
        ({"eval": {"clip": True}, "diffusion": {"process": "meanflow"}}, "no estimate of x_0; take sampler lcm, or"),
        ({"eval": {"spacing": "quad"}, "diffusion": {"process": "flow"}}, "eval.spacing quad has no effect on a flow"),
        ({"eval": {"spacing": "quad"}, "diffusion": {"process": "edm"}}, "no effect on edm, whose steps diffusion.rho"),
        ({"eval": {"spacing": "edm"}, "diffusion": {"process": "edm"}}, "no effect on edm, whose steps diffusion.rho"),
        ({"eval": {"spacing": [9], "steps": 1}, "diffusion": {"process": "meanflow"}}, "no timesteps; take edm, or"),
        ({"eval": {"spacing": "edm", "sampler": "sde"}, "diffusion": {"process": "flow"}}, "which has times of its"),
        ({"eval": {"sampler": "ancestral"}, "diffusion": {"process": "edm"}}, "take ddim or dpmpp_2m or dpmpp_3m or"),
        ({"eval": {"metrics": ["bpd"]}, "diffusion": {"process": "edm"}}, "has timesteps to sum over, or of vdm, and"),
        ({"eval": {"churn": 40}}, "eval.churn 40.0 has no effect on sampler ddim of diffusion.process gaussian"),
        ({"eval": {"churn": 40, "sampler": "euler"}, "diffusion": {"process": "edm"}}, "no effect on sampler euler"),
        ({"eval": {"churn_noise": 1.01}, "diffusion": {"process": "edm"}}, "eval.churn_noise 1.01 has no effect with"),
        ({"eval": {"churn": 9, "churn_min": 2, "churn_max": 1}, "diffusion": {"process": "edm"}}, "must be above eval"),
        ({"diffusion": {"process": "edm", "sigma_min": 80}}, "sigma_min 80.0 must be below sigma_max 80.0"),
        ({"diffusion": LEARNED, "deepspeed": {"precision": "bf16"}}, "would round its network's weights; take bf"),
        ({"diffusion": {"process": "edm", "times": "uniform"}}, "unknown key `diffusion.times` in x.yaml"),
        ({"eval": {"spacing": "qad"}}, "`eval.spacing` in x.yaml is 'qad'"),
        ({"eval": {"spacing": [9, 5]}}, "lists 2 timesteps, but eval.steps is 50"),
        ({"eval": {"spacing": [5, 9], "steps": 2}}, "must list timesteps that fall"),
        ({"eval": {"spacing": [1000, 9], "steps": 2}}, "from at most 999"),
        ({"eval": {"guidance_interval": [0.6, 0.2]}}, "low < high"),
        ({"diffusion": {"process": "vdm", "schedule_lr_factor": 3}}, "has no effect with schedule linear"),
        (
            {"diffusion": {"process": "vdm", "schedule": "learned"}, "deepspeed": {"precision": "bf16"}},
            "schedule learned, a network beside the backbone, cannot go with deepspeed.precision bf16",
        ),
        (
            {"diffusion": {"process": "vdm", "schedule": "learned"}, "model": DIT | {"adapt": {"of": "runs/x"}}},
            "cannot go with model.adapt, whose base had its own; take schedule linear",
        ),
        ({"model": DIT | {"fourier": [7, 7]}}, "[7, 7] names an octave twice"),
        ({"model": DIT | {"fourier": [7]}, "diffusion": {"process": "edm"}}, "sees a picture scaled by 1/σ_data; take"),
        ({"model": DIT | {"fourier": [7]}, "deepspeed": {"precision": "bf16"}}, "take bf16_autocast"),
        ({"diffusion": {"process": "flow", "times": "one"}}, "times one needs coupling data"),
        ({"diffusion": {"process": "flow", "coupling": "data"}, "eval": {"guidance": 2}}, "drawn with guidance, which"),
        ({"eval": {"metrics": ["straightness"]}}, "straightness is of a flow's paths"),
        ({"eval": {"metrics": ["bpd_ode"]}}, "is by the ODE of a flow, and diffusion.process is gaussian; take bpd"),
        ({"eval": {"metrics": ["bpd"]}, "diffusion": {"process": "flow"}}, "diffusion.process is flow; take bpd_ode"),
        ({"eval": {"metrics": ["bpd_ode"]}, "diffusion": {"process": "flow", "prediction": "x0"}}, "has no bound"),
        ({"eval": {"guide_with": "runs/small"}}, "eval.guide_with has no effect with eval.guidance 1"),
        ({"eval": {"guidance_renoise": "away"}}, "eval.guidance_renoise away has no effect with eval.guidance 1"),
        ({"eval": {"guide_with": "runs/small", "guidance": "label=2"}}, "told everything too; take one number"),
        ({"eval": {"guide_with": "runs/small", "guidance": 2, "guess_mode": True}}, "eval.guess_mode has no effect"),
        ({"eval": {"guidance_renoise": "away", "guidance": 2, "sampler": "heun"}}, "take ddim or euler"),
        ({"diffusion": {"process": "vdm", "gamma_min": 6}}, "gamma_min 6.0 must be below gamma_max 5.0"),
        ({"diffusion": {"process": "vdm", "times": "logit_normal"}}, "unknown key `diffusion.times`"),
        ({"diffusion": {"process": "vdm"}, "eval": {"sampler": "euler"}}, "does not walk a vdm process; take ddim"),
        ({"diffusion": {"process": "vdm"}, "eval": {"spacing": "quad"}}, "quad has no effect on vdm, whose times"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line_with_the_reason(sections, message):
    with pytest.raises(UserError) as error:
        config(**sections)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_guidance_without_classes_is_refused():
    with pytest.raises(UserError, match="num_classes is 0"):
        config(model={"name": "dit", "size": "S/2"}, eval={"guidance": 2})


def test_a_flow_is_walked_by_euler_unless_told_otherwise():
    assert config(diffusion={"process": "flow"}).eval.sampler == "euler"
    assert config(diffusion={"process": "flow"}, eval={"sampler": "heun"}).eval.sampler == "heun"
    assert config(diffusion={"process": "edm"}).eval.sampler == "heun"
    assert config().eval.sampler == "ddim"


def test_the_defaults_are_plain_ddpm():
    c = config()
    assert c.diffusion == Gaussian()
    assert (c.diffusion.schedule, c.diffusion.prediction, c.diffusion.loss) == ("linear", "eps", "simple")
    assert (c.eval.eta, c.eval.spacing, c.eval.clip, c.eval.guidance) == (0, "trailing", False, 1)


@pytest.mark.parametrize(
    ("sections", "kinds"),
    [
        ({}, (DiT, Gaussian)),
        ({"model": {"name": "unet", "width": 32, "attention": [4]}}, (UNet, Gaussian)),
        ({"diffusion": {"process": "flow", "times": "logit_normal"}}, (DiT, Flow)),
        ({"diffusion": {"process": "edm", "rho": 5}, "eval": {"churn": 40}}, (DiT, EDM)),
        ({"diffusion": {"process": "vdm", "timesteps": 9}, "eval": {"steps": 99}}, (DiT, Variational)),
        ({"eval": {"eta": "sigma_hat", "spacing": [900, 3], "steps": 2}}, (DiT, Gaussian)),
    ],
)
def test_a_dumped_configuration_reads_back_the_same(sections, kinds):
    c = config(**sections)
    assert (type(c.model), type(c.diffusion)) == kinds
    assert Config.model_validate(yaml.safe_load(c.dump())) == c


APART = {"model": {"name": "dit", "size": "S/2", "num_classes": 10}, "conditions": {"text": {}}}


@pytest.mark.parametrize("guidance", [{"text": 3, "label": 1.5}, "text=3,label=1.5", " text=3.0, label=1.5"])
def test_guidance_over_each_condition_apart_is_kept_as_one_text_in_its_order(guidance):
    c = config(**APART, eval={"guidance": guidance})
    assert c.eval.guidance == "text=3,label=1.5"
    assert validate(c.model_dump(mode="json"), "again").eval.guidance == "text=3,label=1.5"
    assert config(**APART, eval={"guidance": "2"}).eval.guidance == 2.0


@pytest.mark.parametrize(
    ("guidance", "line"),
    [
        ("words=3,label=1", r"eval.guidance names words, and this model is told label and text"),
        ("text=3", r"eval.guidance text=3 must name each of label, text once"),
        ("text=3,text=1", r"names each condition once"),
        ("text=3,label=-1", r"takes finite numbers of at least 0"),
        ("text=3,label", r"takes a number, or one of each condition in their order, such as text=3,label=1.5"),
        ("strong", r"takes a number, or one of each condition"),
        (-1, r"takes finite numbers of at least 0"),
        ([1, 2], r"takes a number, or one of each condition"),
    ],
)
def test_guidance_that_names_no_condition_or_is_no_number_is_one_line(guidance, line):
    with pytest.raises(UserError, match=line) as error:
        config(**APART, eval={"guidance": guidance})
    assert "\n" not in str(error.value)


def test_a_condition_that_is_called_as_the_class_is_stands_beside_it_and_is_not_led_to_apart():
    of_both = APART | {"conditions": {"label": {"kind": "text", "length": 8}}}
    condition = build(config(**of_both)).of_ids([0], torch.tensor([3]))
    assert condition.keys() == {"y", "label", "label_mask"}
    with pytest.raises(UserError, match=r"the class is called label, and so is a condition"):
        config(**of_both, eval={"guidance": "label=2"})
