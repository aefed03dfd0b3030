"""A whole evaluation: on 1 and 2 ranks, killed and started again, with every metric."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from dtrain.config import Eval
from dtrain.errors import SharedError, UserError
from dtrain.evaluation.evaluate import blocks_of_a_rank, evaluate, labels_of, scratch_of
from dtrain.evaluation.generate import Generator
from dtrain.evaluation.opened import open_generator
from dtrain.evaluation.reference import Reference
from dtrain.evaluation.scratch import Scratch
from dtrain.run import RunDirectory
from dtrain.tracking.best import training_evaluations
from tests.command_line import command
from tests.digits import tiny
from tests.ranks import run_ranks, start_ranks
from tests.training.runs import copied, train

METRICS = "eval.metrics=[fd,fd_infinity,kid,precision,recall,density,coverage,memorisation]"


@pytest.fixture(scope="module")
def trained(digits, finished_run, tmp_path_factory):
    return copied(finished_run, digits, tmp_path_factory.mktemp("runs"), METRICS, "eval.num_samples=260")


def _evaluate(config, pause=0.0, keep=False):
    """(metrics, blocks drawn by this rank, images in scratch by first id); `pause` seconds after each block."""
    run, device = RunDirectory(config.run.path), torch.device("cpu")
    opened = open_generator(run, config, device)
    drawn = []
    draw = Generator.draw

    def slowly(self, ids, labels, how, *more):
        drawn.append(ids[0])
        time.sleep(pause)
        return draw(self, ids, labels, how, *more)

    Generator.draw = slowly
    reference = Reference.open(config, device)
    scratch = scratch_of(run, config.eval, opened.checkpoint, reference)
    metrics, _ = evaluate(opened.generator, config, reference, scratch=scratch)
    torch.distributed.barrier()
    images = {}
    if torch.distributed.get_rank() == 0:
        images = {path.name: np.load(path) for path in sorted(scratch.path.glob("block-*.npy"))}
        if not keep:
            scratch.remove()
    return metrics, drawn, images


def test_an_evaluation_is_the_same_on_one_and_two_ranks_and_after_being_killed(trained):
    ((alone, drawn, images),) = run_ranks(_evaluate, 1, trained)
    assert drawn == list(range(0, 260, 12))
    assert set(alone) == {
        *("fd_pixels", "fd_infinity_pixels", "fd_infinity_pixels_error"),
        *("kid_pixels", "kid_pixels_std", "precision_pixels", "recall_pixels"),
        *("density_pixels", "coverage_pixels", "memorisation_pixels", "memorisation_pixels_held_out"),
    }
    two = run_ranks(_evaluate, 2, trained)
    assert two[0][0] == two[1][0]  # every rank has the same answer
    assert sorted(two[0][1] + two[1][1]) == drawn
    assert two[0][0] == pytest.approx(alone, rel=1e-3)
    pixels, others = (np.concatenate([i[k] for k in sorted(i)]).astype(int) for i in (images, two[0][2]))
    assert pixels.shape == (260, 1, 8, 8)
    assert np.abs(pixels - others).max() <= 1
    assert (pixels == others).mean() >= 0.999

    scratch = trained.run.path / "evaluations"
    assert not scratch.exists()
    for blocks in (1, 9):  # killed early and late, in the middle of drawing
        started = start_ranks(_evaluate, 1, trained, 0.05)
        end = time.monotonic() + 60
        while len(list(scratch.glob("*/block-*.npy"))) < blocks:
            assert time.monotonic() < end
            time.sleep(0.005)
        for process, _ in started:
            process.kill()
            process.join()
        kept = len(list(scratch.glob("*/block-*.npy")))
        assert blocks <= kept < 22
    ((again, drawn_again, _),) = run_ranks(_evaluate, 1, trained)
    assert drawn_again == drawn[kept:]
    assert again == alone  # to the last digit
    assert not scratch.exists()


def test_blocks_of_another_evaluation_or_a_torn_file_are_not_used(tmp_path):
    images = torch.randint(0, 256, (4, 1, 2, 2), dtype=torch.uint8)
    scratch = Scratch(tmp_path / "evaluations", {"steps": 5})
    assert scratch.read(0, 4, (1, 2, 2)) is None
    scratch.write(0, images)
    assert torch.equal(scratch.read(0, 4, (1, 2, 2)), images)
    assert Scratch(tmp_path / "evaluations", {"steps": 6}).read(0, 4, (1, 2, 2)) is None
    assert scratch.read(0, 3, (1, 2, 2)) is None
    assert scratch.read(0, 4, (3, 2, 2)) is None
    (path,) = scratch.path.iterdir()
    whole = path.read_bytes()
    for size in (0, 10, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert scratch.read(0, 4, (1, 2, 2)) is None
    scratch.remove()
    assert list(tmp_path.iterdir()) == []


def test_evaluations_that_end_disturb_none_that_goes_on(tmp_path):
    """As the tasks of a sweep do, which keep their samples in one folder."""
    images = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)

    def work(number):
        scratch = Scratch(tmp_path / "evaluations", {"seed": number})
        for start in range(400):
            scratch.write(start, images)
            scratch.remove()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


@pytest.mark.parametrize("ranks", [2, 3, 8, 16, 32])
def test_ranks_share_a_small_evaluation_evenly_in_blocks_that_do_not_follow_their_number(monkeypatch, ranks):
    e = Eval()
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    drawn, first_ids = [], set()
    for rank in range(ranks):
        monkeypatch.setenv("RANK", str(rank))
        starts, mine = blocks_of_a_rank(e)
        first_ids.add(starts)
        drawn.append([starts[number] for number in mine])
    assert first_ids == {range(0, 2000, 64)}
    assert sorted(start for starts in drawn for start in starts) == list(range(0, 2000, 64))
    assert max(map(len, drawn)) * 64 <= 1.06 * 2000 / ranks


def test_labels_are_as_in_the_data_or_every_class_equally_often(digits, tmp_path):
    config = tiny(digits, tmp_path)
    reference = Reference.open(config, torch.device("cpu"))
    ids = list(range(1000))
    assert labels_of(ids, config.eval, 10, reference).tolist() == [int(reference.labels[i % 360]) for i in ids]
    uniform = tiny(digits, tmp_path, "eval.labels=uniform").eval
    assert labels_of(ids, uniform, 10, reference).bincount().tolist() == [100] * 10


def _opened(configs):
    """The step a rank opens of its own copy of a run."""
    config = configs[torch.distributed.get_rank()]
    return open_generator(RunDirectory(config.run.path), config, torch.device("cpu")).step


def test_ranks_evaluate_the_checkpoint_that_rank_0_found_newest(digits, finished_run, tmp_path):
    """Rank 1 looks a moment later, when the training has committed another."""
    later = copied(finished_run, digits, tmp_path, "train.steps=42", "eval.every=0")
    run_ranks(train, 1, later)
    assert run_ranks(_opened, 2, [finished_run, later]) == [40, 40]


def _without_room(config):
    """What each rank is told where the disk of one of them takes no samples."""
    run, device = RunDirectory(config.run.path), torch.device("cpu")
    opened, reference = open_generator(run, config, device), Reference.open(config, device)
    scratch = scratch_of(run, config.eval, opened.checkpoint, reference)
    if torch.distributed.get_rank() == 1:
        scratch.path = run.config_file / "below a file"
    try:
        evaluate(opened.generator, config, reference, scratch=scratch)
    except UserError as e:
        return type(e), str(e)
    finally:
        torch.distributed.barrier()
        scratch.remove()


def test_what_one_rank_meets_while_sampling_ends_all_and_is_told(trained):
    told = run_ranks(_without_room, 2, trained)
    assert told[0] == told[1]
    assert told[0][0] is SharedError
    assert "cannot keep samples in" in told[0][1]


def test_an_evaluation_with_other_settings_than_the_first_is_of_no_curve_with_it(digits, tmp_path):
    often = ("eval.every=2", "eval.num_samples=24", "eval.validation_images=4", "diffusion.timesteps=50")
    run_ranks(train, 1, tiny(digits, tmp_path, *often, "train.steps=2"))
    fewer = tiny(digits, tmp_path, *often, "train.steps=4", "eval.steps=3", "eval.metrics=[fd, bpd]")
    run_ranks(train, 1, fewer)
    lines = training_evaluations(RunDirectory(fewer.run.path).journal_file)
    assert [line["context"].get("differs") for line in lines] == [None, {"steps": 3}]
    assert [line["context"].get("validation_images") for line in lines] == [None, fewer.eval.validation_images]
    for arguments, differs in ((["--steps", "3"], {"steps": 3}), (["--steps", "5"], None)):
        ((code, text),) = run_ranks(command, 1, "evaluate", fewer.run.path, *arguments, "--json")
        assert code == 0, text
        assert json.loads(text.splitlines()[-1])["context"].get("differs") == differs


def _counting(config):
    """How many features an evaluation of moments keeps, and whether scratch appears where none is asked for."""
    from dtrain.evaluation.metrics.kept import KeptFeatures

    updates = []
    KeptFeatures.update = lambda self, number, features: updates.append(number)
    run = RunDirectory(config.run.path)
    generator = open_generator(run, config, torch.device("cpu")).generator
    evaluate(generator, config, Reference.open(config, torch.device("cpu")))
    return updates, os.path.exists(run.path / "evaluations")


def test_the_evaluation_within_training_keeps_no_features_and_writes_no_samples(trained):
    config = trained.model_copy(update={"eval": trained.eval.model_copy(update={"metrics": ["fd"]})})
    assert run_ranks(_counting, 1, config) == [([], False)]


def test_the_bootstrap_interval_stands_beside_its_distance(trained):
    e = trained.eval.model_copy(update={"metrics": ["fd"], "bootstrap": 10})
    ((found, _, _),) = run_ranks(_evaluate, 1, trained.model_copy(update={"eval": e}))
    assert found["fd_pixels_low"] < found["fd_pixels"] < found["fd_pixels_high"]


def test_bf16_rounds_the_network_and_nothing_else(trained):
    run, seen = RunDirectory(trained.run.path), []
    generator = open_generator(run, trained, torch.device("cpu")).generator
    for number, parameter in enumerate(generator.model.parameters()):  # three steps have taught it hardly anything
        parameter.data += 0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    generator.model.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    ids, labels = list(range(50)), torch.arange(50) % 10
    exact = generator.draw(ids, labels, trained.eval)
    assert set(seen) == {(torch.float32, torch.float32)}
    seen.clear()
    rounded = generator.draw(ids, labels, trained.eval.model_copy(update={"precision": "bf16"}))
    assert set(seen) == {(torch.float32, torch.bfloat16)}
    difference = (rounded.int() - exact.int()).abs().float()
    assert 0 < difference.mean() < 2  # levels of 255


def test_an_evaluation_touches_no_network(trained, no_network):
    """In this very process, alone, with its sockets blocked."""
    run, device = RunDirectory(trained.run.path), torch.device("cpu")
    generator = open_generator(run, trained, device).generator
    metrics, context = evaluate(generator, trained, Reference.open(trained, device))
    assert np.isfinite(list(metrics.values())).all()
    assert (context["n"], context["features"], context["labels"]) == (260, "pixels", "data")
