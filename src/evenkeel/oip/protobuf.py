"""Reads and writes messages in the wire format of Protocol Buffers, by tables that say which fields a message has.

A field is a number and a type, then a varint, 4 or 8 bytes, or a length and so many bytes. What is not in a table is
skipped, as the format wants.
"""

from collections.abc import Iterable, Mapping
from struct import Struct
from typing import Any

from evenkeel.errors import RequestError

__all__ = [
    "BYTES",
    "FIXED32",
    "FIXED64",
    "VARINT",
    "FieldKind",
    "MessageTable",
    "read",
    "read_fields",
    "text",
    "write",
    "write_field",
]

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

# A field's kind: a scalar by its name; a message by its own table; a list of one kind for a repeated field;
# `{"map": kind}` for a map from strings; a tuple of the names of an enumeration's values, from 0 on.
FieldKind = Any
MessageTable = Mapping[Any, tuple[str, FieldKind]]

_MAX_FIELDS = 10_000  # of one message, without those inside it
_MAX_DEPTH = 8
_double = Struct("<d")
_float = Struct("<f")


def read_varint(message: bytes, position: int, end: int) -> tuple[int, int]:
    """Reads an unsigned integer; gives it and the place behind it.

    Raises:
        RequestError: it is cut off, or larger than 64 bits.
    """
    value = shift = 0
    while position < end and shift < 64:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, position
        shift += 7
    raise RequestError("the message is no valid protobuf: a number is cut off or too long")


def read_fields(message: bytes, start: int, end: int) -> list[tuple[int, int, int, int]]:
    """Finds the fields of the message that lies from `start` to `end`.

    Returns:
        For each its number, its wire type, and for VARINT its value and 0, otherwise where it begins and ends.

    Raises:
        RequestError: this is no message, or one with far more fields than any needs.
    """
    fields = []
    position = start
    while position < end:
        key = message[position]
        position += 1
        if key >= 0x80:
            key, position = read_varint(message, position - 1, end)
        wire = key & 7
        if wire == BYTES:
            if position < end and message[position] < 0x80:
                size = message[position]
                position += 1
            else:
                size, position = read_varint(message, position, end)
            begin, position = position, position + size
            fields.append((key >> 3, wire, begin, position))
        elif wire == VARINT:
            value, position = read_varint(message, position, end)
            fields.append((key >> 3, wire, value, 0))
        elif wire in (FIXED64, FIXED32):
            begin, position = position, position + (8 if wire == FIXED64 else 4)
            fields.append((key >> 3, wire, begin, position))
        else:
            raise RequestError(f"the message is no valid protobuf: wire type {wire} is not used")
        if position > end or key < 8:
            raise RequestError("the message is no valid protobuf: a field is cut off or has no number")
        if len(fields) > _MAX_FIELDS:
            raise RequestError(
                f"the message has more than {_MAX_FIELDS} fields one by one; send tensors as raw_input_contents"
            )
    return fields


def text(message: bytes, start: int, end: int) -> str:
    """Reads a string.

    Raises:
        RequestError: it is not UTF-8.
    """
    try:
        return message[start:end].decode()
    except UnicodeDecodeError:
        raise RequestError("the message is no valid protobuf: a string is not UTF-8") from None


def read(
    message: bytes, schema: MessageTable, start: int = 0, end: int | None = None, depth: int = 0
) -> dict[str, Any]:
    """Reads a message into a dict; fields that are not there are absent from it.

    Raises:
        RequestError: it is malformed.
    """
    if depth > _MAX_DEPTH:
        raise RequestError("the message is nested too deeply")
    found: dict[str, Any] = {}
    for number, wire, begin, stop in read_fields(message, start, len(message) if end is None else end):
        name, kind = schema.get(number, ("", None))
        if not name:
            continue
        if isinstance(kind, list):
            values = found.setdefault(name, [])
            if wire == BYTES and isinstance(kind[0], str) and kind[0] not in ("string", "bytes"):
                values += _read_packed(message, kind[0], begin, stop)
            else:
                values.append(_read_one(message, kind[0], wire, begin, stop, depth))
        elif isinstance(kind, dict) and "map" in kind:
            entry = _read_one(message, {1: ("key", "string"), 2: ("value", kind["map"])}, wire, begin, stop, depth)
            found.setdefault(name, {})[entry.get("key", "")] = entry.get("value", _empty(kind["map"]))
        else:
            found[name] = _read_one(message, kind, wire, begin, stop, depth)
    return found


