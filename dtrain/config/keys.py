"""Every key of the configuration: its type, its default and what it does, as the sections say it."""

import ast
import difflib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_origin

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dtrain.config.reading import sections_of_field
from dtrain.config.tree import Config
from dtrain.errors import UserError


@dataclass(frozen=True)
class Key:
    """One key; prints as two lines."""

    name: (
        str  # with its sections, as it is overridden; `[]` stands for a place in a list, NAME for a name of the user's
    )
    of: str | None  # the model or process that has it, where a section is one of several
    type: str
    default: str | None  # as YAML; None: it must be given
    about: str

    def __str__(self) -> str:
        of = f" (of {self.of})" if self.of else ""
        default = "required" if self.default is None else f"default {self.default}"
        return f"{self.name}{of}: {self.type}, {default}\n    {self.about}"


def keys() -> list[Key]:
    """All of them, in the order of the sections."""
    return list(_keys(Config, "", None))


def sections() -> dict[str, str]:
    """The name of each section and what it is about."""
    return docstrings(Config)


def find(name: str) -> list[Key]:
    """The keys of a section, a key by its whole name, or all keys of a last name. Raises UserError for what is none."""
    known = keys()
    bare = [key.name.replace("[]", "") for key in known]
    for chosen in (
        [key for key, own in zip(known, bare, strict=True) if own == name or own.startswith(f"{name}.")],
        [key for key, own in zip(known, bare, strict=True) if own.endswith(f".{name}")],
    ):
        if chosen:
            return chosen
    near = difflib.get_close_matches(name, [*sections(), *bare], n=1) or difflib.get_close_matches(
        name.rpartition(".")[2], [own.rpartition(".")[2] for own in bare], n=1
    )
    hint = f"; did you mean `{near[0]}`?" if near else f"; the sections are {', '.join(sections())}"
    raise UserError(f"there is no section or key `{name}`{hint}")


def docstrings(section: type[BaseModel]) -> dict[str, str]:
    """The string below each key of a section.

    Read from the source where somebody asks: pydantic's own `use_attribute_docstrings` reads it in every process that
    imports the sections, which costs each command and each rank 40 ms.
    """
    found: dict[str, str] = {}
    for one in reversed(section.__mro__):
        if not one.__module__.startswith("dtrain."):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        for key, below in pairwise(tree.body):
            if isinstance(key, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                found[key.target.id] = inspect.cleandoc(below.value.value)
    return found


def _keys(section: type[BaseModel], prefix: str, of: str | None) -> Iterator[Key]:
    about, schema = docstrings(section), section.model_json_schema()["properties"]
    for name, field in section.model_fields.items():
        key, inner = f"{prefix}{name}", sections_of_field(field)
        if not prefix and not inner:
            continue  # a section that plug-ins alone fill
        if not inner or prefix:  # a section within a section, such as data.mix, is a key itself
            yield Key(key, of, _type(schema[name]), _default(field), about[name])
        place = {list: "[].", dict: ".NAME."}.get(get_origin(field.annotation), ".")
        for tag, one in inner.items():
            yield from _keys(one, f"{key}{place}", tag or of)


def _default(field: Any) -> str | None:
    if field.default_factory is not None or isinstance(field.default, BaseModel):
        return "see below"
    if field.default is PydanticUndefined:
        return None
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    return yaml.safe_dump(default, default_flow_style=True).removesuffix("...\n").strip()


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if several := schema.get("anyOf", schema.get("oneOf")):
        return " | ".join(dict.fromkeys(_type(one) for one in several))
    if "$ref" in schema:
        return "section"
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    match schema.get("type"):
        case "integer" | "number":
            return " ".join([schema["type"], _bounds(schema)]).strip()
        case "boolean":
            return "true | false"
        case "string":
            return "text"
        case "array" if "prefixItems" in schema:
            return f"[{', '.join(_type(one) for one in schema['prefixItems'])}]"
        case "array" if "$ref" not in schema["items"]:
            return f"list of {_type(schema['items'])}"
        case "array":
            return "list"
        case other:
            return {"object": "mapping", "null": "null"}[other]


def _bounds(schema: dict[str, Any]) -> str:
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    if "minimum" in schema and "maximum" in schema:
        return f"{schema['minimum']} to {schema['maximum']}"
    return " and ".join(f"{sign} {schema[name]}" for name, sign in signs.items() if name in schema)
