"""The page says what the journal says, and nothing that it should not."""

import base64
import io
import json
import math
import re
import subprocess
import sys

import pytest
from PIL import Image

from dtrain.lock import RunLock
from dtrain.report import write_report
from tests.report.made import BATCH, CONTEXT, VOID_DISTANCE, VOID_LOSS, Page, append, make_run, picture


@pytest.fixture
def run(tmp_path, monkeypatch):
    return make_run(tmp_path, monkeypatch)


def page(*runs) -> Page:
    return Page(write_report(list(runs)).read_text())


def test_nothing_on_the_page_comes_from_elsewhere(run):
    found = page(run)
    for tag, attributes in found.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "action", "xlink:href", "data", "poster"):
            value = attributes.get(name) or ""
            assert value == "" or value.startswith(("data:image/", "#")), (tag, name, value[:80])
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    assert "@import" not in found.source
    assert "url(" not in found.source
    assert "://" not in found.source
    anchors = {a.get("id") for _, a in found.tags}
    assert all(a["href"][1:] in anchors for tag, a in found.tags if tag == "a")


def test_every_number_of_the_curves_is_the_journals(run):
    """Read back from the page and from the raw file; lines that a later attempt made void are in neither."""
    raw = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    counted = [line for line in raw if line["attempt"] == 2 or line["step"] <= 4]
    found = page(run)
    evaluations = [line for line in counted if line["event"] == "eval"]
    assert [line["step"] for line in evaluations] == [4, 8, 12]
    names = ("fd_pixels", "fd_pixels_low", "fd_pixels_high")
    assert found.points("fd_pixels") == {
        "EMA 0.995 · N 48": [
            [line["images"], *(line["metrics"][n] for n in names), f"step {line['step']}"] for line in evaluations
        ]
    }
    train = [line for line in counted if line["event"] == "train"]
    assert [line["step"] for line in train] == list(range(1, 13))
    assert [p[:2] for p in found.points("loss")[""]] == [[t["images"], t["metrics"]["loss"]] for t in train]
    levels = list(found.points("loss by noise level").values())
    for i in range(8):
        assert [p[1] for p in levels[i]] == [t["metrics"][f"loss_level_{i}"] for t in train]
    (held_out,) = found.points("held-out loss by noise level").values()
    last = [line for line in counted if line["event"] == "validation"][-1]
    assert [p[:2] for p in held_out] == [[(i + 0.5) / 8, last["metrics"][f"loss_level_{i}"]] for i in range(8)]
    assert [p[1] for p in found.points("throughput")[""]] == [t["metrics"]["images_per_second"] for t in train]
    waits = [100 * t["metrics"]["data_wait_seconds"] / t["metrics"]["step_seconds"] for t in train]
    assert [p[1] for p in found.points("waiting for data")[""]] == waits
    first = raw[0]["time"]
    assert [p[0] for p in found.points("throughput")[""]] == [t["time"] - first for t in train]


def test_what_a_later_attempt_made_void_is_not_drawn(run):
    source = page(run).source
    assert str(VOID_LOSS) in (run / "journal.jsonl").read_text()
    assert str(VOID_DISTANCE) in (run / "journal.jsonl").read_text()
    for number in (VOID_LOSS, VOID_DISTANCE):
        assert f"{number:.0f}" not in source
        assert f"{number:,.0f}" not in source
    assert source.count("data:image/png") == 3  # of steps 4, 8 and 12, not of 5 to 7


