"""Reads the JSON that a message begins with; what it would build is bounded before it is built.

A short text is parsed as it is. Of a long one the arrays behind "data" are taken out first: their values are read
later, piece by piece, straight into the tensor's memory, so that no piece holds up other threads for long and no list
of all values is ever made. What is left may hold a few thousand values.
"""

import json
import secrets
from collections.abc import Iterator
from typing import Any

import orjson

from evenkeel.errors import RequestError

__all__ = ["MAX_TENSORS", "LongArray", "read_message"]

MAX_TENSORS = 64  # in one message

_SHORT_BYTES = 64 << 10
_LONG_ARRAY_BYTES = 4 << 10
_MAX_KEYS = 4 * MAX_TENSORS  # of the name "data" that are looked at
_PIECE_BYTES = 64 << 10  # takes less than a millisecond or two
_MAX_VALUE_BYTES = 1 << 20  # of one value and the blanks around it
_MAX_VALUES = 20_000  # of a long text, outside of long arrays
_MARK = f"{secrets.token_hex(16)}:"  # stands for an array that was taken out; no sender can know it
_NO_STRUCTURE = bytes(set(range(256)) - set(b"[],"))
_BLANK_BRACKETS = bytes.maketrans(b"[]", b"  ")


class LongArray:
    """Marks the place of a long JSON array, flat or nested, of numbers or bools; no step of its reading takes long."""

    __slots__ = ("_end", "_start", "_text")

    def __init__(self, text: bytes, start: int, end: int) -> None:
        self._text, self._start, self._end = text, start, end

    def pieces(self, shape: tuple[int, ...], count: int, label: str) -> Iterator[list[Any]]:
        """Gives the values, row-major, as many at a time as stand in one piece of the text.

        Raises:
            RequestError: they are not JSON, or neither flat nor nested as `shape` of `count` values says.
        """
        commas = sum(piece.count(b",") for piece in self._cut())
        if commas + 1 != count:
            raise RequestError(
                f"tensor {label}: shape {list(shape)} has {count} elements, but 'data' holds {commas + 1}"
            )
        skeleton = b"".join(piece.translate(None, _NO_STRUCTURE) for piece in self._cut())
        if skeleton not in (_skeleton((count,)), _skeleton(shape)):
            raise RequestError(f"tensor {label}: 'data' must be flat, or nested as shape {list(shape)} says")
        for piece in self._cut():
            try:
                values = orjson.loads(b"[%b]" % piece.translate(_BLANK_BRACKETS).rstrip(b","))
            except orjson.JSONDecodeError as error:
                raise RequestError(f"tensor {label}: the JSON of 'data' cannot be read: {_what(error)}") from None
            if len(values) != piece.count(b",") + (not piece.endswith(b",")):
                raise RequestError(f"tensor {label}: a value is missing in the JSON of 'data'")
            yield values

    def _cut(self) -> Iterator[bytes]:
        """Pieces that end behind a comma, but for the last one."""
        text, start = self._text, self._start
        while self._end - start > _PIECE_BYTES:
            end = text.rfind(b",", start, start + _PIECE_BYTES) + 1
            if not end:  # blanks, or a number without an end: read in one step, if that is not too long
                end = text.find(b",", start, min(start + _MAX_VALUE_BYTES, self._end)) + 1
                if not end and self._end - start > _MAX_VALUE_BYTES:
                    raise RequestError(f"'data' holds more than {_MAX_VALUE_BYTES} characters without a comma")
                if not end:
                    break
            yield text[start:end]
            start = end
        yield text[start : self._end]


