"""From a YAML file and `key.sub=value` overrides to a Config, and from a mistake in them to one sentence."""

import difflib
import os
import re
from pathlib import Path
from typing import Any, ClassVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dtrain.addresses import one_config
from dtrain.config.addresses import problem_of
from dtrain.config.chosen import Chosen
from dtrain.config.earlier import EARLIER, FORMER_DEFAULTS, missing, with_earlier_values
from dtrain.config.run import Tracking
from dtrain.config.tree import Config
from dtrain.credentials import hide, lacks
from dtrain.errors import UserError
from dtrain.files import MOST_DEPTH, read_bytes

MOST_BYTES = 1 << 18  # of a config file
LONGEST_NUMBER = 400  # digits
MOST_VALUES = 50_000  # of a config with its aliases written out


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply `key.sub=value` overrides (values are YAML), validate.

    Raises UserError, one line, for a missing file, bad YAML, an unknown key or a wrong value.
    """
    path = Path(path)
    tree = read_tree(path)
    overridden = [_override(tree, item) for item in overrides]
    tree = _expand(tree, str(path))
    run = tree.get("run") or {}
    if isinstance(run, dict) and run.get("name") is None:
        if "run.name" in overridden:
            raise UserError("run.name is empty on the command line; leave it out for the config's own")
        if not re.fullmatch(r"[\w.\-]+", path.stem):
            raise UserError(
                f"{path} would name the run after itself, and a name has letters, digits, `.`, `_` and `-`; "
                "give it one with run.name="
            )
        tree["run"] = run | {"name": path.stem}
    config = validate(tree, str(path), overridden)
    _check_address(config.tracking, str(path), overridden)
    return config


def _check_address(tracking: Tracking, source: str, overridden: list[str]) -> None:
    """Refuse an address at which MLflow cannot be. A run that has one is still read: it has all but its curves."""
    given = "uri" in tracking.model_fields_set
    if tracking.uri and (given or tracking.enabled) and (problem := problem_of(tracking.uri)):
        where = f"`tracking.uri` {_origin('tracking.uri', source, overridden)}"
        raise UserError(f"{where if given else 'MLFLOW_TRACKING_URI in the environment'}: {problem}")


def load_kept(path: str | Path) -> Config:
    """The config.yaml of a run; a key that it lacks means what was done before the key existed. Raises as `load`."""
    path = Path(path)
    return validate(with_earlier_values(_expand(read_tree(path), str(path), required=False)), str(path))


def continued(config: Config, kept: str | Path) -> Config:
    """`config` for a run that goes on and whose config.yaml is `kept`.

    A key that neither names means what was done before the key existed, and one that has a former default, which only
    `kept` names, keeps it: only a new run takes today's default.
    """
    tree = read_tree(Path(kept))
    values = {name: EARLIER[name].value for name in missing(tree)}
    values |= {name: was for name, was in FORMER_DEFAULTS.items() if _value(tree, name) == was}
    earlier: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, key = name.partition(".")
        if not key:
            continue  # a whole section, whose earlier meaning is its default
        ours = getattr(config, section)
        if key in type(ours).model_fields and key not in ours.model_fields_set:
            earlier.setdefault(section, {})[key] = value
    for section, values in earlier.items():
        ours = getattr(config, section)
        given = ours.model_dump(include=ours.model_fields_set) | values
        config = config.model_copy(update={section: type(ours).model_validate(given)})
    return config


def _value(tree: dict, name: str) -> Any:
    section, _, key = name.partition(".")
    keys = tree.get(section)
    return keys.get(key) if isinstance(keys, dict) else None


def read_tree(path: Path) -> dict:
    """The file as plain data, not validated. Raises UserError, one line."""
    try:
        text = read_bytes(path, MOST_BYTES).decode()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read the config {path}: {getattr(e, 'strerror', None) or e}") from None
    try:
        tree = _parse(text, str(path))
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where} is not valid YAML: {getattr(e, 'problem', None) or e}") from None
    if tree is None:
        raise UserError(f"{path} is empty; where `dtrain init` was to write it, that did not finish: run it again")
    if not isinstance(tree, dict):
        raise UserError(f"{path} must be a mapping of sections such as `data:` and `model:`")
    return tree


def _parse(text: str, source: str) -> Any:
    """Plain data. Raises yaml.YAMLError, and UserError for what would be too much of it."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        values, depth = _extent(node, {})
        if values > MOST_VALUES or depth > MOST_DEPTH:
            what = f"more than {MOST_VALUES:,} values" if values > MOST_VALUES else f"more than {MOST_DEPTH} levels"
            raise UserError(f"{source} has {what} with its aliases written out; a config needs no more: shorten it")
        return loader.construct_document(node)
    except RecursionError:
        raise UserError(f"{source} nests too deep, or holds itself by an alias; write its values out") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
        if isinstance(e, UserError):
            raise
        raise yaml.YAMLError(f"a value is not of its tag's form ({e})") from None
    finally:
        loader.dispose()