@pytest.mark.parametrize("chart", ["fd_pixels", "loss by noise level", "gradient norm"])
def test_a_curve_is_drawn_where_its_axes_say(run, chart):
    """Points on the canvas, read through the labels of the axes as a person would, are the numbers of the journal."""
    source = write_report([run]).read_text()
    figure = next(f for f in re.findall(r'<figure class="chart.*?</figure>', source, re.S) if f"<b>{chart}</b>" in f)
    logarithmic = ">logarithmic<" in figure
    assert logarithmic == (chart == "loss by noise level")

    def axis(kind: str, side: str) -> list[tuple[float, float]]:
        labels = re.findall(rf'<span class="{kind}[^"]*" style="{side}:([\d.]+)%">([^<]+)</span>', figure)
        return [(float(place), _number(text)) for place, text in labels]

    of = math.log if logarithmic else float
    (y_a, value_a), *_, (y_b, value_b) = axis("y", "top")
    (x_a, images_a), *_, (x_b, images_b) = axis("x", "left")
    numbers = json.loads(re.search(r'json">(.*?)</script>', figure, re.S)[1])["series"]
    drawn = re.findall(r'<path class="line" d="(M[^"]+)"/>', figure)[: len(numbers)]
    for path, series in zip(drawn, numbers, strict=True):
        spots = [tuple(map(float, spot.split())) for spot in re.split("[ML]", path)[1:]]
        assert len(spots) == len(series["points"])
        for (x, y), (images, value, *_) in zip(spots, series["points"], strict=True):
            assert images_a + (x / 10 - x_a) / (x_b - x_a) * (images_b - images_a) == pytest.approx(images, abs=1)
            read = of(value_a) + (y / 10 - y_a) / (y_b - y_a) * (of(value_b) - of(value_a))
            assert read == pytest.approx(of(value), abs=0.003 * abs(of(value_b) - of(value_a)))


def _number(text: str) -> float:
    return float(text[:-1]) * 1e3 if text.endswith("k") else float(text)


def test_evaluations_of_other_samples_or_settings_never_share_a_line(run):
    for step, n, eta, value in ((4, 1000, 0.0, 5.0), (8, 1000, 0.0, 3.0), (12, 1000, 1.0, 2.5)):
        context = CONTEXT | {"ema": "ema_0", "n": n, "eta": eta}
        append(run, "eval", step, {"fd_pixels": value}, context)
    append(run, "eval", 12, {"fd_pixels": 6.5}, CONTEXT | {"ema": "raw", "n": 48})
    found = page(run)
    lines = {name: [p[1] for p in points] for name, points in found.points("fd_pixels").items()}
    assert lines == {"EMA 0.995 · N 48": [10.0, 5.0, pytest.approx(40 / 12)], "EMA 0.995 · N 1,000": [5.0, 3.0]}
    assert "2 single evaluations with other settings are in the table below." in found.text
    assert "η 1" in found.text
    assert "raw weights" in found.text


def test_there_is_one_best_tile_a_setting_and_the_runs_own_comes_first(run):
    """Under settings that differ by the seed alone, by what no other tile says, and by what is said anyhow."""
    own = CONTEXT | {"ema": "ema_0", "n": 48}
    for n, more, values in (
        (1000, {}, (5.0, 3.0)),
        (1000, {"eta": 1.0}, (2.5,)),
        (1000, {"eta": 1.0, "seed": 7}, (2.25, 9.0)),
        (48, {"ema": "raw"}, (6.5,)),
        (48, {"labels": "uniform"}, (1.0,)),
    ):
        for step, value in enumerate(values, start=8):
            append(run, "eval", step, {"fd_pixels": value, "precision_pixels": 0.5}, own | {"n": n} | more)
    text = page(run).text
    tiles = re.findall(r"best (.+)\n+([\d.]+)\n(?:[\d.]+ – [\d.]+\n)?(.+)\nstep (\d+)\n", text)
    ddim = "ddim, 5 steps, η"
    assert tiles == [
        ("fd_pixels", "3.333", f"N 48 · EMA 0.995 · {ddim} 0", "12"),
        ("fd_pixels", "2.25", f"N 1,000 · EMA 0.995 · {ddim} 1 · best of 2 seeds", "8"),
        ("fd_pixels", "3", f"N 1,000 · EMA 0.995 · {ddim} 0", "9"),
        ("fd_pixels", "1", f"N 48 · EMA 0.995 · {ddim} 0 · labels uniform", "8"),
        ("fd_pixels", "6.5", f"N 48 · raw weights · {ddim} 0", "8"),
    ]
    for n in (10, 20, 30):
        append(run, "eval", 8, {"fd_pixels": 1.0}, own | {"n": n})
    text = page(run).text
    assert text.count("best fd_pixels") == 6
    assert "2 more settings: all evaluations are in the table." in text


