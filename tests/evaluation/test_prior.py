"""Pictures that an autoencoder decodes from N(0, I): their law, the same bytes on any ranks, what refuses them."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import dtrain
from dtrain.checkpoint.export import load_weights, open_checkpoint
from dtrain.errors import UserError
from dtrain.evaluation.prior import Prior
from dtrain.models.build import allocate
from dtrain.randomness import Draws, Purpose
from dtrain.run import RunDirectory
from dtrain.tracking.journal import read
from dtrain.training.check import warnings
from dtrain.training.record.summary import summary
from tests.command_line import command
from tests.digits import tiny
from tests.ranks import run_ranks
from tests.training.runs import copied, train

# Eight pixels a side become one place.
VAE = (
    "model={name: kl_autoencoder, width: 8, multipliers: [1, 1, 1, 1], res_blocks: 1, latent_channels: 6}",
    "objective={kind: autoencoding, reconstruction: l2, kl_weight: 0.1}",
)
PRIOR = (*VAE, "eval.images=prior", "eval.steps=50", "eval.features=pixels")
EVALUATED = ("eval.metrics=[fd,precision,recall]", "eval.every=3", "train.checkpoint_every=3")


class Linear:
    """decoder(z) = W z + b: for z ~ N(0, I) the pictures are N(b, W Wᵀ)."""

    latent_channels, downscale = 3, 4

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(16, 3, generator=generator) * 0.1
        self.bias = torch.linspace(-0.2, 0.2, 16)

    def eval(self):
        return self

    def decode(self, z):
        return (z.flatten(1) @ self.weight.T + self.bias).view(-1, 1, 4, 4)


def test_a_linear_decoders_pictures_have_the_mean_and_covariance_of_its_prior(digits, tmp_path):
    config = tiny(digits, tmp_path, *PRIOR, "data.image_size=4", "model.multipliers=[1,1,1]")
    model, n = Linear(), 40_000
    prior = Prior.of(model, config, torch.device("cpu"))
    assert prior.shape == (3, 1, 1)
    drawn = prior.draw(list(range(n)), torch.zeros(n, dtype=torch.int64), config.eval)
    pixels = drawn.flatten(1).double().numpy() / 127.5 - 1
    weight, bias = model.weight.double().numpy(), model.bias.double().numpy()
    levels = np.eye(16) / 12 / 127.5**2  # what rounding to levels adds
    cov = weight @ weight.T + levels
    mean_error = np.sqrt(np.diag(cov) / n)
    cov_error = np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / n)
    assert (np.abs(pixels.mean(0) - bias) < 5 * mean_error).all()
    assert (np.abs(np.cov(pixels.T) - cov) < 5 * cov_error).all()
    assert cov_error.max() < 0.01 * cov.max()


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """Trained for three steps on two ranks, then for three more."""
    folder = tmp_path_factory.mktemp("prior")
    for steps in (3, 6):
        config = tiny(digits, folder, *PRIOR, *EVALUATED, f"train.steps={steps}")
        run_ranks(train, 2, config)
    return config


def evaluations(config):
    return [line for line in read(config.run.path / "journal.jsonl") if line["event"] == "eval"]


def by_hand(config, n, seed=0):
    """uint8 (n, 8, 8, 1), each decoded from the numbers of its id, in blocks of eval.batch_size."""
    model = load_weights(open_checkpoint(RunDirectory(config.run.path)), allocate(config), "ema_0").eval()
    draws, blocks = Draws(seed, config.run.generator), []
    for first in range(0, n, config.eval.batch_size):
        ids = range(first, min(first + config.eval.batch_size, n))
        z = np.stack([draws.normal(Purpose.SAMPLE_NOISE, i, (6, 1, 1)) for i in ids])
        with torch.no_grad():
            blocks.append(model.decode(torch.from_numpy(z)))
    levels = ((torch.cat(blocks).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).numpy()


def drawn_by_command(config, out, *more):
    code, said = command("sample", str(config.run.path), "-n", 30, "--out", str(out), *more)
    assert code == 0, said
    return out.read_bytes() if out.exists() else b""


def test_samples_are_decodings_of_each_ids_own_numbers_with_the_same_bytes_on_any_ranks(run, tmp_path):
    (one,) = run_ranks(drawn_by_command, 1, run, tmp_path / "one.npz", "--seed", 5)
    run_ranks(drawn_by_command, 2, run, tmp_path / "two.npz", "--seed", 5)
    assert one == (tmp_path / "two.npz").read_bytes()
    with np.load(tmp_path / "one.npz") as kept:
        images = kept["images"]
    assert images.std() > 0
    np.testing.assert_array_equal(images, by_hand(run, 30, seed=5))
    np.testing.assert_array_equal(images, dtrain.load(run.run.path).sample(30, seed=5))


def test_a_training_is_evaluated_by_them_with_the_ordinary_names_and_no_settings_of_a_sampler(run):
    first, last = evaluations(run)
    assert (first["step"], last["step"]) == (3, 6)
    assert last["metrics"].keys() == {"fd_pixels", "precision_pixels", "recall_pixels", "seconds"}
    assert last["context"]["images"] == "prior"
    assert last["context"].keys() & {"sampler", "steps", "eta", "guidance"} == set()
    assert "differs" not in last["context"]
    assert last["metrics"]["fd_pixels"] == pytest.approx(distance(run, by_hand(run, 48)), rel=1e-6)
    with Image.open(run.run.path / "samples" / "step-00000006.png") as picture:
        assert picture.size == (4 * (8 * 9 - 1), 4 * (8 * 9 - 1))
    assert "fd_pixels of ema_0, 48 samples\n" in summary(run.run.path)
    events = {line["event"] for line in read(run.run.path / "journal.jsonl")}
    assert "validation" not in events  # an autoencoder has no noise levels
    for ranks in (1, 3):
        code, said = run_ranks(command, ranks, "evaluate", str(run.run.path), "--json")[0]
        assert code == 0, said
        again = json.loads(said.splitlines()[-1])
        assert again["metrics"] == pytest.approx({k: last["metrics"][k] for k in again["metrics"]}, rel=1e-9)
        assert "differs" not in again["context"]


def distance(config, images):
    """Fréchet distance of pixels to the held-out digits: tr √(Σ_a Σ_b) is the nuclear norm of A Bᵀ, Σ_a = Aᵀ A."""
    from dtrain.data.fields.samples import read_split
    from dtrain.data.shards.manifest import load_holdout

    split = load_holdout(config.data)
    held_out, _ = read_split(split, split.place, 8, 1, 0, split.samples)
    a, b = (x.reshape(len(x), -1) / 127.5 - 1 for x in (images.astype(float), held_out.double().numpy()))
    centred = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    root = np.linalg.norm(centred[0] @ centred[1].T, "nuc")
    return np.square(a.mean(0) - b.mean(0)).sum() + sum(np.square(x).sum() for x in centred) - 2 * root


def test_a_resumed_training_evaluates_as_one_that_was_never_stopped(run, digits, tmp_path):
    whole = tiny(digits, tmp_path, *PRIOR, *EVALUATED, "train.steps=6")
    run_ranks(train, 2, whole)
    for one, other in zip(evaluations(whole), evaluations(run), strict=True):
        assert one["metrics"] | {"seconds": 0} == other["metrics"] | {"seconds": 0}  # to the last digit


def test_a_run_is_evaluated_either_way_and_each_is_told_from_the_other(run):
    code, said = run_ranks(command, 1, "evaluate", str(run.run.path), "--images", "reconstructions", "--json")[0]
    assert code == 0, said
    given_back = json.loads(said.splitlines()[-1])
    assert {"rfd_pixels", "psnr"} <= given_back["metrics"].keys()
    assert given_back["context"]["differs"] == {"images": "reconstructions"}
    code, said = run_ranks(command, 1, "sweep", str(run.run.path), "--seeds", "0,1", "--metrics", "fd")[0]
    assert code == 0, said
    assert "best fd_pixels" in said
    of_both = ["sweep", str(run.run.path), "--checkpoints", "all", "--metrics", "fd", "--images", "reconstructions"]
    code, said = run_ranks(command, 1, *of_both)[0]
    assert code == 0, said
    assert "best rfd_pixels" in said


def test_a_report_says_that_it_is_an_autoencoder_and_names_no_sampler(run, tmp_path):
    of_others = shutil.ignore_patterns("journal-eval-*", "sweep*")  # evaluations that tests made otherwise
    shutil.copytree(run.run.path, tmp_path / "tiny", ignore=of_others)
    code, said = run_ranks(command, 1, "report", str(tmp_path / "tiny"), "--out", str(tmp_path / "page.html"))[0]
    assert code == 0, said
    page = (tmp_path / "page.html").read_text()
    assert "autoencoder width 8 · images 8 × 8 × 1 · autoencoding, l2, KL weight 0.1 · " in page
    shown = re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)  # which has the whole config
    assert "ddim" not in shown
    assert "50 steps" not in shown


def test_it_stands_beside_diffusion_at_one_evaluation_of_a_network(run, digits, finished_run, tmp_path):
    chain = copied(finished_run, digits, tmp_path)
    code, said = run_ranks(command, 1, "compare", str(chain.run.path), str(run.run.path), "--steps", "own")[0]
    assert code == 0, said
    numbers = json.loads((chain.run.path / "comparison" / "comparison.json").read_text())
    of_chain, of_prior = (one["own"] for one in numbers["runs"])
    assert (of_chain["evaluations"], of_prior["evaluations"]) == (5, 1)
    metrics = evaluations(run)[-1]["metrics"]
    assert of_prior["metrics"]["fd_pixels"] == pytest.approx(metrics["fd_pixels"], rel=1e-9)
    code, said = run_ranks(command, 1, "compare", str(chain.run.path), str(run.run.path), "--steps", "1,2")[0]
    assert code == 0, said  # the steps of a sampler are left to the run that has one
    numbers = json.loads((chain.run.path / "comparison" / "comparison.json").read_text())
    assert [len(one["curve"]) for one in numbers["runs"]] == [3, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pairs", "RUN", "DIR", "-n", "4"], "is an autoencoder, which walks from no noise to pictures"),
        (["invert", "RUN", "PICTURE"], "is an autoencoder, which walks from no noise to pictures"),
        (["sample", "RUN", "--from", "PICTURE"], "is an autoencoder, which walks from no noise to pictures"),
        (["sample", "RUN", "--prompt", "a three"], "this model is not told in words"),
        (["sample", "RUN", "--steps", "10"], "eval.steps 10 has no effect on eval.images prior"),
        (["sample", "RUN", "--images", "reconstructions"], "with eval.images prior (--images prior) it decodes"),
        (["sweep", "RUN", "--steps", "10,20"], "eval.steps 10 has no effect on eval.images prior"),
        (["evaluate", "RUN", "--metrics", "bpd"], "bpd is of a diffusion process"),
    ],
)
def test_commands_that_need_a_process_refuse_it_in_one_line(run, tmp_path, arguments, message):
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    places = {"RUN": str(run.run.path), "DIR": str(tmp_path / "pairs"), "PICTURE": str(tmp_path / "black.png")}
    ((code, said),) = run_ranks(command, 1, *(places.get(a, a) for a in arguments))
    assert code == 2
    assert message in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.images=prior"], "objective.kind is denoising, whose images eval.sampler draws; leave it out"),
        ([*VAE, "eval.images=prior"], "eval.steps 5 has no effect on eval.images prior, where the decoder is asked"),
        ([*PRIOR, "eval.sampler=heun"], "eval.sampler heun has no effect on eval.images prior"),
        ([*PRIOR, "eval.clip=true"], "eval.clip True has no effect on eval.images prior"),
        ([*PRIOR, "diffusion.process=flow", "eval.sampler=heun"], "eval.sampler heun has no effect"),
        ([*VAE, "eval.metrics=[bpd]"], "eval.metrics bpd is of a diffusion process, and objective.kind autoencoding"),
        ([*PRIOR, "train.keep_best=rfd_pixels"], None),
    ],
)
def test_settings_without_an_effect_are_refused_in_one_line(digits, tmp_path, overrides, message):
    if message is None:
        from dtrain.evaluation.requirements import check_best

        config = tiny(digits, tmp_path, *overrides)
        with pytest.raises(UserError, match=r"gives train\.keep_best rfd_pixels, but fd_pixels"):
            check_best(config)
        return
    with pytest.raises(UserError, match=re.escape(message)) as error:
        tiny(digits, tmp_path, *overrides)
    assert "\n" not in str(error.value)


def test_a_process_with_a_sampler_of_its_own_is_no_obstacle(digits, tmp_path):
    assert tiny(digits, tmp_path, *PRIOR, "diffusion.process=flow").eval.images == "prior"


def test_a_tiny_weight_of_the_divergence_is_said_once(digits, tmp_path):
    tiny_weight, whole = (
        [line for line in warnings(tiny(digits, tmp_path, *PRIOR, f"objective.kl_weight={w}")) if "kl_weight" in line]
        for w in (1e-6, 0.1)
    )
    assert len(tiny_weight) == 1
    assert tiny_weight[0].startswith("objective.kl_weight 1e-06: it hardly draws the latents to N(0, I)")
    assert whole == []
