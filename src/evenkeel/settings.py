"""Describes the fields of settings, each in one place: its type, its bounds, its default and what it is for.

A dataclass of settings says so in its fields:

    @dataclass(frozen=True)
    class ProbeSettings:
        pause_s: Seconds = setting(1.0, "Time before the first probe.")
        probes: int = setting(2, "Good probes that bring a replica back.", low=1, high=100)

**To add a field** write one such line. Its name in files is the attribute's without `_s` or `_bytes`, which stand for
the unit; `name` says another. **To add a section** write such a dataclass, and one line where it belongs:

    probes: ProbeSettings = setting(ProbeSettings(), "When a replica is probed.")

Numbers, truths and texts are taken strictly: `"8000"` is no number. `Seconds` also reads `50ms`, `Bytes` also `64MiB`,
`FilePath` is relative to the file's folder, `one_of` lists words, `tuple[str, ...]` is a list. Another way to write a
value is a `Form` beside its type. What concerns several fields is checked in `__post_init__`, by a `FieldError`.
Pydantic reads it all (`evenkeel.schema`); nothing here loads it.
"""

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, get_args

from evenkeel.errors import ConfigurationError
from evenkeel.text_values import read_duration_s, without_password

__all__ = [
    "UNKNOWN",
    "Bytes",
    "FieldError",
    "FilePath",
    "FileText",
    "Form",
    "Seconds",
    "bounds",
    "check_fields",
    "checked",
    "file_name",
    "joined",
    "one_of",
    "read_name",
    "setting",
    "shown",
]

Place = str | tuple[str | int, ...]
UNKNOWN = "unknown field"
_MAX_SHOWN = 200  # characters of a value that is wrong
_SIZES = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def setting(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    name: str = "",
    shown_default: Any = None,
) -> Any:
    """Describes a field of a dataclass of settings.

    Args:
        default: its value where none is given; `...` where one must be.
        doc: what it is for, in one or two sentences.
        low: the least value of a number.
        high: its largest value.
        name: in files, where it is not the attribute's.
        shown_default: what a file would hold for the default, where that is something else.
    """
    metadata: dict[str, Any] = {"description": doc}
    metadata |= {} if low is None else {"ge": low}
    metadata |= {} if high is None else {"le": high}
    strict = isinstance(default, (bool, int, float, str)) or low is not None
    metadata |= {"strict": True} if strict else {}
    metadata |= {"min_length": 1} if isinstance(default, str) else {}
    metadata |= {"alias": name} if name else {}
    metadata |= {} if shown_default is None else {"json_schema_extra": {"default": shown_default}}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def file_name(attribute: str) -> str:
    """Gives the name in files of an attribute: without the unit, which files write beside the value."""
    return attribute.removesuffix("_bytes").removesuffix("_s")


