"""The `diffusion` section: a Gaussian process, a flow, MeanFlow, EDM, variational diffusion or a denoising GAN.

A string below a key says what the key does.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dtrain.config.critics import Critic
from dtrain.config.perceptual import Perceptual
from dtrain.config.sections import IdentitySection, NonNegative, NonNegativeFloat, Positive, Probability
from dtrain.draws import Draw, Purpose


class _Process(IdentitySection):
    """What all diffusion processes have in common."""

    label_dropout: Probability = 0.1
    """share of the images trained without their label, so that guidance works"""
    stratified: bool = False
    """spread the times of a global batch evenly"""

    def draws(self, shape: tuple[int, int, int]) -> list[Draw]:
        """Random numbers of each row beside its time and noise, of x_0 of this shape."""
        return []

    @property
    def told_shape(self) -> tuple[int, ...]:
        """The shape of what the network is told of a row's time; (): one number."""
        return ()

    @property
    def further_forwards(self) -> int:
        """Forwards of each row in training without a gradient."""
        return 0

    @property
    def file_of_weights(self) -> str | None:
        """The user's file with the weights of a frozen network that the loss computes with; None: there is none."""
        return None

    @property
    def data_at_one(self) -> str | None:
        """What the network predicts, where weight files of others count the time from noise, 0, to data, 1."""
        return None


class _LogitNormal(_Process):
    """Those whose times may be logit-normal."""

    logit_normal_mean: float = 0.0
    """of times logit_normal: the normal's mean; above 0 there is more noise"""
    logit_normal_std: Annotated[float, Field(gt=0)] = 1.0
    """of times logit_normal: the normal's standard deviation"""


class Gaussian(_LogitNormal):
    process: Literal["gaussian"] = "gaussian"
    """noise is added by a Markov chain of timesteps (DDPM)"""
    schedule: Literal["linear", "scaled_linear", "cosine", "sigmoid"] = "linear"
    """how the noise grows with the timestep; cosine keeps more signal in small images"""
    zero_terminal_snr: bool = False
    """stretch the schedule until the last timestep holds no signal"""
    timesteps: Annotated[int, Field(ge=2)] = 1000
    """T, the length of the chain in training"""
    noise: Literal["normal", "gamma"] = "normal"
    """the law of the noise; gamma is skewed, of the same mean and variance (Nachmani et al. 2021)"""
    theta_0: Annotated[float, Field(gt=0)] = 0.001
    """of noise gamma: how skewed it is, by 2 θ_0 √SNR"""
    prediction: Literal["eps", "x0", "v"] = "eps"
    """what the model's output stands for; v is the better one after few steps"""
    variance: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_small"
    """of ancestral steps and of the bound; learned_range asks the model for it"""
    loss: Literal["simple", "hybrid", "vlb"] = "simple"
    """simple: mean squared error; hybrid: with the bound for the variance; vlb: the bound itself"""
    weighting: Literal["none", "min_snr"] = "none"
    """of the timesteps in the loss; min_snr evens out how hard they pull"""
    min_snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    """of weighting min_snr: the signal-to-noise ratio from which weights are bounded"""
    times: Literal["uniform", "logit_normal", "importance"] = "uniform"
    """which timesteps are trained; importance: by how large their losses have been"""

    @model_validator(mode="after")
    def _possible(self):
        learned, least = self.variance == "learned_range", {"linear": 21, "scaled_linear": 13}.get(self.schedule, 2)
        problems = [
            (
                self.timesteps < least,
                f"a {self.schedule} schedule of {self.timesteps} timesteps would have β ≥ 1; take at least {least}",
            ),
            (
                self.zero_terminal_snr and self.prediction == "eps",
                "prediction eps cannot go with zero_terminal_snr: at the last timestep x_t is ε itself and "
                "x0 = (x_t − σ ε)/0; take prediction v",
            ),
            (
                self.zero_terminal_snr and self.weighting == "min_snr",
                "weighting min_snr cannot go with zero_terminal_snr: the timestep that sampling starts from would have "
                "weight 0; take weighting none",
            ),
            (
                self.loss == "simple" and learned,
                "loss simple does not train the variance that learned_range asks the model for; take loss hybrid",
            ),
            (
                self.loss == "hybrid" and not learned,
                f"loss hybrid has nothing to train with variance {self.variance}; take variance learned_range",
            ),
            (
                self.loss == "vlb" and self.weighting != "none",
                "weighting min_snr cannot go with loss vlb: the bound has weights of its own; take weighting none",
            ),
            (
                self.loss == "vlb" and self.times == "logit_normal",
                "times logit_normal cannot go with loss vlb: the sum would no longer be the bound; "
                "take times importance, which corrects for what it does",
            ),
        ]
        for wrong, message in [*problems, *self._of_gamma()]:
            if wrong:
                raise ValueError(message)
        return self

    def _of_gamma(self) -> list[tuple[bool, str]]:
        if self.noise == "normal":
            unused = f"theta_0 {self.theta_0} has no effect on noise normal; take noise gamma, or leave it out"
            return [(self.theta_0 != 0.001, unused)]
        return [
            (
                self.variance != "fixed_small",
                f"variance {self.variance} has no effect on noise gamma, whose steps are drawn from a beta law; leave "
                "it out",
            ),
            (
                self.loss != "simple",
                f"loss {self.loss} cannot go with noise gamma: the bound is of normal noise; take loss simple",
            ),
            (
                self.zero_terminal_snr,
                "zero_terminal_snr cannot go with noise gamma, whose shape would be infinite at the last timestep; "
                "leave it out",
            ),
        ]


