"""The `eval` section: samples and what is measured on them."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from dtrain import plugins
from dtrain.config import guidance as guidances
from dtrain.config.averages import SigmaRel
from dtrain.config.sections import NonNegative, NonNegativeFloat, Place, Positive, Probability, Section

PIN = "#sha256="  # between a TorchScript file and the hash that it must have

_OfSets = Literal["fd", "fd_infinity", "kid", "precision", "recall", "density", "coverage", "memorisation", "is"]
# The bound on held-out images, in bits/dim, or on the density of their latents; the same by the ODE of a flow.
_OfTheModel = Literal["bpd", "nats_per_dim_latent", "bpd_ode", "nats_per_dim_latent_ode", "straightness"]
Metric = Literal[_OfSets, _OfTheModel, "clip_score", "agreement"]
FEATURES = ("auto", "inception", "dinov2", "effnet_lite0", "pixels")  # plug-ins bring further ones
FILES = (".pt", ".pth", ".ts")  # of TorchScript
_HIGHER = ("precision", "recall", "density", "coverage", "is")
HIGHER_IS_BETTER = {
    *_HIGHER,
    *(f"r{metric}" for metric in _HIGHER),
    "psnr",
    "ssim",
    "clip_score",
    "agreement",
    "control",
}
BOUNDS, DENSITIES = {"bpd", "nats_per_dim_latent"}, {"bpd_ode", "nats_per_dim_latent_ode"}
OF_THE_MODEL = BOUNDS | DENSITIES | {"straightness"}  # without samples and features; `evaluate` asks the model itself
OF_WHAT_IS_ASKED = {"clip_score": "clip_model", "agreement": "classifier"}  # of samples alone → key of their network


# Sampler → the processes that it walks; plug-ins bring further ones (`dtrain/plugins.py`).
SAMPLERS = {
    "ddim": ("gaussian", "edm", "vdm"),
    "ancestral": ("gaussian", "vdm", "ddgan"),
    "dpmpp_2m": ("gaussian", "edm", "vdm"),
    "dpmpp_3m": ("gaussian", "edm", "vdm"),
    "unipc": ("gaussian", "edm", "vdm"),
    "euler": ("flow", "meanflow", "edm"),
    "heun": ("gaussian", "flow", "edm", "vdm"),
    "sde": ("flow",),
    "lcm": ("gaussian", "flow", "meanflow"),
}
OWN_DEFAULT = {
    "flow": "euler",
    "meanflow": "euler",
    "edm": "heun",
    "ddgan": "ancestral",
}  # process → the sampler that a config of it means unless it says so


class Sampling(Section):
    """All that determines an image beside weights, noise and what the network is told: part of a metric's context."""

    images: Literal["reconstructions", "prior"] = "reconstructions"
    """of an autoencoder: held-out pictures given back, or new ones, decoded from latents drawn from N(0, I)"""
    sampler: str = "ddim"
    """ddim, ancestral, dpmpp_2m, dpmpp_3m, unipc, heun, lcm; flow: euler (default), heun, sde, lcm; edm: heun, …"""
    steps: Positive = 50
    """of the sampler for one image"""
    eta: Annotated[float, Field(ge=0, le=1)] | Literal["sigma_hat"] = 0.0
    """ddim's noise, 0 to 1; sigma_hat: DDPM's larger one"""
    sde_noise: Literal["2t", "t", "sine"] | None = None
    """sde's noise w(t), t = 1 is noise: 2t (null), t, or sin² πt; the marginals are the flow's for each"""
    churn: NonNegativeFloat = 0.0
    """heun's new noise on edm, S_churn, spread over the steps; 0: none (Karras et al. 2022, algorithm 2)"""
    churn_min: NonNegativeFloat = 0.0
    """the least σ at which churn adds noise, S_tmin"""
    churn_max: NonNegativeFloat = 0.0
    """the largest σ at which churn adds noise, S_tmax; 0: any"""
    churn_noise: Annotated[float, Field(gt=0)] = 1.0
    """deviation of churn's noise, S_noise: slightly above 1 against lost detail"""
    spacing: Literal["trailing", "leading", "linspace", "quad", "edm"] | list[NonNegative] = "trailing"
    """which times the sampler visits: equal steps, EDM's of σ/α, or timesteps themselves, falling"""
    clip: bool = False
    """hold every estimate of x_0 within [−1, 1] while sampling"""
    guidance: NonNegativeFloat | str = 1.0
    """s in uncond + s·(cond − uncond), 1: none; or of each condition apart, in their order: text=3,label=1.5"""
    negative_prompt: str = ""
    """words that guidance leads away from, of a model that is told in words; empty: from no words"""
    guidance_interval: tuple[Probability, Probability] = (0.0, 1.0)
    """shares of the process where guidance acts; 0 is clean data"""
    guidance_rescale: Probability = 0.0
    """how far the contrast is brought back to the conditional one's"""
    guidance_orthogonal: Probability = 0.0
    """how much of guidance along x_0 itself, which saturates, is left out: APG's 1 − η; 1 takes larger guidance"""
    guidance_norm: Annotated[float, Field(gt=0)] | None = None
    """most that guidance with scale 1 may move x_0, as an L2 norm; null: any (APG's r)"""
    guidance_momentum: Annotated[float, Field(gt=-1, lt=1)] = 0.0
    """how much of the guidance of the step before is added: APG's β, such as -0.5"""
    guidance_renoise: Literal["guided", "away"] = "guided"
    """whose noise the next state of ddim or euler holds; away: that of what guidance leads away from (CFG++)"""
    guide_with: Place | None = None
    """guidance leads away from this weaker run or earlier checkpoint, told the same, instead of from the null"""
    guidance_channels: Literal["all", "first_3"] = "all"
    """first_3 only to repeat published DiT results"""
    control_scale: dict[str, NonNegativeFloat] = Field({})
    """of pictures of `conditions`, by name, what their control is multiplied with; 0: the base alone; left out: 1"""
    guess_mode: bool = False
    """guidance leads away from the base without control too, which acts the less the finer it is (Zhang et al. 2023)"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of the network while sampling; the samples' states stay fp32"""
    batch_size: Positive = 64
    """block of sample ids drawn together; part of the result's identity"""
    decode_batch: Positive | None = None
    """latents that first_stage kl decodes together, which bounds memory; null: 8"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """of the samples' noise"""

    _kept_guidance = field_validator("guidance", mode="before")(guidances.kept)

    @property
    def asked(self) -> guidances.Chain:
        """What the network is asked for one answer, by `guidance`."""
        return guidances.chain(self.guidance)

    @field_validator("sampler")
    @classmethod
    def _known_sampler(cls, value: str) -> str:
        if value not in SAMPLERS and plugins.find("sampler", value) is None:
            raise ValueError(plugins.unknown("sampler", value, SAMPLERS))
        return value