def _empty(kind: FieldKind) -> Any:
    return {} if isinstance(kind, dict) else _WIRES[kind][1]


# Wire type of each scalar, and what it is when it is not there.
_WIRES: dict[str, tuple[int, Any]] = {
    "bool": (VARINT, False),
    "int32": (VARINT, 0),
    "int64": (VARINT, 0),
    "uint32": (VARINT, 0),
    "uint64": (VARINT, 0),
    "float": (FIXED32, 0.0),
    "double": (FIXED64, 0.0),
    "string": (BYTES, ""),
    "bytes": (BYTES, b""),
}


def _read_one(message: bytes, kind: FieldKind, wire: int, begin: int, stop: int, depth: int) -> Any:
    if isinstance(kind, dict):
        if wire == BYTES:
            return read(message, kind, begin, stop, depth + 1)
    elif isinstance(kind, tuple):
        if wire == VARINT:
            return kind[begin] if begin < len(kind) else kind[0]
    elif _WIRES[kind][0] == wire:
        if wire == VARINT:
            return _from_varint(kind, begin)
        if wire == BYTES:
            return text(message, begin, stop) if kind == "string" else message[begin:stop]
        return (_double if wire == FIXED64 else _float).unpack_from(message, begin)[0]
    raise RequestError("the message is no valid protobuf: a field has a wrong type")


def _from_varint(kind: str, value: int) -> int | bool:
    if kind == "bool":
        return bool(value)
    if kind in ("int32", "int64") and value >> 63:
        return value - (1 << 64)
    return value


def _read_packed(message: bytes, kind: str, position: int, end: int) -> list[Any]:
    values: list[Any] = []
    wire = _WIRES[kind][0]
    while position < end:
        if wire == VARINT:
            value, position = read_varint(message, position, end)
            values.append(_from_varint(kind, value))
        else:
            form = _double if wire == FIXED64 else _float
            if position + form.size > end:
                raise RequestError("the message is no valid protobuf: packed values are cut off")
            values.append(form.unpack_from(message, position)[0])
            position += form.size
        if len(values) > _MAX_FIELDS:
            raise RequestError(f"the message has more than {_MAX_FIELDS} values in one field")
    return values


def varint(value: int) -> bytes:
    """Writes an integer; a negative one takes ten bytes."""
    value &= 0xFFFFFFFFFFFFFFFF
    written = bytearray()
    while value >= 0x80:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)


def write_field(number: int, value: bytes) -> bytes:
    """Writes a string, bytes, a message, or packed values."""
    return b"%b%b%b" % (varint(number << 3 | BYTES), varint(len(value)), value)


def write(values: Mapping[str, Any], schema: MessageTable) -> bytes:
    """Writes a message; what the schema does not name is left out, and so is what has its default."""
    parts: list[bytes] = []
    for number, (name, kind) in schema.items():
        value = values.get(name)
        if value is None or (isinstance(kind, str) and not value):
            continue
        if isinstance(kind, list):
            parts += _write_list(number, kind[0], value)
        elif isinstance(kind, dict) and "map" in kind:
            entry = {1: ("key", "string"), 2: ("value", kind["map"])}
            parts += [write_field(number, write({"key": k, "value": v}, entry)) for k, v in value.items()]
        else:
            parts.append(_write_one(number, kind, value))
    return b"".join(parts)


def _write_list(number: int, kind: FieldKind, values: Iterable[Any]) -> list[bytes]:
    if not isinstance(kind, str) or kind in ("string", "bytes"):
        return [_write_one(number, kind, value) for value in values]
    packed = b"".join(_scalar(kind, value) for value in values)
    return [write_field(number, packed)] if packed else []


def _write_one(number: int, kind: FieldKind, value: Any) -> bytes:
    if isinstance(kind, dict):
        return write_field(number, write(value, kind))
    if kind in ("string", "bytes"):
        return write_field(number, value.encode("utf-8", "replace") if kind == "string" else value)
    if isinstance(kind, tuple):
        return varint(number << 3 | VARINT) + varint(kind.index(value))
    return varint(number << 3 | _WIRES[kind][0]) + _scalar(kind, value)


def _scalar(kind: str, value: Any) -> bytes:
    wire = _WIRES[kind][0]
    if wire == VARINT:
        return varint(int(value))
    return (_double if wire == FIXED64 else _float).pack(value)