def test_a_single_point_is_a_number_and_no_chart(run):
    for step in (4, 8):
        append(run, "eval", step, {"fd_two": 5.0}, CONTEXT | {"ema": "ema_0", "n": 48})
    for n in range(100, 110):
        found = {"fd_one": 7.25, "fd_one_low": 7.0, "fd_one_high": 8.0}
        append(run, "eval", 8, found, CONTEXT | {"ema": "ema_0", "n": n})
    append(run, "eval", 8, {"fd_one": 6.25}, CONTEXT | {"ema": "ema_0", "n": 48})
    found = page(run)
    assert {"fd_pixels", "fd_two"} <= set(found.charts)
    assert "fd_one" not in found.charts
    assert re.search(
        r"fd_one\nlower is better\n+EMA 0.995 · N 48\n6.25\nstep 8\nimages seen 192\n+"
        r"EMA 0.995 · N 100\n7.25\n7 – 8\nstep 8\nimages seen 192\n",
        found.text,
    )
    assert "3 single evaluations with other settings are in the table below." in found.text


def test_evaluations_beside_the_journal_are_part_of_the_curve(run):
    """A separate job evaluated under the same settings: what a later attempt made void is void there too."""
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    (run / "journal-eval-a.jsonl").write_text(
        "".join(
            json.dumps(
                {"event": "eval", "step": step, "images": step * BATCH, "attempt": attempt, "time": 1.9e9}
                | {"metrics": {"fd_pixels": value}, "context": CONTEXT | {"ema": "ema_0", "n": 48}}
            )
            + "\n"
            for step, attempt, value in ((6, 1, VOID_DISTANCE), (2, 1, 30.0), (10, 2, 4.5))
        )
    )
    found = page(run)
    (points,) = found.points("fd_pixels").values()
    assert [p[:2] for p in points] == [
        [2 * 24, 30.0],
        [4 * 24, 10.0],
        [8 * 24, 5.0],
        [10 * 24, 4.5],
        [12 * 24, 40 / 12],
    ]
    assert f"{VOID_DISTANCE:,.0f}" not in found.text
    assert lines[-1]["time"] < 1.9e9
    assert "2030" not in found.text  # the time line is the training's


def test_a_bound_of_clipped_estimates_shares_no_line_with_one_that_is_not_and_the_page_says_which(run):
    """A line of before dtrain could clip says nothing of it, and goes on in the curve that is not clipped."""
    path, context = run / "journal.jsonl", CONTEXT | {"ema": "ema_0", "n": 48}
    whole = path.read_text()

    def evaluated(*bounds):
        lines = [
            {"event": "eval", "step": step, "images": step * BATCH, "attempt": 2, "time": 1.85e9}
            | {"metrics": {"bpd": value}, "context": context | more}
            for step, value, more in bounds
        ]
        path.write_text(whole + "".join(f"{json.dumps(line)}\n" for line in lines))
        return page(run)

    old, new = (
        ((6, 4.9, {}), (8, 4.8, {"bpd_clip": False})),
        ((10, 4.5, {"bpd_clip": True}), (12, 4.4, {"bpd_clip": True})),
    )
    assert [len(points) for points in evaluated(*old, *new).points("bpd").values()] == [2, 2]
    assert "Every estimate of x₀ is clipped to [−1, 1]." in evaluated(*new).text
    assert "Every estimate of x₀ is taken unclipped." in evaluated(*old).text


def test_several_runs_lie_over_each_other_and_what_differs_is_told(run, tmp_path, monkeypatch):
    other = make_run(tmp_path, monkeypatch, "other", "optim.lr=0.125", outcome=None)
    found = page(run, other, run)
    series = found.charts["fd_pixels"]["series"]
    assert [(s["name"], s["colour"]) for s in series] == [
        ("made · EMA 0.995 · N 48", "s0"),
        ("other · EMA 0.995 · N 48", "s1"),
    ]
    assert [s["name"] for s in found.charts["loss"]["series"]] == ["made", "other"]
    assert re.search(r"1 config key in which they differ\nkey\nmade\nother\n+optim\.lr\n0\.0005\n0\.125\n", found.text)
    assert found.text.count("optim.lr") == 1
    assert "crashed" in found.text  # no outcome, and nobody holds its lock
    assert "finished" in found.text


