"""Plug-ins get in by an entry point of an installed package, a file or a module; never by a name in a config."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain import plugins

REGISTERS = 'from dtrain import plugins\nplugins.register("features", {name!r}, lambda *a: None)\n'
ASKS = "from dtrain import plugins; print(plugins.names('features'))"


def asked(*paths: Path, **environment) -> str:
    """What a fresh Python with these folders on its path finds."""
    path = os.pathsep.join([*map(str, paths), str(Path(plugins.__file__).parent.parent)])
    environment = os.environ | {"PYTHONPATH": path} | environment
    done = subprocess.run([sys.executable, "-c", ASKS], env=environment, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def installed(folder: Path, package: str) -> Path:
    """A package as pip leaves it: a module and its metadata, whose entry point is the one line that registers it."""
    (folder / f"{package}.py").write_text(REGISTERS.format(name=package))
    metadata = folder / f"{package}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[dtrain.plugins]\n{package} = {package}\n")
    return folder


def test_an_installed_packages_parts_are_there_without_being_named(tmp_path):
    assert asked(installed(tmp_path, "their_features")) == "['their_features']"


def test_files_and_modules_are_named_with_commas_between(tmp_path):
    (tmp_path / "of_a_file.py").write_text(REGISTERS.format(name="a"))
    (tmp_path / "of_a_module.py").write_text(REGISTERS.format(name="b"))
    named = f"{tmp_path}/of_a_file.py, of_a_module"
    assert asked(tmp_path, DTRAIN_PLUGINS=named) == "['a', 'b']"
    assert asked(tmp_path) == "[]"  # what merely lies there is not imported


def test_two_parts_of_one_name_are_a_mistake_of_theirs(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(REGISTERS.format(name="same"))
    said = asked(DTRAIN_PLUGINS=f"{tmp_path}/one.py,{tmp_path}/two.py")
    assert "the plug-in" in said
    assert "two plug-ins call their features 'same'" in said


def test_a_kind_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="'samplers' is no kind of part; there are objective, condition"):
        plugins.register("samplers", "x", None)


def test_named_ones_reach_the_processes_that_are_started(monkeypatch):
    monkeypatch.setenv(plugins.VARIABLE, "a,b")
    plugins.name_also(["b", "c"])
    assert os.environ[plugins.VARIABLE] == "a,b,c"
