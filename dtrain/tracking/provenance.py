"""What an attempt was started with: the code's commit and what differs from it, packages, DeepSpeed's configuration."""

import getpass
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import dtrain
from dtrain.credentials import without_credentials

MOST_DIFFERENCE = 1_000_000  # characters


def provenance(run: Path, attempt: int, deepspeed: dict[str, Any]) -> dict[str, Any]:
    """For the journal's "attempt" line: who, where, which commit; long things in files of RUN/attempts/<attempt>/."""
    folder = run / "attempts" / str(attempt)
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        "host": socket.gethostname(),
        "user": _user(),
        "command": Path(sys.argv[0]).name,
        "job": os.environ.get("SLURM_JOB_ID"),
    }
    files = {"packages.txt": packages(), "deepspeed.json": json.dumps(deepspeed, indent=2, default=str) + "\n"}
    commit, difference = code()
    if commit is not None:
        found |= {"commit": commit, "uncommitted": bool(difference)}
        if difference:
            files["uncommitted.diff"] = difference
    for name, text in files.items():
        (folder / name).write_text(text)
    found["artifacts"] = [f"attempts/{attempt}/{name}" for name in files]
    return {key: value for key, value in found.items() if value is not None}


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
            difference = _git(place, "diff", "--no-color", "--no-ext-diff", "HEAD") or ""
            return commit.strip(), without_credentials(difference[:MOST_DIFFERENCE])
    return None, ""


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
