"""Parts that come from outside the package: objectives, conditions, first stages, samplers, features, fields.

    from dtrain import plugins
    plugins.register("sampler", "leap", leap)

A module that registers parts is an entry point of the group `dtrain.plugins` of an installed package, or is named by
`--plugin` or DTRAIN_PLUGINS: a Python file or a module, several with commas between. What is imported depends on these
alone. A name in a configuration imports nothing, because other people's configurations are read back.
"""

import hashlib
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from dtrain.errors import UserError

GROUP = "dtrain.plugins"
VARIABLE = "DTRAIN_PLUGINS"
KINDS = ("objective", "condition", "first_stage", "sampler", "features", "field")
WORDS = {"first_stage": "first stage", "features": "extractor"}  # where a kind's own name is no word for one

_parts: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
_modules: dict[str, ModuleType] = {}  # by what named them
_seen_installed = False


def register(kind: str, name: str, part: Any) -> None:
    """Make a part known under the name that a configuration uses.

    kind: one of KINDS. part: for an objective, a condition, a first stage or a field a `Section` whose `build(config)`
    gives it; for a sampler and for features see docs/extending.md. Raises ValueError for another kind, or for a name
    that another part has.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of part; there are {', '.join(KINDS)}")
    other = _parts[kind].setdefault(name, part)
    if other is not part:
        raise ValueError(f"two plug-ins call their {kind} {name!r}")


def find(kind: str, name: str) -> Any | None:
    """The part that was registered under this name; None where there is none. Raises UserError as `load`."""
    load()
    return _parts[kind].get(name)


def names(kind: str) -> list[str]:
    """The names of all registered parts of a kind, sorted."""
    load()
    return sorted(_parts[kind])


def unknown(kind: str, name: str, built_in: Iterable[str]) -> str:
    """What to say of a name that no part has."""
    known = ", ".join([*built_in, *names(kind)]) or "none"
    return (
        f"{name!r} is no {WORDS.get(kind, kind)} that is known here ({known}); if a plug-in brings it, name the "
        f"plug-in with --plugin or {VARIABLE}"
    )


def name_also(modules: Iterable[str]) -> None:
    """Name further plug-ins, in this process and in all that it starts."""
    os.environ[VARIABLE] = ",".join(dict.fromkeys([*_named(), *modules]))


def arguments() -> list[str]:
    """The options of a command that name the plug-ins that are named here: a job may start in another environment."""
    return [f"--plugin={name}" for name in _named()]


def load() -> None:
    """Import the plug-ins that are installed or named, each once. Raises UserError for one that cannot be imported."""
    global _seen_installed
    from importlib.metadata import entry_points  # which most commands never ask

    if not _seen_installed:
        _seen_installed = True
        for entry in entry_points(group=GROUP):
            _import(entry.name, entry.load)
    for name in _named():
        if name not in _modules:
            _import(name, partial(_from_file, name) if name.endswith(".py") else partial(importlib.import_module, name))


def digests() -> dict[str, str]:
    """Plug-in → the sha256 of its file, of all that have been imported: ranks compare them."""
    load()
    found = {}
    for name, module in _modules.items():
        file = getattr(module, "__file__", None)
        found[Path(name).name] = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else "no file"
    return found


def _named() -> list[str]:
    return [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]


def _import(name: str, load_module: Callable[[], ModuleType]) -> None:
    try:
        _modules[name] = load_module()
    except Exception as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"the plug-in {name} cannot be imported: {reason}") from e


def _from_file(place: str) -> ModuleType:
    from importlib.util import module_from_spec, spec_from_file_location

    path = Path(place).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no such file (from {Path.cwd()})")
    name = f"dtrain_plugin_{path.stem}"
    spec = spec_from_file_location(name, path)
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
