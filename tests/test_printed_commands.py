"""Commands that documentation, help texts, config files and programs print are commands that work.

What can run as it stands runs here, made short, in a folder with the digits, a few photographs and the runs that the
README leaves behind. Patterns (CONFIG, RUN, …), and what takes minutes or needs a server, a cluster or a network, are
parsed by the program they name; `tests/campaigns/test_readme.py` walks the README as it is.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from dtrain.cli import UsageError, app
from tests.command_line import command as run_command
from tests.first_stage.folders import save_kl
from tests.printed import PAGES, ROOT, Command, blocks, commands, inline
from tests.ranks import run_ranks

# Words put behind a printed command, where the last value of an option counts.
SHORT_RUN = (
    *("train.steps=2", "train.checkpoint_every=1000", "eval.every=0", "eval.num_samples=8", "eval.batch_size=8"),
    *("eval.steps=2", "eval.features=pixels", "data.batch_size=4", "data.workers=0", "tracking.enabled=false"),
)
SHORT = {
    "pack": ("--holdout=4",),
    "init": ("--size=8", "--gpus=1"),  # for another machine than this one: no steps are timed
    "evaluate": ("--n=8", "--steps=2", "--features=pixels", "--metrics=fd"),
    "sample": ("--n=8", "--steps=2"),
    "pairs": ("--n=8", "--steps=2"),
    "submit": ("--dry-run",),
    "data bench": ("--seconds=0.1",),
    "encode": ("--block=32",),
}
PARSED_ONLY = {
    "chaos": "takes minutes; tests/chaos runs it",
    "plan": "lays out a model of 674 M parameters; tests/cluster/test_plan.py runs it",
    "doctor": "measures disks and network; tests/cluster/test_doctor.py runs it",
    "sweep": "evaluates many times; tests/evaluation/test_sweep.py runs it",
    "compare": "evaluates several runs many times; tests/evaluation/test_comparison.py runs it",
    "sync": "needs MLflow; tests/tracking runs it",
}
ROOT_OPTIONS = ("--version", "--help", "--install-completion", "--show-completion")
# Commands that programs end by: after a colon, or in a line of their own.
SAID = re.compile(r"(?:: |^ *)((?:dtrain|deepspeed|mlflow server) .+)$", flags=re.MULTILINE)
FOREIGN = {
    ".",
    "apt-get",
    "cd",
    "conda",
    "docker",
    "export",
    "git",
    "python3",
    "pytest",
    "scancel",
    "scontrol",
    "touch",
}


def of_pages() -> list[Command]:
    found = []
    for page in PAGES:
        text, name = page.read_text(), str(page.relative_to(ROOT))
        for block in blocks(text, "bash|sh"):
            found += commands(block, name)
        for code in inline(text):
            if re.match(r"(dtrain|deepspeed|make|mlflow|python) \S", code):
                found += commands(code, f"{name}, in prose")
    return found


def of_files() -> list[Command]:
    """Comments of configs and of what sets up: lines `#   command`, and `made by: command`."""
    found = []
    for file in [*sorted((ROOT / "configs").glob("*.yaml")), ROOT / "environment.yml", ROOT / "Dockerfile"]:
        for line in file.read_text().splitlines():
            if match := re.search(r"^#   (\S.*)|# made by: (.*)", line):
                found += commands(match[1] or match[2], file.name)
    return found


def of_help() -> list[Command]:
    """The examples that help texts end in, and other commands that they name in lines of their own."""
    found = []
    for name, command in every_command(typer.main.get_command(app)):
        for example in re.findall(r"(?:Example|Also): (.+)", f"{command.help or ''}\n{command.epilog or ''}"):
            found += commands(example, f"dtrain {name} --help")
    return found


def every_command(command, name: str = ""):
    if not hasattr(command, "commands"):
        yield name, command
        return
    for word, inner in command.commands.items():
        yield from every_command(inner, f"{name} {word}".strip())


PRINTED = [*of_pages(), *of_files(), *of_help()]
ONCE: dict[str, Command] = {}  # each where it is printed first
for command in PRINTED:
    ONCE.setdefault(str(command), command)


def parse(words: tuple[str, ...], in_prose: bool = False) -> str:
    """The name of the dtrain command, which has read its options itself. Raises what it says of a mistake."""
    command, name, rest = typer.main.get_command(app), [], list(words)
    if not words or (len(words) == 1 and words[0] in ROOT_OPTIONS):
        return ""
    while hasattr(command, "commands"):
        assert rest, f"`dtrain {' '.join(words)}` ends where a command's name is due"
        assert rest[0] in command.commands, f"there is no `dtrain {' '.join([*name, rest[0]])}`"
        name.append(rest.pop(0))
        command = command.commands[name[-1]]
    try:
        command.make_context(name[-1], rest)
    except UsageError as e:
        # Prose names a command and leaves what follows it to the reader.
        if not (in_prose and type(e).__name__ == "MissingParameter"):
            raise
    return " ".join(name)


def launched(words: tuple[str, ...]) -> tuple[str, ...] | None:
    """The dtrain command that `deepspeed … launch/train.py …` starts on each rank; None of a benchmark's."""
    from deepspeed.launcher.runner import parse_args

    given = parse_args(list(words))
    script = ROOT / given.user_script
    assert script.is_file(), f"there is no {script}"
    found = re.search(r'main\("(\w+)"\)', script.read_text())
    return (found[1], *given.user_args) if found else None


