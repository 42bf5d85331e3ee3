"""Reads dataclasses of settings from what a file holds, and writes their JSON Schema, both by pydantic.

`evenkeel.settings` says how fields are described. Every problem of a file is found at once, and each names its field.
"""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema

from evenkeel.errors import ConfigurationError
from evenkeel.settings import UNKNOWN, FieldError, bounds, file_name, joined, shown

__all__ = ["Problem", "ProblemsError", "Schema"]

Settings = TypeVar("Settings")

_WORDS = {
    "bool_type": "expected true or false",
    "string_type": "expected a text",
    "string_too_short": "expected a text",
    "dataclass_type": "expected fields",
    "tuple_type": "expected a list",
}
_NUMBERS = ("int_type", "int_from_float", "float_type", "greater_than_equal", "less_than_equal")


@dataclass(frozen=True)
class Problem:
    """Says what is wrong in a configuration, and in which field."""

    place: tuple[str | int, ...]
    text: str

    def __str__(self) -> str:
        return f"{joined(self.place) or 'configuration'}: {self.text}"


class ProblemsError(ConfigurationError):
    """Holds all that is wrong in a configuration; its message has a line for each."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, problems)))


class Schema(Generic[Settings]):
    """Reads one dataclass of settings.

    Args:
        settings: the dataclass.
        prepare: brings older and shorter forms of the mapping into fields; one field's are a `Form` beside its type.
    """

    def __init__(self, settings: type[Settings], prepare: Callable[[Mapping[str, Any]], Any] = dict) -> None:
        self._settings = settings
        self._prepare = prepare

    @cached_property
    def _adapter(self) -> TypeAdapter[Settings]:
        # Dataclasses within take the configuration of the one that they are in.
        self._settings.__pydantic_config__ = {"extra": "forbid", "alias_generator": file_name}  # type: ignore[attr-defined]
        return TypeAdapter(self._settings)

    def read(self, raw: Any, folder: Path = Path()) -> Settings:
        """Gives the settings that a mapping of a file in `folder` says.

        Raises:
            ProblemsError: names each field that is wrong.
        """
        if not isinstance(raw, Mapping):
            raise ProblemsError([Problem((), f"expected fields, found {shown(raw)}")])
        try:
            return self._adapter.validate_python(self._prepare(raw), context=folder)
        except FieldError as error:
            raise ProblemsError([Problem(error.place, error.text)]) from None
        except ValidationError as error:
            found = error.errors(include_url=False)
        raise ProblemsError([self._problem(one) for one in found])

    def json_schema(self) -> dict[str, Any]:
        """Gives the JSON Schema of such a file."""
        return deepcopy(self._written)

    @cached_property
    def _written(self) -> dict[str, Any]:
        schema = self._adapter.json_schema(schema_generator=_Untitled)
        properties = schema["properties"]
        for name in [one for one in properties if "." in one]:
            section, inner = name.split(".")
            _fields(schema, (section,))[inner] = properties.pop(name)
        for section in schema.get("$defs", {}).values():
            section["additionalProperties"] = False
            section.pop("title")
            section.pop("description", None)  # how code sees it; its field says what it is for
            _show_defaults(section["properties"])
        schema.pop("title")
        schema.pop("description", None)
        _show_defaults(properties)
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}

    def _problem(self, error: Any) -> Problem:
        place, text, kind = tuple(error["loc"]), str(error["msg"]), error["type"]
        place = tuple(part for name in place for part in (name.split(".") if isinstance(name, str) else (name,)))
        if kind == "value_error":
            why = error["ctx"]["error"]
            text = str(why)
            if isinstance(why, FieldError):
                place, text = (*place, *why.place), why.text
        elif kind == "missing":
            text = "is missing"
        elif kind != "unexpected_keyword_argument":
            words = _WORDS.get(kind, text.replace("Input should be", "must be"))
            if kind in _NUMBERS and place:
                words = f"expected {_numbers(_fields(self._written, place[:-1]).get(place[-1], {}))}"
            text = f"{words}, found {shown(error['input'])}"
        if kind == "unexpected_keyword_argument" or text == UNKNOWN:
            known = ", ".join(_fields(self._written, place[:-1]))
            text = f"{UNKNOWN}; known are {known}"
        return Problem(place, text)


class _Untitled(GenerateJsonSchema):
    """Leaves out titles, which would only repeat the names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _show_defaults(properties: Mapping[str, dict[str, Any]]) -> None:
    """Writes defaults as a file would; what is not given by default, and sections, have none."""
    for one in properties.values():
        default = one.get("default")
        if default is None or default == "" or isinstance(default, dict) or default == []:
            one.pop("default", None)
            continue
        units = {form["x-unit"] for form in one.get("anyOf", ()) if "x-unit" in form}
        if units & {"seconds"}:
            one["default"] = f"{default:g}s" if default >= 1 or not default else f"{default * 1e3:g}ms"
        elif units & {"bytes"} and default % (1 << 20) == 0:
            one["default"] = f"{default >> 20}MiB"


def _numbers(schema: Mapping[str, Any]) -> str:
    """Says which numbers a field's schema takes."""
    forms = [schema, *schema.get("anyOf", ())]
    number: Mapping[str, Any] = next((one for one in forms if one.get("type") in ("integer", "number")), {})
    unit = next((f" ({one['x-unit']})" for one in forms if "x-unit" in one), "")
    noun = "a whole number" if number.get("type") == "integer" else "a number"
    return noun + (bounds(number["minimum"], number.get("maximum", math.inf)) if "minimum" in number else "") + unit


def _fields(schema: Mapping[str, Any], place: tuple[str | int, ...]) -> dict[str, Any]:
    """Gives the fields of the section at a place, as the schema has them; none where it has no section there."""
    found: list[Any] = [schema]
    for part in (*place, None):
        at, found = found, []
        while at:
            one = at.pop()
            at += one.get("anyOf", ())
            if "$ref" in one:
                at.append(schema["$defs"][one["$ref"].rpartition("/")[2]])
            if part is None:
                found += [one["properties"]] if "properties" in one else []
            elif isinstance(part, int):
                found += [one["items"]] if "items" in one else []
            else:
                found += [one["properties"][part]] if part in one.get("properties", ()) else []
    return found[0] if found else {}
