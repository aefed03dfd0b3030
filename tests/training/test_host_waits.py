"""A step makes the host wait for the device once, for the gradient's norm: held here by the CPU, and by a GPU."""

import pytest
import torch

from dtrain.batch import split
from dtrain.conditions.classes import Classes
from dtrain.config import Optim, load
from dtrain.config.diffusion import DenoisingGAN as DenoisingGANSection
from dtrain.config.distillation import Distillation as Section
from dtrain.diffusion.denoising_gan import DenoisingGAN, chain_of
from dtrain.diffusion.edm import EDM
from dtrain.diffusion.flow import RectifiedFlow
from dtrain.diffusion.gamma import GammaDiffusion
from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.diffusion.guidance import guided
from dtrain.diffusion.mean_flow import MeanFlow
from dtrain.diffusion.samplers import sample
from dtrain.diffusion.schedule import linear
from dtrain.diffusion.times import LogitNormal, SecondMoment
from dtrain.diffusion.variational import VariationalDiffusion
from dtrain.objectives.denoising import Denoising
from dtrain.objectives.denoising_gan import AgainstCritic
from dtrain.objectives.distillation import Distillation
from dtrain.objectives.gamma import GammaDenoising
from dtrain.objectives.mean_flow import BuiltIn, MeanVelocity
from dtrain.objectives.objective import Frozen
from dtrain.objectives.uncertainty import UncertainDenoising
from dtrain.objectives.variational import VariationalBound
from dtrain.position import Position
from dtrain.training.record.levels import StepLosses, named_sums
from dtrain.training.reduction import StepReduction
from tests.digits import CONFIG
from tests.host_waits import HostWaits
from tests.ranks import run_ranks

META = torch.device("meta")
SHAPES = [(0, "fp32"), (0, "bf16_autocast"), (1, "fp32"), (2, "fp32"), (2, "bf16"), (2, "bf16_autocast"), (3, "fp32")]


def batch_on(device: torch.device, rows: int = 8) -> dict[str, torch.Tensor]:
    x = torch.zeros(rows, 1, 8, 8, device=device)
    time, whole = (torch.zeros(rows, dtype=dtype, device=device) for dtype in (torch.float64, torch.int64))
    further = dict.fromkeys(("drop", "other_time", "span"), time) | dict.fromkeys(("step_noise", "reverse_noise"), x)
    further["latent"] = torch.zeros(rows, 5, device=device)
    return {"k": whole, "label": whole, "x_0": x, "noise": x, "time": time, **further}


def add_up(objective: Denoising, device: torch.device) -> None:
    """All of a step but the networks and the optimizer."""
    condition, seen = Classes(10, 0.1), StepLosses(objective, device)
    reduction = StepReduction(0, 1, 8, named_sums(objective))
    for part in split(batch_on(device), 4):
        told = condition.dropped(condition.given(part), part)
        networks = {"backbone": lambda x, t, y: 0.5 * x, "schedule": lambda t: (t, torch.ones_like(t))}
        networks["uncertainty"] = lambda t: 0.1 * t
        networks["critic"] = lambda x, x_t, t, y: x.square().flatten(1).sum(1)
        for turn in objective.turns:
            seen.add(turn, part, objective.losses(turn, networks, part, told, Position()))
    seen.observe(1)
    none = dict.fromkeys(("stop", "written", "failed", "no_room"), False)
    times = {"step_seconds": 0.1, "data_seconds": 0.0}
    reduction.start(Position(1, 8), seen.sum, 0.5, seen.by_level(), **none, **times, named=seen.named)


def distilled(process) -> Distillation:
    section = Section(kind="distillation", teacher="x", steps=4, guidance=2.0)
    teacher = Frozen(lambda x, t, y: 0.25 * x, "its own")
    objective = Distillation(Denoising(process), section, Classes(10, 0.1).null, lambda device: teacher)
    objective.open(META)
    return objective


def guided_mean_flow() -> MeanVelocity:
    return MeanVelocity(MeanFlow(), LogitNormal(), 0.25, "data", 1.0, BuiltIn(2.0, 0.5, 0, Classes(10, 0.1).null))


def against_critic() -> AgainstCritic:
    section = DenoisingGANSection(process="ddgan", latent=5)
    return AgainstCritic(DenoisingGAN(chain_of(4), latent=5), section, (1, 8, 8), 10, Optim())