def read_message(text: bytes, binary: bool) -> dict[str, Any]:
    """Reads the JSON object in `text`; a long "data" array of an input or output is a `LongArray`.

    Args:
        text: UTF-8.
        binary: binary data follows it, for the words of errors.

    Raises:
        RequestError: it is no JSON object, holds a key twice, or too many values.
    """
    arrays: list[LongArray] = []
    if len(text) > _SHORT_BYTES:
        text = _take_out(text, arrays)
        values = text.count(b",") + text.count(b"[") + text.count(b"{")
        if values > _MAX_VALUES:
            raise RequestError(
                f"the JSON holds some {values} values outside of numeric 'data'; at most {_MAX_VALUES} are taken: "
                f"send tensors as binary data"
            )
    try:
        message = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        hint = "" if binary else "; binary data needs the Inference-Header-Content-Length header"
        raise RequestError(f"the JSON of the message cannot be read: {_what(error)}{hint}") from None
    if type(message) is not dict:
        raise RequestError("the message must be a JSON object")
    # Every key has a colon behind it. A text with more of them may hold some in strings, or a key twice.
    if _keys(message) != text.count(b":"):
        _refuse_twin_keys(text)
    if arrays:
        _put_back(message, arrays)
    return message


def _what(error: orjson.JSONDecodeError) -> str:
    # The rest of the message are places, which mean little where parts of the text were taken out.
    return error.msg.partition(": line ")[0]


def _take_out(text: bytes, arrays: list[LongArray]) -> bytes:
    """Gives `text` with a mark in place of each long array of numbers behind "data"."""
    parts = []
    kept = place = 0
    for _ in range(_MAX_KEYS):  # each is looked for to the end of the text, at worst
        key = text.find(b'"data"', place)
        if key < 0:
            break
        place = key + len(b'"data"')
        head = text[place : place + 64]
        start = place + len(head) - len(head.lstrip(b" \t\r\n:"))
        if text[start : start + 1] != b"[" or head[: start - place].strip() != b":" or text[key - 1 : key] == b"\\":
            continue
        # Numbers and brackets hold neither quotes nor braces: the array ends before the next of those.
        ends = [end for end in (text.find(b'"', start), text.find(b"}", start)) if end >= 0]
        end = text.rfind(b"]", start, min(ends, default=len(text))) + 1
        if end - start < _LONG_ARRAY_BYTES:
            continue
        parts.append(b'%b"%b%d"' % (text[kept:start], _MARK.encode(), len(arrays)))
        arrays.append(LongArray(text, start, end))
        kept = place = end
    parts.append(text[kept:])
    return b"".join(parts)


def _put_back(message: dict[str, Any], arrays: list[LongArray]) -> None:
    for key in ("inputs", "outputs"):
        entries = message.get(key)
        for entry in entries[:MAX_TENSORS] if type(entries) is list else ():
            data = entry.get("data") if type(entry) is dict else None
            if type(data) is str and data.startswith(_MARK):
                entry["data"] = arrays[int(data.removeprefix(_MARK))]


def _keys(message: dict[str, Any]) -> int:
    """Counts the keys of the objects in `message`; fewer, where they lie in other places than in a request."""
    count = 0
    level = [message]
    while level:
        inner: list[dict[str, Any]] = []
        for found in level:
            count += len(found)
            for value in found.values():
                if type(value) is dict:
                    inner.append(value)
                elif type(value) is list and value and type(value[0]) is dict:
                    inner += [entry for entry in value if type(entry) is dict]
        level = inner
    return count


def _refuse_twin_keys(text: bytes) -> None:
    def check(pairs: list[tuple[str, Any]]) -> None:
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise RequestError(f"the JSON of the message holds the key {key[:40]!r} twice in one object")
            seen.add(key)

    try:
        # Numbers stay texts: their digits are without bound.
        json.loads(text, object_pairs_hook=check, parse_int=str, parse_float=str)
    except RecursionError:
        raise RequestError("the JSON of the message is nested too deeply") from None


def _skeleton(shape: tuple[int, ...]) -> bytes:
    """Brackets and commas of an array of that shape, which has no zero in it."""
    inner = b""
    for size in reversed(shape):
        inner = b"[%b%b]" % ((inner + b",") * (size - 1), inner)
    return inner
