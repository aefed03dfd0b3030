"""Sections of which a configuration chooses one, or several, by name: the package's own and those of plug-ins."""

from typing import Any

from pydantic import GetCoreSchemaHandler, ValidationError
from pydantic_core import core_schema

from dtrain import plugins
from dtrain.config.sections import Section


class Chosen:
    """Annotates a field that holds one section, chosen by its key `kind`, or with `by_name` several, by their names.

    kind: of part, as plug-ins register it. built_in: name → section of the package's own.
    """

    def __init__(self, kind: str, built_in: dict[str, type[Section]], by_name: bool = False):
        self.kind, self.built_in, self.by_name = kind, built_in, by_name

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._sections if self.by_name else self._section,
            serialization=core_schema.plain_serializer_function_ser_schema(self._dumped, info_arg=True),
        )

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        found = [handler(section.__pydantic_core_schema__) for section in self.built_in.values()]
        return found[0] if len(found) == 1 else {"anyOf": found} if found else {"type": "object"}

    def _section(self, value: Any) -> Section:
        if isinstance(value, Section):
            return value
        if not isinstance(value, dict):
            raise ValueError(f"{value!r} is no section, which begins with its `kind`")
        return self._validated(value.get("kind", next(iter(self.built_in), None)), value)

    def _sections(self, value: Any) -> dict[str, Section]:
        if not isinstance(value, dict):
            raise ValueError(f"{value!r} is no mapping of names to sections")
        return {
            name: one if isinstance(one, Section) else self._validated(_kind(name, one), one or {}, name)
            for name, one in value.items()
        }

    def _validated(self, chosen: Any, value: dict[str, Any], name: str | None = None) -> Section:
        section = self.built_in.get(chosen) or plugins.find(self.kind, str(chosen))
        if section is None:
            raise ValueError(plugins.unknown(self.kind, str(chosen), self.built_in))
        try:
            return section.model_validate(value)
        except ValidationError as e:
            first = e.errors()[0]
            key = ".".join(str(part) for part in (*([name] if name else []), *first["loc"]))
            message = first["msg"].removeprefix("Value error, ")
            if first["type"] == "extra_forbidden":
                known = ", ".join(section.model_fields)
                raise ValueError(f"unknown key {key}; known are {known}") from None
            if first["type"] == "missing":
                raise ValueError(f"{key} is missing, which {chosen} needs") from None
            raise ValueError(f"{key} is {first['input']!r}: {message}" if key else message) from None

    @staticmethod
    def _dumped(value: Any, info: Any) -> Any:
        if isinstance(value, dict):
            return {name: one.model_dump(mode=info.mode) for name, one in value.items()}
        return value.model_dump(mode=info.mode)


def _kind(name: str, value: Any) -> Any:
    """What a section under this name is: what its `kind` says, else what the name says."""
    return value.get("kind", name) if isinstance(value, dict) else name
