"""An evaluation that fails costs its numbers and no step, on real ranks, by networks that really fail."""

from dtrain.run import RunDirectory
from dtrain.tracking.journal import read
from tests.command_line import command, failing
from tests.data.shard_files import data_set, picture
from tests.digits import losses, tiny
from tests.evaluation.features.networks import Alone, Corner, saved
from tests.ranks import run_ranks
from tests.training.runs import train_saying_into, trained

NEVER, ALWAYS = 64.0, -1.0  # above black, below it


def failures(config) -> list[tuple[int, str]]:
    lines = read(config.run.path / "journal.jsonl")
    return [(line["step"], line["context"]["message"]) for line in lines if line["event"] == "eval_failed"]


def evaluations(config) -> list[int]:
    return [line["step"] for line in read(config.run.path / "journal.jsonl") if line["event"] == "eval"]


def test_features_that_are_no_numbers_cost_evaluations_and_a_failed_last_one_is_tried_once_more(digits, tmp_path):
    def config(network):
        return tiny(digits, tmp_path, "train.steps=4", "eval.every=2", f"eval.features={network}")

    bad, said = config(saved(Corner(NEVER), tmp_path / "corner.pt")), tmp_path / "said.txt"
    run_ranks(train_saying_into, 2, bad, said)
    assert len(losses(bad)) == 4
    assert [step for step, _ in failures(bad)] == [2, 4]
    assert evaluations(bad) == []
    (message,) = {message for step, message in failures(bad) if step == 4}
    assert "of 48 samples are not finite numbers (" in message
    repeat = f"repeat it with: dtrain evaluate {bad.run.path}"
    assert f"the evaluation of step 4 failed: {message}; {repeat}\n" in said.read_text()
    outcomes = [RunDirectory(bad.run.path).outcome()]
    for _ in range(2):
        trained(bad, 1)
        outcomes.append(RunDirectory(bad.run.path).outcome())
    assert [one["outcome"] for one in outcomes] == ["finished"] * 3
    assert [step for step, _ in failures(bad)] == [2, 4, 4]  # the next start tries it once, later ones do not

    ((code, text),) = run_ranks(command, 1, "evaluate", bad.run.path)
    assert (code, text.count("\n")) == (2, 1)
    assert text == f"dtrain: {message}\n"


def test_a_failed_evaluation_is_made_up_for_once_its_cause_is_gone(digits, tmp_path):
    last = ("train.steps=4", "eval.every=4")
    bad = tiny(digits, tmp_path, *last, f"eval.features={saved(Corner(NEVER), tmp_path / 'corner.pt')}")
    trained(bad, 1)
    assert (len(failures(bad)), evaluations(bad)) == (1, [])
    good = tiny(digits, tmp_path, *last)
    trained(good, 1)
    assert (len(failures(good)), evaluations(good)) == (1, [4])


def test_a_reference_without_finite_features_is_said_at_once_and_ends_no_training(digits, tmp_path):
    last = ("train.steps=4", "eval.every=4")
    config = tiny(digits, tmp_path, *last, f"eval.features={saved(Corner(ALWAYS), tmp_path / 'nan.pt')}")
    said = tmp_path / "said.txt"
    run_ranks(train_saying_into, 2, config, said)
    ((step, message),) = failures(config)
    assert (step, len(losses(config))) == (4, 4)
    assert "the features of 360 of 360 images of " in message
    assert "so evaluations will fail: the features of 360 of 360" in said.read_text().partition("step 4")[0]
    assert not list((digits / "holdout").glob("reference-nan*"))
    for arguments in (
        ["evaluate", config.run.path],
        ["reference", digits / "holdout", "--features", tmp_path / "nan.pt"],
    ):
        ((code, text),) = run_ranks(command, 1, *arguments)
        assert (code, text.count("\n")) == (2, 1)
        assert "the features of 360 of 360 images of " in text


def test_what_one_rank_meets_in_an_evaluation_is_agreed_on_and_has_its_traceback_kept(digits, tmp_path):
    network = saved(Alone(0), tmp_path / "alone.pt")
    few = ("train.steps=4", "eval.every=2", "eval.num_samples=13")  # of which the last is drawn by rank 1, alone
    config = tiny(digits, tmp_path, *few, f"eval.features={network}")
    assert len(trained(config, 2)) == 4
    assert [step for step, _ in failures(config)] == [2, 4]
    assert all(m.startswith("rank 1 on ") and "one image alone" in m for _, m in failures(config))
    assert "Traceback" in (config.run.path / "logs" / "rank-1.log").read_text()
    assert RunDirectory(config.run.path).outcome()["outcome"] == "finished"


def test_a_resumed_run_whose_held_out_labels_are_beyond_its_classes_goes_on_and_says_it_once(digits, tmp_path):
    trained(tiny(digits, tmp_path, "train.steps=2"), 1)
    manifest = data_set(tmp_path / "other", [{"png": picture(i, 8, 1), "cls": b"%d" % (i + 7)} for i in range(4)])
    other = tiny(digits, tmp_path, "train.steps=4", "eval.every=4", f"data.holdout={manifest.path}")
    assert len(trained(other, 2)) == 4
    ((step, message),) = failures(other)
    assert (step, message) == (
        4,
        f"{manifest.path} has labels up to 10, but model.num_classes is 10, so they go from 0 to 9; "
        "name another data.holdout",
    )
    assert failing("evaluate", other.run.path, world_size=2) == message
