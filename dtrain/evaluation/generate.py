"""Images from a model, each a pure function of (seed, id): the same on any rank, in any order of blocks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Protocol

import torch

from dtrain import faults
from dtrain.batch import Condition
from dtrain.conditions.build import NOTHING, Conditions, Said
from dtrain.conditions.build import build as build_conditions
from dtrain.config import Config, Eval
from dtrain.device_draws import normals_on
from dtrain.diffusion.denoising_gan import DenoisingGAN
from dtrain.diffusion.gamma import GammaDiffusion
from dtrain.diffusion.guidance import guided
from dtrain.diffusion.projection import projection
from dtrain.diffusion.samplers import network_evaluations, sample, times
from dtrain.diffusion.solvers import Churn, Denoiser
from dtrain.errors import NotFinite, UserError
from dtrain.evaluation.guide import Guide, open_guide
from dtrain.evaluation.start import Start
from dtrain.first_stage.pixels import FirstStage, Pixels
from dtrain.randomness import Draws, Purpose

MOST_NAMED = 8  # ids in a message
GRID_IDS = 2**40  # ids of samples to look at begin here, apart from those that metrics are computed on


class OnProgress(Protocol):
    """What long work calls: `done` of `of` parts of it, at present `what`."""

    def __call__(self, done: int, of: int, what: str | None = None) -> None: ...


def which_not_finite(rows: torch.Tensor) -> list[int]:
    """The rows of (n, …) with a value that is not finite, counted from 0."""
    return (~rows.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()


def named(ids: list[int]) -> str:
    """The first of these ids, for a message; those of a grid count from its first picture."""
    shown = [str(i) if i < GRID_IDS else f"{i - GRID_IDS} of the grid" for i in ids[:MOST_NAMED]]
    return ", ".join([*shown, *(["…"] if len(ids) > MOST_NAMED else [])])


def encoded(first_stage: FirstStage, pixels: torch.Tensor, first: int) -> torch.Tensor:
    """x_0 (n, C, H, W) of held-out pictures in [−1, 1], numbered from `first`. Raises NotFinite with their numbers."""
    x_0 = first_stage.encode(pixels)
    if bad := [first + row for row in which_not_finite(x_0)]:
        raise NotFinite(
            f"the first stage gives no finite latent of {len(bad)} held-out pictures (numbers {named(bad)})"
        )
    return x_0


def quiet(done: int, of: int, what: str | None = None) -> None:
    """Shows nothing."""


@dataclass(frozen=True)
class Generator:
    """A plain model (no DeepSpeed, no collective) with its process, ready to draw images."""

    model: torch.nn.Module
    process: object
    shape: tuple[int, int, int]  # (C, H, W) of x_0
    conditions: Conditions
    first_stage: FirstStage
    device: torch.device
    noise: int  # by which generator it is drawn, `run.generator`
    guide: Guide | None = None  # what guidance leads away from; None: the model's own answer to nothing
    reconstructs = False  # its images are new ones

    @classmethod
    def of(
        cls,
        model: torch.nn.Module,
        process,
        config: Config,
        device: torch.device,
        first_stage: FirstStage = Pixels(),  # noqa: B008 (it has no state)
    ) -> "Generator":
        """With the weaker model that the config names. Raises UserError where that cannot be read."""
        assert config.first_stage.kind == "pixels" or not isinstance(first_stage, Pixels)
        conditions = build_conditions(config)
        guide = open_guide(config, device)
        return cls(model, process, config.shape, conditions, first_stage, device, config.run.generator, guide)

    def evaluations(self, how: Eval, start: Start | None = None) -> int:
        """How often the network is asked for a block of images, which begin at pictures where there is a start."""
        of_start = (None, 1) if start is None else (start.last(how.steps), start.repeats)
        return network_evaluations(self.process, how.sampler, how.steps, how.spacing, *of_start)

    @torch.inference_mode()
    def draw(
        self,
        ids: list[int],
        labels: torch.Tensor,
        how: Eval,
        on_evaluation: Callable[[], None] = lambda: None,
        said: Said = NOTHING,
        start: Start | None = None,
    ) -> torch.Tensor:
        """uint8 (n, channels, image_size, image_size) of what `x_0` gives."""
        drawn = self.first_stage.decode(self.x_0(ids, labels, how, on_evaluation, said, start)).cpu()
        return drawn if start is None else start.kept(drawn)

    @torch.inference_mode()
    def x_0(
        self,
        ids: list[int],
        labels: torch.Tensor,
        how: Eval,
        on_evaluation: Callable[[], None] = lambda: None,
        said: Said = NOTHING,
        start: Start | None = None,
    ) -> torch.Tensor:
        """float32 (n, C, H, W) as the network sees it, for ids (n) and int64 labels (n,), as `how` says.

        on_evaluation: called each time that the model has answered. said: n captions of each condition that has some;
        one without is told nothing. start: the n pictures that they begin at, in the place of noise.

        Batches of another shape round differently (about 1e-6), so callers that must agree draw equal blocks of ids.
        Raises NotFinite, with the ids, where x_0 is not.
        """
        faults.at("eval:draw")
        normals = self.normals(how.seed, ids)
        latents = None
        if isinstance(self.process, DenoisingGAN):
            latents = partial(normals, Purpose.SAMPLE_LATENT, shape=(self.process.latent,))
        denoiser = self.denoiser(self.condition(ids, labels, said), how, on_evaluation, latents)
        last = None if start is None else start.last(how.steps)
        first = times(self.process, how.sampler, how.steps, how.spacing, last)[0]
        x_T = self._noise(normals(Purpose.SAMPLE_NOISE), first, start)
        if start is not None:
            known = encoded(self.first_stage, start.pixels(self.device), 0)
            if last < how.steps:
                x_T = self.process.noised(known, x_T, first)
            denoiser = start.keeping(denoiser, known)
        x_0 = sample(
            denoiser,
            self.process,
            x_T,
            how.sampler,
            how.steps,
            how.spacing,
            how.eta,
            how.clip,
            lambda step: normals(Purpose.SAMPLE_STEP_NOISE, step),
            how.sde_noise,
            how.guidance_renoise,
            Churn(how.churn, how.churn_min, how.churn_max or math.inf, how.churn_noise) if how.churn else None,
            last,
            1 if start is None else start.repeats,
        )
        if bad := [ids[row] for row in which_not_finite(x_0)]:
            raise NotFinite(
                f"x_0 is not finite in {len(bad)} of {len(ids)} samples drawn together (ids {named(bad)}): the weights "
                "have diverged, or guidance or precision overflow; take an earlier checkpoint or other settings"
            )
        return x_0

    def _noise(self, normals: torch.Tensor, first: float, start: Start | None) -> torch.Tensor:
        """ε of the first time, in the dtype of these standard normals: themselves, but of gamma noise."""
        if not isinstance(self.process, GammaDiffusion):
            return normals
        if start is not None and start.repeats > 1:
            raise UserError(
                f"repeats {start.repeats} noises back with normal noise, and diffusion.noise is gamma; take repeats 1"
            )
        return self.process.noise(normals, first).to(normals.dtype)

    def normals(self, seed: int, ids: Sequence[int]) -> Callable[..., torch.Tensor]:
        """(purpose, sub=0, shape=(C, H, W)) → standard normals of these ids, float32 (n, *shape), on its device."""
        draws, keys = Draws(seed, self.noise), torch.tensor(ids, device=self.device)

        def drawn(purpose: Purpose, sub: int = 0, shape: tuple[int, ...] = self.shape) -> torch.Tensor:
            return normals_on(draws, purpose, keys, shape, sub)

        return drawn

    def denoiser(
        self,
        condition: Condition,
        how: Eval,
        on_evaluation: Callable[[], None] = lambda: None,
        latents: Callable[[int], torch.Tensor] | None = None,
    ) -> Denoiser:
        """What a sampler asks for rows of this condition: the model's output with guidance and precision as `how` says.

        on_evaluation: called each time that the model has answered. latents: z (n, Z) of each call, counted from 0, for
        a `DenoisingGAN`.
        """
        self.model.eval()
        model, condition = self._guided(how), self.conditions.as_sampled(condition, how)
        calls = count()

        def answered(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            if latents is not None:
                t = self.process.told(t, latents(next(calls)))
            answer = model(x_t, t, **condition)
            on_evaluation()
            return answer

        return answered

    def condition(self, ids: list[int], labels: torch.Tensor, said: Said = NOTHING) -> Condition:
        """What the samples `ids` (n), of classes `labels` int64 (n,), are told, on the model's device."""
        told = self.conditions.of_ids(ids, labels.to(self.device), said)
        return {name: value.to(self.device) for name, value in told.items()}

    def _network(self, model: torch.nn.Module, precision: str, *inputs: torch.Tensor, **condition) -> torch.Tensor:
        """A model's answer; under bf16 in float32 again, so that guidance and sampler round nothing."""
        if precision == "fp32":
            return model(*inputs, **condition)
        with torch.autocast(self.device.type, torch.bfloat16):
            return model(*inputs, **condition).float()

    def _guided(self, how: Eval):
        return guided(
            partial(self._network, self.model, how.precision),
            how.guidance,
            partial(self.conditions.null, negative=how.negative_prompt, pictures=_without_pictures(how))
            if self.conditions
            else None,
            channels=3 if how.guidance_channels == "first_3" else None,
            interval=how.guidance_interval,
            last_time=self.process.last_time,
            rescale=how.guidance_rescale,
            project=projection(self.process, how.guidance_orthogonal, how.guidance_norm, how.guidance_momentum),
            weak=None if self.guide is None else partial(self._network, self.guide.module, how.precision),
            renoise=how.guidance_renoise,
        )


def _without_pictures(how: Eval) -> bool:
    """Whether guidance leads away from no picture too. Of each condition apart, it does at theirs."""
    return how.guess_mode or isinstance(how.guidance, str)