OBJECTIVES = {
    "against a critic": against_critic,
    "uniform": lambda: Denoising(GaussianDiffusion(linear(50)), min_snr_gamma=5.0),
    "importance": lambda: Denoising(GaussianDiffusion(linear(50)), min_snr_gamma=5.0, times=SecondMoment(50)),
    "edm, uncertain": lambda: UncertainDenoising(EDM()),
    "gamma": lambda: GammaDenoising(GammaDiffusion(linear(50))),
    "guidance built in": guided_mean_flow,
    "distillation of a flow": lambda: distilled(RectifiedFlow()),
    "distillation": lambda: distilled(GaussianDiffusion(linear(50), "v")),
    "variational": lambda: VariationalBound(VariationalDiffusion(), 1.0),
    "variational chain": lambda: VariationalBound(VariationalDiffusion(timesteps=9), 1.0),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_what_is_reported_of_them_never_make_the_host_wait(name):
    objective = OBJECTIVES[name]()
    add_up(objective, META)  # takes the tables there
    with HostWaits() as waits:
        add_up(objective, META)
    assert waits.found == []


def test_an_interval_of_guidance_is_found_without_waiting_for_the_timesteps():
    asked = []

    def model(x, t, y):
        asked.append(len(x))
        return x * 0.5

    def null(condition):
        return {"y": torch.full_like(condition["y"], 10)}

    process = GaussianDiffusion(linear(1000))
    x, y = torch.zeros(4, 1, 8, 8, device=META), torch.zeros(4, dtype=torch.int64, device=META)
    model_in_part = guided(model, 2.0, null, interval=(0.2, 0.6), last_time=process.last_time)
    with HostWaits() as waits:
        sample(lambda x, t: model_in_part(x, t, y=y), process, x, "ddim", 10)
    assert waits.found == []
    assert asked == [4, 4, 4, 4, 8, 8, 8, 8, 4, 4]


def config_of(stage: int, precision: str):
    small = ("model.depth=1", "model.width=32", "model.heads=2", "data.batch_size=8")
    return load(CONFIG, [*small, f"deepspeed.zero_stage={stage}", f"deepspeed.precision={precision}"])


def steps_of(stage: int, precision: str, micro_batches: int) -> list[list[str]]:
    from dtrain.training.player import Player

    config = config_of(stage, precision)
    player = Player.of(config, 8 // micro_batches)
    x, t, y = (
        torch.ones(8 // micro_batches, 1, 8, 8),
        torch.arange(8 // micro_batches),
        torch.arange(8 // micro_batches),
    )
    found = []
    for _ in range(2):
        with HostWaits(on_cpu=True, host=[state["step"] for state in player.optimizer.state.values()]) as waits:
            for _ in range(micro_batches):
                player.backward((player(x, t, y).float() - x).square().mean())
            player.step(1e-4)
        found.append(waits.found)
    return found


@pytest.mark.parametrize(("stage", "precision"), SHAPES)
def test_a_step_waits_for_the_norm_and_for_nothing_else(stage, precision):
    first, second = run_ranks(steps_of, 1, stage, precision, 2)[0]
    assert second == ["aten._to_copy" if stage else "aten._local_scalar_dense"]
    assert stage == 3 or first == second  # at stage 3 the first step notes in which order the weights are asked for


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("stage", "precision"), SHAPES[:-1])
def test_a_gpu_says_the_same(stage, precision):
    assert run_ranks(_on_a_gpu, 1, stage, precision)[0] == 1


def _on_a_gpu(stage: int, precision: str) -> int:
    """How often the host waited in a step that torch watches; all but the optimizer's part must never."""
    import warnings

    from dtrain import distributed
    from dtrain.training.player import Player

    device, config = distributed.device(), config_of(stage, precision)
    player = Player.of(config, 8)
    objective = Denoising(GaussianDiffusion(linear(50)), times=SecondMoment(50))
    reduction = StepReduction(0, 1, 8, named_sums(objective))
    for number in range(3):
        watched = number == 2  # what comes once is done
        part, seen = batch_on(device), StepLosses(objective, device)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if watched else "default")
        condition = {"y": part["label"]}
        losses = objective.losses("main", {"backbone": player.network("backbone")}, part, condition, Position())
        player.backward(losses.rows.mean())
        seen.add("main", part, losses)
        torch.cuda.set_sync_debug_mode("warn" if watched else "default")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            norm = player.step(1e-4)
        torch.cuda.set_sync_debug_mode("error" if watched else "default")
        seen.observe(1)
        none = dict.fromkeys(("stop", "written", "failed", "no_room"), False)
        seconds = {"step_seconds": 0.1, "data_seconds": 0.0}
        reduction.start(Position(1, 8), seen.sum, norm, seen.by_level(), **none, **seconds, named=seen.named)
        sums = reduction.finish()
        torch.cuda.set_sync_debug_mode("default")
        assert sums.loss == pytest.approx(float(losses.rows.mean()), rel=1e-6)
    return sum("synchroniz" in str(one.message) for one in caught)
