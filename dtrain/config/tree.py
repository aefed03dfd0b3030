"""The whole configuration: the sections, what must hold between them, and what makes a run itself."""

from typing import Annotated, Any

import yaml
from pydantic import Discriminator, Field, Tag, model_validator

from dtrain.config import coupling, denoising_gan, distillation, mean_flow, on_base, samplers
from dtrain.config.autoencoding import Autoencoding
from dtrain.config.averages import EMAProfile
from dtrain.config.chosen import Chosen
from dtrain.config.conditions import Picture, Text
from dtrain.config.data import Data
from dtrain.config.diffusion import EDM, DenoisingGAN, Flow, Gaussian, MeanFlow, Variational
from dtrain.config.evaluation import OWN_DEFAULT, Eval
from dtrain.config.models import DiT, KLAutoencoder, MMDiT, UNet
from dtrain.config.parts import KL, Denoising, Pixels
from dtrain.config.run import Run, Tracking
from dtrain.config.sections import IdentitySection, Section
from dtrain.config.training import DeepSpeed, Optim, Train

OBJECTIVES = {"denoising": Denoising, "autoencoding": Autoencoding, "distillation": distillation.Distillation}


def _process_of(diffusion: Any) -> str:
    """Which section describes the process: gaussian unless it says otherwise."""
    if isinstance(diffusion, dict):
        return diffusion.get("process", "gaussian")
    return getattr(diffusion, "process", "gaussian")