class _Short(reprlib.Repr):
    """Writes values without passwords, and only a little of one that is long, deep or repeated by aliases."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxdict, self.maxother = 3, 4, 4, _MAX_SHOWN
        self.maxstring = _MAX_SHOWN

    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(without_password(x), level)


_SHORT = _Short()


def shown(value: object) -> str:
    """Gives a value as messages show it: in short, and without passwords."""
    text = _SHORT.repr(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


class FieldError(ConfigurationError, ValueError):
    """Says what is wrong with a field of a section, and which one it is."""

    def __init__(self, place: Place, text: str) -> None:
        self.place = (place,) if isinstance(place, str) else place
        self.text = text
        super().__init__(f"{joined(self.place)}: {text}" if self.place else text)


def joined(place: tuple[str | int, ...]) -> str:
    """Gives a place as messages write it: `replicas.urls[0]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def bounds(low: float, high: float) -> str:
    """Says between which bounds a number must be."""
    return f" of at least {low:.10g}" if math.isinf(high) else f" from {low:.10g} to {high:.10g}"


def check_fields(settings: Any, where: str) -> None:
    """Refuses numbers beyond their bounds in an instance that code made; None is left alone where it is the default.

    Raises:
        FieldError: names the attribute, as one of `where`.
    """
    for one in fields(settings):
        value, low, high = getattr(settings, one.name), one.metadata.get("ge"), one.metadata.get("le", math.inf)
        if low is None or (value is None and one.default is None):
            continue
        whole = int in (one.type, *get_args(one.type))
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            noun = "a whole number" if whole else "a number"
            raise FieldError((where, one.name), f"expected {noun}{bounds(low, high)}, found {shown(value)}")


@dataclass(frozen=True, eq=False)
class Form:
    """Stands beside a type that files may write in more than one way.

    Attributes:
        read: gives the value for what the file holds, from (that, reader of the plain form, folder of the file).
        forms: JSON Schemas of the other forms.
        extra: properties that `read` takes out before it reads the plain form, as JSON Schemas.
        hidden: attributes of the plain form that files cannot say.
        schema: replaces the plain form's; then its reader is None.
    """

    read: Callable[[Any, Any, Path], Any]
    forms: tuple[Mapping[str, Any], ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    hidden: tuple[str, ...] = ()
    schema: Mapping[str, Any] | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Tells pydantic how the value is read."""
        from pydantic_core import core_schema

        def read(raw: Any, plain: Any, info: Any) -> Any:
            for name in self.hidden:
                if isinstance(raw, Mapping) and file_name(name) in raw:
                    raise FieldError(file_name(name), UNKNOWN)
            try:
                return self.read(raw, plain, info.context or Path())
            except FieldError:
                raise
            except ConfigurationError as error:
                raise ValueError(str(error)) from None

        inner = handler(source) if self.schema is None else core_schema.any_schema()
        return core_schema.with_info_wrap_validator_function(read, inner)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        """Tells pydantic what a file may hold."""
        plain = handler(schema["schema"]) if self.schema is None else dict(self.schema)
        if self.extra or self.hidden:
            properties = handler.resolve_ref_schema(plain)["properties"]
            properties.update(self.extra)
            for name in self.hidden:
                properties.pop(file_name(name), None)
        return {"anyOf": [*map(dict, self.forms), plain]} if self.forms else plain


def one_of(words: Mapping[str, Any] | Sequence[str]) -> Form:
    """Gives the form of a value that files write as one of some words; a mapping says what they stand for."""
    meanings = words if isinstance(words, Mapping) else dict(zip(words, words, strict=True))

    def read(raw: Any, plain: Any, folder: Path) -> Any:
        if not isinstance(raw, str) or raw not in meanings:
            raise ConfigurationError(f"must be {' or '.join(words)}, found {shown(raw)}")
        return meanings[raw]

    return Form(read, schema={"enum": list(words)})


def checked(check: Callable[[Any], object]) -> Form:
    """Gives the form of a value that `check` refuses by a ConfigurationError where it is wrong."""

    def read(raw: Any, plain: Any, folder: Path) -> Any:
        value = plain(raw)
        check(value)
        return value

    return Form(read)


def _seconds(raw: Any, plain: Any, folder: Path) -> float:
    if not isinstance(raw, str):
        return float(plain(raw))
    try:
        return float(plain(read_duration_s(raw, "")))
    except ConfigurationError:
        raise ConfigurationError(f"expected a time such as 0.2, 2s or 200ms, found {shown(raw)}") from None


def _bytes(raw: Any, plain: Any, folder: Path) -> int:
    if isinstance(raw, str) and raw[-3:] in _SIZES and raw[:-3].strip().isdecimal() and len(raw) < 30:
        raw = int(raw[:-3]) * _SIZES[raw[-3:]]
    if not isinstance(raw, int) or isinstance(raw, bool):
        raise ConfigurationError(f"expected a size like 64MiB, found {shown(raw)}")
    return int(plain(raw))


def read_name(raw: Any) -> str:
    """Reads a text that names something, such as a file.

    Raises:
        ConfigurationError: it is no text, is empty, or holds a zero, which no name of a file has.
    """
    if not isinstance(raw, str) or not raw or "\0" in raw:
        raise ConfigurationError(f"expected a text, found {shown(raw)}")
    return raw


def _path(raw: Any, plain: Any, folder: Path) -> Path:
    return folder / read_name(raw)


_PATH = {"type": "string", "minLength": 1, "format": "path"}
_TIME = {"type": "string", "pattern": r"^\s*[0-9.]+(e-?[0-9]+)?\s*(us|ms|s|min)?$", "x-unit": "seconds"}
Seconds = Annotated[float, Form(_seconds, (_TIME,))]
Bytes = Annotated[int, Form(_bytes, ({"type": "string", "pattern": "^[0-9]+ *[KMG]iB$", "x-unit": "bytes"},))]
FilePath = Annotated[Path, Form(_path, schema=_PATH)]
FileText = Annotated[
    str, Form(lambda *given: str(_path(*given)), schema=_PATH)
]  # the same for attributes that are texts
