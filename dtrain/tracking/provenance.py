"""What an attempt was started with: the code's commit and what differs from it, packages, DeepSpeed's configuration."""

import getpass
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import dtrain
from dtrain.credentials import masked, redacted_diff, shown_argument

MOST_DIFFERENCE = 1_000_000  # characters
# A repository's own configuration names programs that git would run. It may be anybody's: whoever starts a run in a
# folder that was downloaded has not asked for them.
_HARMLESS = ("-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")
_DIFF = ("diff", "--no-color", "--no-ext-diff", "--no-textconv", "--ignore-submodules=all", "HEAD")


def provenance(run: Path, attempt: int, deepspeed: dict[str, Any]) -> dict[str, Any]:
    """For the journal's "attempt" line: who, where, which commit; long things in files of RUN/attempts/<attempt>/."""
    folder = run / "attempts" / str(attempt)
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        "host": socket.gethostname(),
        "user": _user(),
        "command": Path(sys.argv[0]).name,
        "command_line": command_line(sys.argv),
        "job": os.environ.get("SLURM_JOB_ID"),
    }
    files = {"packages.txt": packages(), "deepspeed.json": json.dumps(masked(deepspeed), indent=2, default=str) + "\n"}
    commit, difference = code()
    if commit is not None:
        found |= {"commit": commit, "uncommitted": bool(difference)}
        if difference:
            files["uncommitted.diff"] = difference
    for name, text in files.items():
        (folder / name).write_text(text)
    found["artifacts"] = [f"attempts/{attempt}/{name}" for name in files]
    return {key: value for key, value in found.items() if value is not None}


def command_line(argv: list[str]) -> str:
    """What this process was started with, to be given to a shell again: without secrets, and without what a launcher
    adds for a rank.
    """
    program = Path(argv[0]).name if shutil.which(Path(argv[0]).name) == argv[0] else argv[0]
    return shlex.join([program, *(shown_argument(a) for a in argv[1:] if not a.startswith("--local_rank"))])


def packages() -> str:
    """Python and every installed package, as a requirements file that pip reads."""
    there = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    lines = [f"{name}=={version}" for name, version in sorted(there.items(), key=lambda item: item[0].lower())]
    return "\n".join([f"# Python {platform.python_version()} on {platform.platform()}", *lines]) + "\n"


def code(places: Iterable[Path] | None = None) -> tuple[str | None, str]:
    """(commit, what the working tree differs by) of the first place in a git repository, or (None, "").

    places: where dtrain lies, then the current folder.
    """
    for place in places or (Path(dtrain.__file__).parent, Path.cwd()):
        commit = _git(place, "rev-parse", "HEAD")
        if commit:
            difference = _git(place, *_HARMLESS, *_filters_off(place), *_DIFF) or ""
            return commit.strip(), redacted_diff(difference[:MOST_DIFFERENCE])
    return None, ""


def _filters_off(place: Path) -> list[str]:
    """Options that silence every filter which the repository's configuration names: each is a command."""
    names = _git(place, "config", "--name-only", "--get-regexp", r"^filter\.") or ""
    drivers = {key.rpartition(".")[0] for key in names.splitlines()}
    return [
        word
        for driver in sorted(drivers)
        for key, value in (("clean", ""), ("process", ""), ("smudge", ""), ("required", "false"))
        for word in ("-c", f"{driver}.{key}={value}")
    ]


def _git(place: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(place), *arguments]
        done = subprocess.run(command, capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return None  # a number without a name, as in many containers