class Config(Section):
    run: Run = Run()
    """what the run is called and where it lies"""
    data: Data
    """what is trained on, in which order, and how a picture is cut"""
    first_stage: Annotated[Section, Chosen("first_stage", {"pixels": Pixels, "kl": KL})] = Pixels()
    """between pixels and what the network sees"""
    conditions: Annotated[dict[str, Section], Chosen("condition", {"text": Text, "picture": Picture}, by_name=True)] = (
        Field({})
    )
    """what the network is told beside the class: name → section; a section may say its `kind`, by default its name"""
    model: Annotated[DiT | MMDiT | UNet | KLAutoencoder, Field(discriminator="name")]
    """the network"""
    diffusion: Annotated[
        Annotated[Gaussian, Tag("gaussian")]
        | Annotated[Flow, Tag("flow")]
        | Annotated[MeanFlow, Tag("meanflow")]
        | Annotated[EDM, Tag("edm")]
        | Annotated[Variational, Tag("vdm")]
        | Annotated[DenoisingGAN, Tag("ddgan")],
        Discriminator(_process_of),
    ] = Gaussian()
    """how images become noise, and what the network learns of it"""
    objective: Annotated[Section, Chosen("objective", OBJECTIVES)] = Denoising()
    """what training descends"""
    optim: Optim = Optim()
    """AdamW, or Muon beside it"""
    ema: list[EMAProfile] = Field(default_factory=lambda: [EMAProfile()])
    """averages of the weights: a list, each sharded with the optimizer"""
    deepspeed: DeepSpeed = DeepSpeed()
    """memory and precision"""
    train: Train
    """how long, what is kept, and what protects a run"""
    eval: Eval = Eval()
    """samples and their distances, in training and by `dtrain evaluate`"""
    tracking: Tracking = Tracking()
    """MLflow"""

    @model_validator(mode="before")
    @classmethod
    def _sampler_of_the_process(cls, tree: Any) -> Any:
        """The default sampler is the process' own, so that `diffusion.process: flow` alone is a whole choice.

        A denoising GAN has as many steps as timesteps.
        """
        if isinstance(tree, dict) and isinstance(tree.get("diffusion"), dict):
            process, sampling = str(_process_of(tree["diffusion"])), tree.get("eval") or {}
            own = {"sampler": OWN_DEFAULT[process]} if process in OWN_DEFAULT else {}
            if process == "ddgan":
                own["steps"] = tree["diffusion"].get("timesteps", DenoisingGAN.model_fields["timesteps"].default)
            if own and isinstance(sampling, dict):
                return tree | {"eval": own | sampling}
        return tree

    @model_validator(mode="after")
    def _consistent(self):
        self._average_is_there()
        if self.eval.every and not self.data.holdout:
            raise ValueError("eval.every needs data.holdout, the manifest of the split to compare with")
        samplers.check(self)
        if self.first_stage.reads_cache and self.data.crop == "random":
            raise ValueError("first_stage.cached: a cache holds one crop of each picture; take data.crop centre")
        if self.model.name == "unet":
            self._levels_fit()
        if getattr(self.diffusion, "schedule", None) == "learned":
            self._schedule_can_learn()
        if octaves := getattr(self.model, "fourier", []):
            self._waves_fit(octaves)
        _, height, width = self.shape
        if height != width:
            raise ValueError(f"first_stage.kind {self.first_stage.kind} gives {height} × {width}; models take squares")
        if (self.model.name == "kl_autoencoder") != (self.objective.kind == "autoencoding"):
            raise ValueError(
                f"model.name {self.model.name} cannot go with objective.kind {self.objective.kind}: autoencoding "
                "trains a kl_autoencoder, and nothing else does"
            )
        if self.model.name == "kl_autoencoder":
            self._autoencoder_fits()
        if self.model.name == "mmdit" and not self.texts:
            raise ValueError("model.name mmdit attends to words; add a section conditions.text, or take model.name dit")
        if isinstance(self.model, DiT | MMDiT) and height % self.model.sizes["patch"]:
            patch = self.model.sizes["patch"]
            raise ValueError(f"{self._side()} does not divide into patches of {patch} (model.patch)")
        on_base.check(self)
        coupling.check(self)
        if self.diffusion.process == "meanflow":
            mean_flow.check(self)
        if self.diffusion.process == "ddgan":
            denoising_gan.check(self)
        if self.objective.kind == "distillation":
            distillation.check(self)
        if getattr(self.diffusion, "uncertainty", "none") == "learned":
            self._uncertainty_fits()
        if self.optim.name == "muon":
            self._muon_fits()
        return self

    def _uncertainty_fits(self) -> None:
        if self.deepspeed.precision == "bf16":
            raise ValueError(
                "diffusion.uncertainty learned cannot go with deepspeed.precision bf16, which would round its "
                "network's weights; take bf16_autocast"
            )
        if self.objective.kind != "denoising":
            raise ValueError(
                f"diffusion.uncertainty learned is of objective.kind denoising, and it is {self.objective.kind}; "
                "leave it out"
            )

    @property
    def is_coupled(self) -> bool:
        """Whether each sample comes with the noise that it was drawn from."""
        return getattr(self.diffusion, "coupling", "independent") == "data"

    @property
    def reconstructs(self) -> bool:
        """Whether the images of an evaluation are what an autoencoder gives back of the held-out ones."""
        return not self.objective.diffuses and self.eval.images == "reconstructions"

    @property
    def reads_pictures(self) -> bool:
        """Whether a training decodes pictures: not from a cache of latents, nor of pairs."""
        return not (self.first_stage.reads_cache or self.is_coupled)

    @property
    def weight_files(self) -> dict[str, str]:
        """Key → the user's file of a frozen network that losses compute with."""
        sections = {"objective": self.objective, "diffusion": self.diffusion}
        files = {f"{name}.perceptual.file": section.file_of_weights for name, section in sections.items()}
        return {key: file for key, file in files.items() if file is not None}

    @property
    def keeps_snapshots(self) -> bool:
        """Whether averages of other widths can be made after the training: some profile is a power function."""
        return any(profile.sigma_rel is not None for profile in self.ema)

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due after a step, as one or for the snapshot of its averages."""
        return step % self.train.checkpoint_every == 0 or self.is_snapshot(step)

    def is_snapshot(self, step: int) -> bool:
        """Whether the averages of a step are kept when its checkpoint goes."""
        return self.keeps_snapshots and step % self.train.steps_between_snapshots == 0

    def _average_is_there(self) -> None:
        ema = self.eval.ema
        if isinstance(ema, int) and ema >= len(self.ema):
            raise ValueError(f"eval.ema is {ema}, but there are {len(self.ema)} EMA profiles (counted from 0)")
        if isinstance(ema, dict) and not self.keeps_snapshots:
            raise ValueError(
                f"eval.ema sigma_rel {ema['sigma_rel']} is made of snapshots, and no profile of ema has a sigma_rel"
            )

    @property
    def pictures(self) -> dict[str, Picture]:
        """Those of `conditions` that are pictures, by their names."""
        return {name: section for name, section in self.conditions.items() if isinstance(section, Picture)}

    @property
    def base_source(self) -> str | None:
        """The run or file whose frozen weights the trained ones stand on; None where all are trained."""
        adapt = getattr(self.model, "adapt", None)
        return adapt.of if adapt else getattr(self.model, "control_of", None)

    @property
    def base(self) -> "Config":
        """Of a model that stands on frozen weights, the config of these."""
        model = self.model.model_copy(update={"control_of": None, "adapt": None})
        others = {name: section for name, section in self.conditions.items() if name not in self.pictures}
        return self.model_copy(update={"model": model, "conditions": others})

    @property
    def texts(self) -> dict[str, Text]:
        """Those of `conditions` that are told in words, by their names."""
        return {name: section for name, section in self.conditions.items() if isinstance(section, Text)}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the network sees and the samplers draw: pixels, or what the first stage makes of them."""
        return self.first_stage.latent_shape(self.data.channels, self.data.image_size)

    def _autoencoder_fits(self) -> None:
        if self.first_stage.kind != "pixels":
            raise ValueError(f"an autoencoder is trained on pixels, and first_stage.kind is {self.first_stage.kind}")
        if self.conditions:
            raise ValueError("an autoencoder is told nothing; leave conditions out")
        if self.data.image_size % self.model.downscale:
            raise ValueError(
                f"data.image_size {self.data.image_size} does not halve {len(self.model.multipliers) - 1} times "
                f"(model.multipliers); take a multiple of {self.model.downscale}"
            )
        self.objective.check(self.data.image_size)

    def _muon_fits(self) -> None:
        name, offload = self.model.name, self.deepspeed.offload
        if not isinstance(self.model, DiT | MMDiT):
            raise ValueError(
                f"optim.name muon moves the matrices of transformer blocks, and model.name is {name}; take adamw"
            )
        if getattr(self.model, "adapt", None):
            raise ValueError("optim.name muon cannot go with model.adapt, whose factors are no layers; take adamw")
        if offload != "none":
            raise ValueError(
                f"optim.name muon puts matrices together on the device, and deepspeed.offload {offload} keeps their "
                "parts off it; take offload none, or adamw"
            )

    def _side(self) -> str:
        side, pixels = self.shape[1], self.data.image_size
        return f"data.image_size {pixels}" if side == pixels else f"the side {side} that first_stage makes of {pixels}"

    def _levels_fit(self) -> None:
        halvings = len(self.model.multipliers) - 1
        if self.shape[1] % 2**halvings:
            raise ValueError(
                f"{self._side()} does not halve {halvings} times (model.multipliers); take a multiple of {2**halvings}"
            )
        sides = [self.shape[1] >> i for i in range(halvings + 1)]
        for side in self.model.attention:
            if side not in sides:
                known = ", ".join(str(s) for s in sides)
                raise ValueError(f"model.attention {side} is the side of no level; the levels have {known}")

    def _schedule_can_learn(self) -> None:
        named = "diffusion.schedule learned, a network beside the backbone,"
        if self.base_source:
            key = "adapt" if getattr(self.model, "adapt", None) else "control_of"
            raise ValueError(f"{named} cannot go with model.{key}, whose base had its own; take schedule linear")
        if self.deepspeed.precision == "bf16":
            raise ValueError(
                f"{named} cannot go with deepspeed.precision bf16, which would round its weights; take bf16_autocast"
            )

    def _waves_fit(self, octaves: list[int]) -> None:
        named = f"model.fourier {octaves}, waves of grey levels,"
        if self.first_stage.is_continuous:
            kind = self.first_stage.kind
            raise ValueError(f"{named} cannot go with first_stage.kind {kind}, whose latents have no levels; take []")
        if self.diffusion.process == "edm":
            raise ValueError(
                f"{named} cannot go with diffusion.process edm, whose network sees a picture scaled by 1/σ_data; "
                "take []"
            )
        if self.deepspeed.precision == "bf16":
            raise ValueError(
                f"{named} cannot go with deepspeed.precision bf16, whose rounding is many of them; take bf16_autocast"
            )

    def dump(self) -> str:
        """The whole tree as YAML, defaults filled in; `load` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def identity(config: Config) -> dict[str, Any]:
    """Dotted key → value of everything that makes this run the run it is: what a resumed run may not change.

    Each section says which of its keys are of it. The data set itself is held by its manifest's hash.
    """
    found: dict[str, Any] = {}
    for name in type(config).model_fields:
        section = getattr(config, name)
        if isinstance(section, Section):
            found |= {f"{name}.{key}": value for key, value in _kept(section).items()}
    for name, section in config.conditions.items():
        tree = section.model_dump(mode="json")
        found[f"conditions.{name}"] = {key: tree[key] for key in section.identity_keys() or tree}
    return found | {"data.mix": [[s.name, s.weight] for s in config.data.mix]}  # where they lie may change


def _kept(section: Section) -> dict[str, Any]:
    """The identity keys of a section, and of the sections within it that have such keys."""
    tree = section.model_dump(mode="json")
    parts = {key: getattr(section, key) for key in section.identity_keys()}
    return {key: _kept(part) if isinstance(part, IdentitySection) else tree[key] for key, part in parts.items()}


def architecture(config: Config) -> dict[str, Any]:
    """Dotted key → value of everything that decides which parameters the model has, and their shapes."""
    model = config.model
    keys = {
        "model.name": model.name,
        "model.num_classes": model.num_classes,
        "data.channels": config.shape[0],
        "diffusion.variance": "learned" if getattr(config.diffusion, "variance", "") == "learned_range" else "fixed",
    }
    if config.diffusion.process == "meanflow":
        keys["diffusion.process"] = "meanflow"  # whose model is told two times
    if config.diffusion.process == "ddgan":
        keys["diffusion.latent"] = config.diffusion.latent
    return keys | model.architecture(config.shape[1])