def test_a_run_is_running_while_somebody_alive_holds_its_lock(tmp_path, monkeypatch):
    run = make_run(tmp_path, monkeypatch, outcome=None)

    def state() -> str:
        return re.search(r"made \n([a-z]+)\n", page(run).text)[1]

    assert state() == "crashed"
    lock = RunLock(run / "lock")
    lock.acquire()
    assert state() == "running"
    lock.release()
    assert state() == "crashed"


def test_what_happened_is_told_by_the_clock(run):
    found = page(run)
    titles = [a["title"] for _, a in found.tags if "title" in a]
    assert "attempt 1: steps 0 to 7, 2 ranks, 3 min 30 s" in titles
    assert "attempt 2: steps 4 to 12, 2 ranks, 2 min 50 s" in titles
    assert "3 steps that a later attempt went through again" in titles
    assert [t for t in titles if t.startswith("checkpoint")] == [f"checkpoint of step {s}" for s in (4, 8, 12)]
    assert [t for t in titles if t.startswith("evaluation at")] == [
        f"evaluation at step {s}, 3.0 s" for s in (4, 8, 12)
    ]
    assert "step 12: bad step: a gradient is not finite" in titles
    bars = {a["class"]: a["style"] for tag, a in found.tags if tag == "i" and a.get("class") in ("lost", "fault")}
    raw = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    begin, span = raw[0]["time"], raw[-1]["time"] - raw[0]["time"]
    fault = next(line for line in raw if line["event"] == "fault")
    assert float(bars["fault"].split("%")[0].removeprefix("left:")) == pytest.approx(
        100 * (fault["time"] - begin) / span, abs=0.01
    )
    void = next(line for line in raw if line["attempt"] == 1 and line["step"] > 4)
    assert float(bars["lost"].split("%")[0].removeprefix("left:")) == pytest.approx(
        100 * (void["time"] - begin) / span, abs=0.01
    )


def test_where_the_time_went_adds_up_over_attempts(run):
    text = page(run).text
    row = r"{}\n+1 min\n5\.0 s\n0 s\n15 s\n3\n75\.0 %".format("attempt 1")
    assert re.search(row, text)
    assert re.search(r"attempt 2\n+2 min 20 s\n0 s\n30 s\n10 s\n0\n77\.8 %", text)
    assert re.search(r"in all\n+3 min 20 s\n5\.0 s\n30 s\n25 s\n3\n76\.9 %", text)


def test_a_sweep_is_a_table_of_means_with_the_best_one_marked(run):
    values = {
        (eta, s, seed): s / 10 + seed + (eta == 0.5) for eta in (0.0, 0.5) for s in (20, 5, 10) for seed in (0, 2)
    }
    with open(run / "sweep.jsonl", "w") as f:
        for (eta, s, seed), value in values.items():
            context = CONTEXT | {"ema": "ema_0", "n": 500, "eta": eta, "steps": s, "seed": seed}
            line = {"key": f"{eta}{s}{seed}", "step": 12, "images": 288, "context": context}
            f.write(json.dumps(line | {"metrics": {"fd_pixels": value, "recall_pixels": value}}) + "\n")
        f.write('{"key": "torn", "metr')
    text = page(run).text
    lines = [line for line in text.splitlines() if line]
    begin = lines.index("η \\ steps S")
    assert "|".join(lines[begin : begin + 18]) == (
        "η \\ steps S|5|10|20|0|★ 1.5| ± 1.4|2| ± 1.4|3| ± 1.4|0.5|2.5| ± 1.4|3| ± 1.4|4| ± 1.4"
    )
    assert "N 500" in text
    assert "at η 0, steps S 5" in text  # the lowest distance
    assert "at η 0.5, steps S 20" in text  # the highest recall


def test_a_sweep_over_widths_of_averages_has_a_curve(run):
    with open(run / "sweep.jsonl", "w") as f:
        for number, width in enumerate((0.2, 0.05, 0.1)):
            context = CONTEXT | {"ema": f"sigma_{width}", "n": 500}
            line = {"key": str(number), "step": 12, "images": 288, "context": context}
            f.write(json.dumps(line | {"metrics": {"fd_pixels": 1 + width}}) + "\n")
    found = page(run)
    assert "EMA σ_rel 0.1" in found.text
    assert "fd_pixels: value over width σ_rel of the average, 1 lines" in found.source