class Flow(_LogitNormal):
    process: Literal["flow"]
    """images and noise on a straight line (rectified flow)"""
    coupling: Literal["independent", "data"] = "independent"
    """which noise an image is paired with; data: the one that it was drawn from, of `dtrain pairs` (reflow)"""
    times: Literal["uniform", "logit_normal", "one"] = "uniform"
    """which times are trained; logit_normal: more of those in the middle; one: noise alone, for a single step"""
    time_scale: Literal[1, 1000] = 1000
    """what the model is told of t is this times t; 1 as in SiT, whose weight files run.init_from then turns round"""
    prediction: Literal["velocity", "x0"] = "velocity"
    """what the model's output stands for; x0 for large patches of pixels (JiT); the loss is the velocity's for both"""
    least_time: Annotated[float, Field(gt=0, le=1)] = 0.05
    """of prediction x0: the loss divides by t, and by no less than this"""
    perceptual: Perceptual | None = None
    """of times one: a distance of a frozen network's features beside the error of the picture drawn; null: none"""

    @model_validator(mode="after")
    def _possible(self):
        if self.times == "one" and self.coupling == "independent":
            raise ValueError(
                "times one needs coupling data: from noise alone, of any image, a network learns the mean of all images"
            )
        if self.perceptual is not None and self.times != "one":
            raise ValueError(
                f"perceptual {self.perceptual.kind} cannot go with times {self.times}: before the end of its walk a "
                "network's estimate of a picture is a mean of many; take times one, or leave it out"
            )
        if self.least_time != 0.05 and self.prediction == "velocity":
            raise ValueError(
                f"least_time {self.least_time} has no effect on prediction velocity, whose loss divides by no time; "
                "take prediction x0, or leave it out"
            )
        return self

    @property
    def data_at_one(self) -> str | None:
        return self.prediction if self.time_scale == 1 else None

    @property
    def file_of_weights(self) -> str | None:
        return getattr(self.perceptual, "file", None)


class MeanFlow(_Process):
    process: Literal["meanflow"]
    """a flow whose network gives the mean velocity from one time to another, and so draws in one step (MeanFlow)"""
    span_share: Probability = 0.25
    """share of the rows with two times; of the others the network learns the velocity itself"""
    logit_normal_mean: float = -0.4
    """of both times, which are logit-normal"""
    logit_normal_std: Annotated[float, Field(gt=0)] = 1.0
    """of both times, their normal's standard deviation"""
    along: Literal["data", "network"] = "data"
    """the velocity along which the mean changes: of the row's own path, or the network's (improved MeanFlow)"""
    weight_power: Annotated[float, Field(ge=0, le=1)] = 1.0
    """p of a row's weight 1/(its squared error + 1e-3)^p; 0: none"""
    guidance: NonNegativeFloat = 1.0
    """its scale, built into the velocity that is learned: samples need no null then; 1: none"""
    guidance_mix: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """κ, share of the network's own answer in that velocity; ω of the row's path is then guidance · (1 − κ)"""
    guidance_from: NonNegative = 0
    """images seen before guidance is built in"""

    @model_validator(mode="after")
    def _possible(self):
        for key in ("guidance_mix", "guidance_from"):
            if (value := getattr(self, key)) and self.guidance == 1:
                raise ValueError(f"{key} {value} has no effect with guidance 1; take guidance 2, or leave it out")
        return self

    def draws(self, shape: tuple[int, int, int]) -> list[Draw]:
        return [Draw("other_time", Purpose.OTHER_TIME, "uniform"), Draw("span", Purpose.SPAN, "uniform")]

    @property
    def told_shape(self) -> tuple[int, ...]:
        return (2,)

    @property
    def further_forwards(self) -> int:
        own = self.along == "network" or self.guidance_mix > 0
        return 2 + own + (self.guidance != 1)