def of_dtrain(command: Command) -> tuple[str, ...] | None:
    """The words behind `dtrain`, or those that a launcher hands to it; None of another program."""
    words = command.without_optional
    if words[0] == "deepspeed":
        return launched(words[1:])
    return words[1:] if words[0] == "dtrain" else None


def check_known(command: Command) -> None:
    """The program that it names has read its options. Raises what it says, or an AssertionError."""
    words = command.without_optional
    program, rest = words[0], words[1:]
    if program in ("dtrain", "deepspeed"):
        if (given := of_dtrain(command)) is not None:
            parse(given, "in prose" in command.where)
    elif program == "python":
        module = rest[1] if rest[0] == "-m" else None
        if module != "pytest":
            found = importlib.util.find_spec(module) if module else None
            source = Path(found.origin).parent if found else ROOT / rest[0]
            assert source.exists(), f"there is no {source}"
            text = "".join(p.read_text() for p in (source.glob("*.py") if source.is_dir() else [source]))
            assert all(word in text for word in rest if word.startswith("--"))
    elif program == "make":
        ran = subprocess.run(["make", "--dry-run", *rest], cwd=ROOT, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
    elif program == "mlflow":
        from mlflow.cli import cli

        cli.commands[rest[0]].make_context(rest[0], list(rest[1:]))
    elif program == "pip":
        extra = re.search(r"\[(\w+)\]", str(command))
        assert rest[0] == "install"
        assert extra is None or f"\n{extra[1]} = [" in (ROOT / "pyproject.toml").read_text()
    else:
        assert program in FOREIGN | {"cp"}, f"nobody knows the program {program}"


@pytest.mark.parametrize("command", ONCE.values(), ids=lambda c: f"{c.where}: {c}")
def test_the_program_knows_the_command_and_its_options(command):
    check_known(command)


# Ranks are forked from a process that may have been started with another value.
PHOTOGRAPHS = {"DTRAIN_CIFAR10": "cifar/packed/train"}


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    """As after the README's set-up: the project's files, the digits, photographs, a trained run of each."""
    folder = tmp_path_factory.mktemp("printed")
    for name in ("configs", "launch", "eval", "slurm"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copytree(digits, folder / "data/digits")
    photographs(folder / "photos", 24)
    for number in range(10):
        photographs(folder / "cifar/images" / str(number), 2, (32, 32))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DTRAIN_CIFAR10", PHOTOGRAPHS["DTRAIN_CIFAR10"])  # which `os.path.expandvars` looks at
        save_kl(folder / "data/cifar10-vae", in_channels=3, out_channels=3)
        save_kl(folder / "vae")
        ran("pack", "cifar/images", "cifar/packed")
        ran("index", "cifar/packed/train", "--out", "data/cifar10.json")
        ran("train", "configs/digits-dit.yaml", *SHORT_RUN)
        yield folder


def photographs(folder: Path, count: int, size: tuple[int, int] | None = None) -> None:
    """JPEG files of noise; of mixed sizes where none is given."""
    folder.mkdir(parents=True)
    draws = np.random.default_rng(0)
    for number in range(count):
        height, width = size or draws.integers(40, 90, 2)
        picture = draws.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{number:03d}.jpg")


def ran(*words: str) -> str:
    """What `dtrain …` prints; it must end well."""
    ((code, text),) = run_ranks(run_command, 1, *words, environment=PHOTOGRAPHS)
    assert code in (0, None), f"dtrain {' '.join(words)}\n{text}"
    return text


def shortened(given: tuple[str, ...], name: str) -> tuple[str, ...]:
    """The same command in a second or two. A training is checked; that of the README's own images takes two steps."""
    if name == "train":
        trains = "configs/mine.yaml" in given and "--check" not in given
        return given + ((*SHORT_RUN, "model.width=16", "model.res_blocks=1") if trains else ("--check",))
    packed = name == "pack" and "sklearn:digits" in given  # with its 360 held-out ones already
    more = () if packed else SHORT.get(name, ())
    end = given.index("--") if "--" in given else len(given)
    return given[:end] + more + given[end:]


def trouble_of(command: Command, tried: set[tuple[str, ...]]) -> str | None:
    """Runs what can be run of it here, in the folder where we are. None where it ends well."""
    words = tuple(os.path.expandvars(word) for word in command.words)
    if words[0] == "cp":
        subprocess.run(words, check=True)
    given = of_dtrain(Command(words, command.where))
    name = parse(given) if given else ""
    if not name or name in PARSED_ONLY or "--download" in given:
        return None
    words = shortened(given, name)
    if words in tried:  # a training is checked once, however many launchers are printed for it
        return None
    tried.add(words)
    ((code, text),) = run_ranks(run_command, 1, *words, environment=PHOTOGRAPHS)
    if code not in (0, None):
        return f"exit code {code}: {text}"
    if command.into:
        Path(command.into).write_text("".join(s for s in text.splitlines(True) if not s.startswith("dtrain: ")))
    for line in SAID.findall(text):
        for said in commands(line, f"what `{command}` prints"):
            check_known(said)
    return None


def test_commands_without_placeholders_run_in_the_order_they_are_printed_in(folder):
    """The README's come first, as each builds on those before."""
    found = [c for c in ONCE.values() if not c.is_pattern and c.words[0] in ("cp", "dtrain", "deepspeed")]
    found = [c for c in found if "in prose" not in c.where]
    tried = set()
    troubles = [f"{c.where}: {c}: {trouble}" for c in found if (trouble := trouble_of(c, tried)) is not None]
    assert not troubles, "\n".join(troubles)
    assert len(tried) > 20