def test_nothing_secret_reaches_the_page(tmp_path, monkeypatch):
    run = make_run(
        tmp_path,
        monkeypatch,
        "made",
        "tracking.uri=https://joe:hunter2@tracking.example/mlflow?sig=hunter3",
        "deepspeed.extra={comet: {api_key: hunter4}, csv_monitor: {enabled: true, authToken: hunter5}}",
        "data.allow_pipe=true",
        "data.shards=\"pipe:curl -H 'X-Key: hunter6' https://example/{000..003}.tar\"",
        "data.manifest=m.json",
        "eval.reference=s3://AKIAhunter7:hunter8@bucket/x.npz",
    )
    change = {"tracking.uri": ["http://a:hunter9@b/", "http://c"], "deepspeed.extra.wandb.token": ["hunter10", "x"]}
    append(run, "config", 12, context={"changed": change})
    append(
        run,
        "fault",
        12,
        context={"message": "no answer from http://u:hunter11@h/p?token=hunter12", "password": "hunter13"},
    )
    append(run, "fault", 12, context={"kind": "server", "headers": "Authorization: Bearer hunter14hunter14"})
    append(run, "fault", 12, context={"where": "ftp://x:p@hunter15@host/", "api_key": "hunter16"})
    (run / "outcome.json").write_text(json.dumps({"outcome": "user_error", "message": "ftp://z:hunter17@host is away"}))
    found = page(run)
    assert "hunter" not in found.source
    assert "tracking.example/mlflow" in found.text  # what is no secret stays
    assert "ftp://host is away" in found.text
    assert "csv_monitor" in found.text


def test_a_hostile_name_stays_a_name(tmp_path, monkeypatch):
    path = make_run(tmp_path, monkeypatch)
    scripts = len([t for t, _ in page(path).tags if t == "script"])
    hostile = path.rename(path.with_name('a"><script>alert(1)<\u2044script><img onerror=x>'))
    append(hostile, "fault", 12, context={"message": "</script><script>alert(2)</script>"})
    append(hostile, "eval", 12, {'fd_"><script>x': 1.0}, {"ema": "<b>", "n": "<i>", "artifact": "../../../etc/passwd"})
    found = page(hostile)
    assert [t for t, _ in found.tags if t in ("script", "b", "i")].count("script") == scripts
    assert 'fd_"><script>x' in found.text
    assert not [a for _, a in found.tags if "onerror" in a]
    assert "root:" not in found.source


def test_a_run_that_has_only_begun_has_a_page_too(tmp_path, monkeypatch):
    run = make_run(tmp_path, monkeypatch, outcome=None)
    lines = (run / "journal.jsonl").read_text().splitlines(keepends=True)
    (run / "journal.jsonl").write_text(lines[0])
    found = page(run)
    assert found.charts == {}
    assert "Evaluation" not in found.text
    assert "Samples" not in found.text
    (run / "journal.jsonl").write_text("".join(lines[:3]) + lines[3][:40])  # the last line in part
    assert [p[1] for p in page(run).points("loss")[""]] == [1.0, 0.5]
    append(run, "train", 3, {"loss": float("nan")})
    found = page(run)
    assert [p[1] for p in found.points("loss")[""]] == [1.0, 0.5]
    assert "1 values are not finite" in found.text
    assert re.search(r"loss\nnan\n", found.text)  # it is the run's last word


def test_mistakes_are_one_line(run, tmp_path, monkeypatch, capfd):
    from dtrain.cli import main

    def failing(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["dtrain", *map(str, arguments)])
        with pytest.raises(SystemExit, match=r"^2$"):
            main()
        out, (line,) = (text.splitlines() for text in capfd.readouterr())
        assert out == []
        return line.removeprefix("dtrain: ")

    assert failing("report", tmp_path / "no").startswith(f"no run at {tmp_path}/no")
    assert failing("report", run, "--out", tmp_path / "a" / "b.html") == (
        f"cannot write {tmp_path}/a/b.html: No such file or directory; name a writable place with --out"
    )
    (run / "journal.jsonl").write_text("")
    assert failing("report", run) == f"{run} has nothing in its journal.jsonl yet; start the run first"
    (run / "config.yaml").write_text("[")
    assert failing("report", run).startswith(f"{run}/config.yaml:1 is not valid YAML")
    assert not (run / "report.html").exists()


