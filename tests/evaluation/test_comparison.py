"""Comparisons: the numbers are those of evaluations, nothing is drawn twice, and what cannot be compared is refused."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest

from dtrain.cli.comparison import compared_by, steps_in
from dtrain.config import load
from dtrain.errors import UserError
from dtrain.evaluation.comparable import METRICS, Member, check_comparable, named
from dtrain.evaluation.comparison import steps_of
from dtrain.evaluation.comparison_pictures import Asked, check_asked
from dtrain.evaluation.generate import Generator
from dtrain.run import RunDirectory
from tests.command_line import command, failing
from tests.digits import CONFIG, tiny
from tests.ranks import run_ranks, start_ranks

FEW = ("train.steps=8", "train.checkpoint_every=8", "eval.batch_size=12", "eval.num_samples=48")
LEARNS = ("optim.lr=0.01", "optim.warmup_steps=1", "eval.ema=null")  # enough that steps and guidance matter


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """A chain of 50 timesteps, guided, and a flow in 4 Heun steps, of eight training steps each."""
    folder = tmp_path_factory.mktemp("runs")
    of_flow = ("diffusion.process=flow", "eval.sampler=heun", "eval.steps=4")
    configs = [
        tiny(digits, folder, *FEW, *LEARNS, "run.name=chain", "diffusion.timesteps=50", "eval.guidance=2"),
        tiny(digits, folder, *FEW, *LEARNS, "run.name=flow", *of_flow),
    ]
    run_ranks(_train, 1, configs)
    return [str(config.run.path) for config in configs]


def _train(configs):
    from dtrain.training.run_training import train

    for config in configs:
        train(config)


def _counting(pause, *arguments):
    """(exit code, what was written, blocks drawn, whether pictures were drawn) of a command."""
    drawn, draw = [], Generator.draw

    def counted(self, ids, labels, how, *more, **named):
        drawn.append(len(ids))
        time.sleep(pause)
        return draw(self, ids, labels, how, *more, **named)

    Generator.draw = counted
    code, text = command(*arguments)
    return code, text, len([n for n in drawn if n > 1]), 1 in drawn  # how often depends on the machine's speed


def compared(runs, *options, world_size=1, pause=0.0) -> tuple[dict, int]:
    """(the numbers, blocks drawn on all ranks)."""
    told = run_ranks(_counting, world_size, pause, "compare", *runs, "--picture-steps", "own", *options)
    assert [code for code, *_ in told] == [0] * world_size, told
    return numbers(runs), sum(drawn for _, _, drawn, _ in told)


def numbers(runs) -> dict:
    return json.loads((Path(runs[0]) / "comparison" / "comparison.json").read_text())


@pytest.fixture(scope="module")
def found(runs):
    return compared(runs, "--steps", "2,4,60")


def metrics_of(found: dict) -> list[dict[str, float]]:
    return [point["metrics"] for run in found["runs"] for point in run["curve"]]


def test_every_number_is_that_of_an_evaluation_with_the_same_settings(runs, found):
    for run, one in zip(runs, found[0]["runs"], strict=True):
        options = ("--metrics", ",".join(METRICS), "--json")
        ((code, text),) = run_ranks(command, 1, "evaluate", run, *options)
        assert code == 0
        line = json.loads(text.splitlines()[-1])
        assert one["own"]["metrics"] == line["metrics"]
        assert one["context"] == line["context"]
        assert {name.partition("_")[0] for name in line["metrics"]} == {*METRICS}
        page = (Path(runs[0]) / "comparison" / "comparison.html").read_text()
        for value in line["metrics"].values():
            assert f'title="{value!r}"' in page


def test_forward_passes_are_counted_with_those_of_guidance_and_of_a_second_order(found):
    chain, flow = found[0]["runs"]
    assert [(p["steps"], p["evaluations"]) for p in chain["curve"]] == [(2, 4), (4, 8), (5, 10)]
    assert [(p["steps"], p["evaluations"]) for p in flow["curve"]] == [(2, 3), (4, 7), (60, 119)]
    assert (chain["own"]["steps"], flow["own"]["steps"]) == (5, 4)
    assert "60" in chain["left_out"]["60"]
    for point in (*chain["curve"], *flow["curve"]):
        assert point["seconds_per_thousand"] == pytest.approx(1000 / 12 * sorted(point["block_seconds"])[1])
    assert chain["images"] == 8 * 24
    assert len({point["metrics"]["fd_pixels"] for point in chain["curve"] + flow["curve"]}) == 6
    assert chain["training"]["energy_watt_hours"] is None


def test_runs_whose_steps_are_not_free_are_a_single_point():
    """By the shipped configs; a mean flow takes any steps, its own in all columns once."""
    of = {name: load(CONFIG.with_name(f"digits-{name}.yaml")) for name in ("flow", "meanflow", "ddgan", "vae")}
    of["vae"] = compared_by(of["vae"], {})
    found = {name: steps_of(config, [1, 2, 4, 1001]) for name, config in of.items()}
    assert found["flow"] == ([50, 1, 2, 4, 1001], {})
    assert found["meanflow"][0] == [1, 2, 4, 1001]
    assert found["ddgan"][0] == [4]
    assert found["vae"][0] == [50]  # that nobody uses
    steps, refused = steps_of(load(CONFIG), [25, 1001])
    assert steps == [50, 25]
    assert list(refused) == [1001]


def test_a_second_start_draws_nothing_and_another_list_of_steps_what_is_new(runs, found):
    before, drawn = found
    of_metrics, of_times = 4, 4  # blocks of a setting
    assert drawn == 6 * (of_metrics + of_times)
    again, drawn = compared(runs, "--steps", "2,4,60")
    assert drawn == 0
    assert again["runs"] == before["runs"]
    wider, drawn = compared(runs, "--steps", "4,2,3")
    assert drawn == 2 * (of_metrics + of_times)
    assert [[point["steps"] for point in run["curve"]] for run in wider["runs"]] == [[2, 3, 4, 5], [2, 3, 4]]


def test_two_ranks_give_the_numbers_of_one(runs, found, tmp_path):
    there = []
    for run in runs:
        there.append(str(shutil.copytree(run, tmp_path / Path(run).name)))
        (tmp_path / Path(run).name / "sweep.jsonl").unlink()
    shutil.rmtree(tmp_path / "chain" / "comparison")
    twos, drawn = compared(there, "--steps", "2,4,60", world_size=2)
    for own, expected in zip(metrics_of(twos), metrics_of(found[0]), strict=True):
        assert own == pytest.approx(expected, rel=1e-9)  # moments of two ranks are added in another order
    assert drawn == found[1]  # each block of samples on one of the ranks, and times on rank 0 alone
    for own, expected in zip(twos["runs"], found[0]["runs"], strict=True):
        assert [one["steps"] for one in own["pictures"]] == [one["steps"] for one in expected["pictures"]]


def test_a_killed_comparison_goes_on_and_its_page_stays_until_the_new_one_is_whole(runs, tmp_path):
    there = [str(shutil.copytree(run, tmp_path / Path(run).name)) for run in runs]
    for run in there:
        (Path(run) / "sweep.jsonl").unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "chain" / "comparison", ignore_errors=True)
    page, measured = (tmp_path / "out" / name for name in ("comparison.html", "measured.jsonl"))
    page.parent.mkdir()
    page.write_text("of before")
    options = ("--steps", "own", "--picture-steps", "own", "--out", page.parent)
    ((process, _),) = start_ranks(_counting, 1, 0.02, "compare", *there, *options)
    end = time.monotonic() + 60
    while not measured.exists():  # the first run is done
        assert time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    process.join()
    assert page.read_text() == "of before"
    with open(measured, "a") as f:
        f.write('{"key": "torn')
    ((code, text, drawn, _),) = run_ranks(_counting, 1, 0.0, "compare", *there, *options)
    assert code == 0, text
    assert drawn <= 4 + 4  # of the second run: of samples, some of which were kept, and of times
    assert f"open {page}" in text
    assert "<table" in page.read_text()
    lines = measured.read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines if line.endswith("}")}) == 4  # times and a picture a run


def test_what_cannot_be_compared_is_refused_in_one_line(digits, runs, tmp_path):
    from dtrain.data.pack.pack import pack

    chain = runs[0]
    pack("sklearn:digits", tmp_path / "other", holdout=40)
    other = {
        "large": ("data.image_size=16",),
        "held": (f"data.holdout={tmp_path}/other/holdout/manifest.json",),
        "many": ("eval.num_samples=49",),
        "uniform": ("eval.labels=uniform",),
        "features": ("eval.features=effnet_lite0",),
    }
    for name, overrides in other.items():
        config = tiny(digits, tmp_path, *FEW, f"run.name={name}", *overrides)
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(config.dump())
    first = Member("chain", RunDirectory(chain), RunDirectory(chain).config())
    said = {}
    for name in other:
        run = RunDirectory(tmp_path / name)
        with pytest.raises(UserError) as told:
            check_comparable([first, Member(name, run, run.config())])
        said[name] = str(told.value)
    begin = {name: f"{name} cannot be compared with chain: its " for name in other}
    assert all(line.startswith(begin[name]) for name, line in said.items()), said
    assert "images have 16 × 16 × 1, the other's 8 × 8 × 1" in said["large"]
    assert re.search(r"held-out images are \S+other/holdout\S+ \(\w{12}\), the other's", said["held"])
    assert said["many"].endswith("number of samples is 49, the other's 48; name it for all with --n")
    assert "eval.labels is uniform, the other's data" in said["uniform"]
    assert said["features"].endswith("the other's pixels; name them for all with --features")
    assert failing("compare", chain, tmp_path / "large", world_size=2) == said["large"]
    assert not (tmp_path / "large" / "sweep.jsonl").exists()
    with pytest.raises(UserError, match="a comparison is of two runs or more"):
        named([chain, chain])
    with pytest.raises(UserError, match="no run at "):
        named([chain, str(tmp_path / "none")])
    with pytest.raises(UserError, match=r"--steps 2,x: numbers of steps such as 1,2,4"):
        steps_in("2,x", "--steps")
    assert failing("compare", *runs, "--label", 10) == "--label 10: the model of chain has 10 classes, counted from 0"
    with pytest.raises(UserError, match="--prompt 'x': none of these runs is told in words"):
        check_asked(Asked(prompt="x"), [first])
    (tmp_path / "file").write_text("")
    assert failing("compare", *runs, "--out", tmp_path / "file", "--steps", "own").startswith("cannot write ")


def test_pictures_are_those_of_sampling_with_the_same_noise_in_every_column(runs, tmp_path):
    """Drawn by hand from the checkpoint, at each number of steps that a run can take; another start draws none anew."""
    options = ("--steps", "own", "--picture-steps", "2,60", "--label", 3, "--out", tmp_path)
    for expected in (True, False):
        ((code, text, _, pictures),) = run_ranks(_counting, 1, 0.0, "compare", *runs, *options)
        assert code == 0, text
        assert pictures == expected
    page = (tmp_path / "comparison.html").read_text()
    for run, steps in zip(runs, ([5, 2], [4, 2, 60]), strict=True):
        ((pictures, levels),) = run_ranks(_by_hand, 1, run, steps, 3)
        for png in pictures:
            assert f'src="data:image/png;base64,{png}"' in page
        assert len(set(levels)) == len(steps)
    assert page.count("data:image/png") == 5  # the chain takes no 60 steps of 50


def _by_hand(run, steps, label):
    import torch

    from dtrain.evaluation.combinations import configured
    from dtrain.evaluation.comparison_pictures import png
    from dtrain.evaluation.generate import GRID_IDS
    from dtrain.evaluation.opened import open_generator
    from dtrain.run import RunDirectory

    directory = RunDirectory(run)
    config = directory.config()
    generator = open_generator(directory, config, torch.device("cpu")).generator
    images = [
        generator.draw([GRID_IDS], torch.tensor([label]), configured(config, {"steps": s}).eval)[0] for s in steps
    ]
    return [png(image) for image in images], [image.sum().item() for image in images]