def _extent(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """(values, levels) of a node with its aliases written out, counted before anything is: ten lines can mean 10^10.

    known: by node; None of one that is being counted. Raises RecursionError for a node within itself.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1, 1
    if id(node) in known:
        if (found := known[id(node)]) is None:
            raise RecursionError
        return found
    known[id(node)] = None
    inner = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
    extents = [_extent(one, known) for one in inner]
    found = 1 + sum(values for values, _ in extents), 1 + max((levels for _, levels in extents), default=0)
    known[id(node)] = found
    return found


def validate(tree: dict, source: str, overridden: list[str] = ()) -> Config:
    """A Config from plain data; errors name `source`, or the command line for keys in `overridden`."""
    try:
        with one_config():
            return Config.model_validate(tree)
    except ValidationError as e:
        raise UserError(_explain(e, source, overridden)) from None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as a string, 11:45:00 as a number to base 60 and 2026-11-27 as a date; nobody means that."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":int", ":float", ":timestamp"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    if len(node.value) > LONGEST_NUMBER:
        raise yaml.constructor.ConstructorError(None, None, "a number is too long", node.start_mark)
    return loader.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0b[01_]+|0x[\da-fA-F_]+|0[0-7_]*|[1-9][\d_]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^([-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|(\d+\.?\d*|\.\d+)[eE][-+]?\d+)|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


def _override(tree: dict, item: str) -> str:
    key, eq, value = item.partition("=")
    if not eq or not all(key.split(".")):
        hint = " (options come before the config)" if item.startswith("-") else ""
        raise UserError(f"override {item!r} is not of the form key.sub=value{hint}")
    try:
        value = _parse(value, f"override {key}")
    except yaml.YAMLError:
        raise UserError(f"override {item!r}: the value is not valid YAML") from None
    *path, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate([*path, last]):
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                where = ".".join(key.split(".")[:depth])
                raise UserError(f"override {item!r}: `{where}` is a list of {len(node)}; use an index below that")
            part = int(part)
        elif not isinstance(node, dict):
            raise UserError(f"override {item!r}: `{'.'.join(key.split('.')[:depth])}` has no keys below it")
        if depth == len(path):
            node[part] = value
        else:
            if isinstance(node, dict) and node.get(part) is None:
                node[part] = {}
            node = node[part]
    return key


def _expand(node: Any, source: str, required: bool = True) -> Any:
    """Each ${NAME} by its value. required: raises UserError for one that is not set, which else stays as it is."""
    if isinstance(node, dict):
        return {k: _expand(v, source, required) for k, v in node.items()}
    if isinstance(node, list):
        return [_expand(v, source, required) for v in node]
    if not isinstance(node, str):
        return node

    def value(match: re.Match) -> str:
        if match[1] not in os.environ and not required:
            lacks(match[1])
            return match[0]  # a secret, that a run's config is kept without: most commands do not need it
        if match[1] not in os.environ:
            raise UserError(f"{source} uses ${{{match[1]}}}, but the environment variable {match[1]} is not set")
        hide(match[1], os.environ[match[1]])
        return os.environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", value, node)


def sections_of_field(field: FieldInfo) -> dict[str | None, type[BaseModel]]:
    """The sections a field may hold, those of plug-ins left out."""
    chosen = next((one for one in field.metadata if isinstance(one, Chosen)), None)
    return sections_of(field.annotation) if chosen is None else dict(chosen.built_in)


def sections_of(annotation: Any) -> dict[str | None, type[BaseModel]]:
    """The sections a field may hold, by the tag of its union; None where there is but one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        tag = next((f for name in ("name", "process", "kind") if (f := annotation.model_fields.get(name))), None)
        literal = get_args(tag.annotation) if tag is not None else ()
        return {literal[0] if literal and isinstance(literal[0], str) else None: annotation}
    found: dict[str | None, type[BaseModel]] = {}
    for part in get_args(annotation):
        found |= sections_of(part)
    return found


def _walk(location: list[str]) -> tuple[list[str], list[str]]:
    """(the location without the tags of unions, the keys allowed there; none where there is no section)."""
    key, choices, keys = [], {None: Config}, []
    for part in location:
        section = choices.get(part) if part in choices and len(choices) > 1 else None
        if section is not None:  # a union's tag, which nobody wrote
            choices = {None: section}
            continue
        if part.isdigit():
            key.append(part)
            continue
        if not choices:  # inside a value: a branch of its type, which nobody wrote either
            continue
        key.append(part)
        section = next(iter(choices.values()), None)
        field = section.model_fields.get(part) if section is not None else None
        choices = sections_of_field(field) if field is not None else {}
    if len(choices) == 1:
        keys = list(next(iter(choices.values())).model_fields)
    return key, keys


def _origin(key: str, source: str, overridden: list[str]) -> str:
    given = any(o == key or key.startswith(o + ".") or o.startswith(key + ".") for o in overridden)
    return "on the command line" if given else f"in {source}"


def _explain(error: ValidationError, source: str, overridden: list[str]) -> str:
    """The first problem as one sentence: the key, where it came from, what is wrong, the nearest fix."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")  # a typo also makes its key missing
    location, _ = _walk([str(part) for part in first["loc"]])
    _, known = _walk([str(part) for part in first["loc"][:-1]])
    key = ".".join(location)
    origin = _origin(key, source, overridden)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], known, n=1)
        if near:
            return f"unknown key `{key}` {origin}; did you mean `{'.'.join([*location[:-1], near[0]])}`?"
        return f"unknown key `{key}` {origin}" + (f"; known here: {', '.join(known)}" if known else "")
    if first["type"].startswith("union_tag"):
        *others, last = sections_of_field(Config.model_fields[key])
        kinds = f"{', '.join(others)} or {last}"
        tag = {"model": "name", "diffusion": "process"}[key]
        if isinstance(first["input"], dict) and tag in first["input"]:
            return f"`{key}.{tag}` {origin} is {first['input'][tag]!r}: take {kinds}"
        return f"`{key}.{tag}` is missing {origin}: take {kinds}"
    if first["type"] == "missing":
        return f"`{key}` is missing {origin}"
    message = first["msg"].removeprefix("Value error, ")
    if not key:
        return f"{source}: {message}"
    if first["type"] == "value_error":
        return f"`{key}` {origin}: {message}"
    message = message[0].lower() + message[1:]
    return f"`{key}` {origin} is {first['input']!r}: {message}"