def test_large_grids_are_made_smaller_and_only_so_many_are_shown(run):
    for step in range(20, 40):
        grid = f"samples/step-{step:08d}.png"
        picture(1200, 2000, step).save(run / grid) if step == 39 else picture(20, 20, step).save(run / grid)
        append(run, "eval", step, {"fd_pixels": 1.0}, CONTEXT | {"ema": "ema_0", "n": 48, "artifact": grid})
    (run / "samples/step-00000020.png").write_bytes(b"no picture")
    found = page(run)
    assert len(found.source) < 2e6 < (run / "samples/step-00000039.png").stat().st_size
    pictures = [a for tag, a in found.tags if tag == "img" and a.get("src")]
    assert len(pictures) == 11 or len(pictures) == 12
    assert "of 23 grids" in found.text
    sizes = [Image.open(io.BytesIO(base64.b64decode(a["src"].partition(",")[2]))).size for a in pictures]
    assert sizes[-1] == (1400, 840)
    assert pictures[-1]["alt"] == f"samples at step 39 ({39 * BATCH} images)"


def test_the_page_of_a_long_run_is_no_larger_than_a_short_ones_curves_need(run):
    """6,000 lines of training and 2,000 bad samples: lines become means whose bands hold every value."""
    raw = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    train = next(line for line in raw if line["event"] == "train")
    losses = [1 + (step % 7) / 10 for step in range(6000)]
    with open(run / "journal.jsonl", "a") as f:
        for step, loss in enumerate(losses, start=13):
            line = train | {"step": step, "images": step * BATCH, "attempt": 2, "time": 1.8e9 + step}
            f.write(json.dumps(line | {"metrics": train["metrics"] | {"loss": loss}}) + "\n")
    with open(run / "journal-rank-1.jsonl", "w") as f:
        for step in range(2000):
            line = train | {"event": "bad_sample", "step": step, "attempt": 2, "metrics": {}, "context": {"shard": "a"}}
            f.write(json.dumps(line) + "\n")
    found = page(run)
    assert len(found.source) < 1.2e6
    points = found.points("loss")[""]
    assert 200 < len(points) <= 400
    late = [p for p in points if p[0] > 100 * BATCH]
    assert {(low, high) for _, _, low, high, _ in late} == {(1.0, 1.6)}
    assert [p[1] for p in late] == [pytest.approx(1.3, abs=0.05)] * len(late)
    assert "Lines are means of neighbouring values" in found.text
    assert re.search(r"bad samples\n2,000\n", found.text)


def test_the_page_is_made_without_torch(run):
    code = (
        "import sys\nfrom dtrain.report import write_report\nprint(write_report([sys.argv[1]]))\n"
        "sys.exit(bool({'torch', 'mlflow', 'matplotlib', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, run], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, str(run / "report.html")), done.stderr


def test_guidance_over_each_condition_apart_is_shown_and_swept_as_it_was_asked(run):
    apart = CONTEXT | {"ema": "ema_0", "n": 500, "guidance": "text=3,label=1.5"}
    append(run, "eval", 12, {"fd_pixels": 0.5}, apart)
    with open(run / "sweep.jsonl", "w") as f:
        for number, guidance in enumerate((2.0, "text=3,label=1.5")):
            line = {"key": str(number), "step": 12, "images": 288, "context": apart | {"guidance": guidance}}
            f.write(json.dumps(line | {"metrics": {"fd_pixels": 1.0 + number}}) + "\n")
    text = page(run).text
    assert "guidance text=3,label=1.5" in text
    lines = [line for line in text.splitlines() if line]
    begin = lines.index("guidance")
    assert "|".join(lines[begin : begin + 5]).startswith("guidance|2|text=3,label=1.5")