class EDM(_Process):
    process: Literal["edm"]
    """noise of any σ, on data of one deviation (Karras et al. 2022)"""
    sigma_data: Annotated[float, Field(gt=0)] = 0.5
    """σ_data, the deviation of what the network sees: of latents of normalise dataset 1"""
    sigma_min: Annotated[float, Field(gt=0)] = 0.002
    """the least σ that samplers visit before clean data"""
    sigma_max: Annotated[float, Field(gt=0)] = 80.0
    """the σ that samplers begin from"""
    rho: Annotated[float, Field(gt=0)] = 7.0
    """ρ of the steps between them, which are equal in σ^(1/ρ): the larger, the more of them near clean data"""
    noise_mean: float = -1.2
    """of ln σ in training, which is normal"""
    noise_std: Annotated[float, Field(gt=0)] = 1.2
    """of ln σ in training, its standard deviation"""
    uncertainty: Literal["none", "learned"] = "none"
    """learned: a small network learns how large each level's loss is, and all levels pull alike (EDM2)"""

    @model_validator(mode="after")
    def _ends_apart(self):
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        return self


class Variational(_Process):
    process: Literal["vdm"]
    """noise by the log of signal to noise, trained on the bound in bits/dim (variational diffusion)"""
    schedule: Literal["linear", "learned"] = "linear"
    """of γ(t) = −log SNR, from gamma_min at t = 0 to gamma_max at t = 1; learned: for a quiet estimate of the bound"""
    schedule_lr_factor: Annotated[float, Field(gt=0)] = 1.0
    """of schedule learned: its learning rate is so many times optim.lr"""
    gamma_min: float = -13.3
    """γ of clean data; -13.3 leaves a sixth of a grey level of noise"""
    gamma_max: float = 5.0
    """γ of noise; above it less of the data is left there"""
    timesteps: Positive | None = None
    """T, the length of a discrete chain; null: continuous time, which is the tighter bound"""

    @model_validator(mode="after")
    def _possible(self):
        if self.gamma_min >= self.gamma_max:
            raise ValueError(
                f"gamma_min {self.gamma_min} must be below gamma_max {self.gamma_max}: γ grows with the noise; take "
                "-13.3 and 5"
            )
        if self.schedule_lr_factor != 1 and self.schedule == "linear":
            raise ValueError(
                f"schedule_lr_factor {self.schedule_lr_factor} has no effect with schedule linear, which is not "
                "learned; take schedule learned, or leave it out"
            )
        return self


class DenoisingGAN(_Process):
    process: Literal["ddgan"]
    """a short chain whose network draws x_0 against a critic (denoising diffusion GAN); of one timestep, a GAN"""
    label_dropout: Probability = 0.0
    """share of the images trained without their label; nothing here needs it"""
    timesteps: Annotated[int, Field(ge=1, le=8)] = 4
    """T, steps of a sample; 1: a GAN, whose network sees noise alone"""
    latent: Positive = 100
    """numbers beside x_t, standard normal, that a sample of x_0 is made of"""
    r1: NonNegativeFloat = 0.02
    """weight of the critic's squared slope at data; the critic is at ZeRO stage 2 at most while it is above 0"""
    r1_every: Positive = 15
    """steps from one such penalty to the next"""
    critic: Critic = Critic()
    """the network that tells data from samples"""

    def draws(self, shape: tuple[int, int, int]) -> list[Draw]:
        pictures = {"step_noise": Purpose.STEP_NOISE, "reverse_noise": Purpose.REVERSE_NOISE}
        found = [Draw(name, purpose, "normal", shape) for name, purpose in pictures.items()]
        return [Draw("latent", Purpose.LATENT, "normal", (self.latent,)), *found]

    @property
    def told_shape(self) -> tuple[int, ...]:
        return (1 + self.latent,)

    @property
    def further_forwards(self) -> int:
        return 1