# Of these, what an image depends on that is decoded from N(0, I): no process is walked.
OF_THE_PRIOR = ("images", "precision", "batch_size", "seed")


class Eval(Sampling):
    every: NonNegative = 0
    """steps between evaluations; 0: never during training"""
    num_samples: Positive = 2000
    """images drawn for an evaluation"""
    metrics: list[Metric] = Field(["fd"], min_length=1)
    """fd: Fréchet distance; bpd: bound on held-out images, bpd_ode: exact, of a flow; is: Inception score; …"""
    clip_model: Place | None = None
    """for clip_score: the folder of a CLIPModel of transformers, with its tokenizer and preprocessor_config.json"""
    classifier: Place | None = None
    """for agreement: a TorchScript file that gives scores of the classes (net.pt#sha256=… pins it)"""
    validation_images: Positive = 256
    """the first held-out images, for bpd, bpd_ode and the loss by noise level"""
    training_images: Positive = 50_000
    """the first training images, for memorisation; all, where there are fewer"""
    features: Place = "auto"
    """inception, dinov2, effnet_lite0, pixels, a TorchScript file (net.pt#sha256=… pins it), or auto: what is here"""
    weights: Place | None = None
    """Inception's file or its folder, null: DTRAIN_WEIGHTS, then ~/.cache/dtrain; of dinov2 the folder"""
    resize: Literal["clean", "tensorflow"] | None = None
    """of Inception's images, on both sides; null: clean, and another tool's reference may be otherwise: no fid"""
    reference: Place | None = None
    """an .npz of mu and sigma to compare with; null: computed from data.holdout"""
    labels: Literal["data", "uniform"] = "data"
    """of the samples: as in the held-out split, or all classes in turn; captions are always the held-out ones"""
    prompts: list[str] = Field([])
    """of the pictures that show the training, of a model that is told in words; none: the first held-out captions"""
    bootstrap: NonNegative = 0
    """resamplings behind an interval of fd; 0: none"""
    ode_tolerance: Annotated[float, Field(gt=0, le=1e-2)] = 1e-5
    """of metrics by the ODE: how far a step may be off, relative to 1 + |x|"""
    ode_probes: Positive = 1
    """of metrics by the ODE: random directions that estimate the trace; one is without bias"""
    bpd_clip: bool = True
    """hold them there in bpd too, as published figures do; the bound stays one, and is tighter"""
    ema: NonNegative | Annotated[dict[Literal["sigma_rel"], SigmaRel], Field(min_length=1)] | None = 0
    """which average of `ema` is sampled, counted from 0; null: the raw weights; {sigma_rel: 0.13}: one of snapshots"""

    @field_validator("features")
    @classmethod
    def _known_features(cls, value: str) -> str:
        path, pin, sha256 = value.partition(PIN)
        if pin and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
            raise ValueError(f"{value!r} pins no hash: after #sha256= come 64 hexadecimal digits, as sha256sum prints")
        if value not in FEATURES and not path.endswith(FILES) and plugins.find("features", value) is None:
            raise ValueError(
                f"{plugins.unknown('features', value, FEATURES)}; a TorchScript file ends in {', '.join(FILES)}"
            )
        return value
