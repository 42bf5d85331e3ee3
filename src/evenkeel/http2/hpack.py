"""Reads and writes header blocks (HPACK, RFC 7541).

Blocks are written without a memory of earlier ones: every field is one of the static table's or a literal, so that a
block is a constant that may be kept. All that the RFC knows is read: both tables, Huffman codes, changes of a size.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from functools import lru_cache

from evenkeel.errors import Http2Error

__all__ = ["COMPRESSION_ERROR", "ENHANCE_YOUR_CALM", "HeaderReader", "Headers", "write_headers"]

Headers = tuple[tuple[bytes, bytes], ...]

COMPRESSION_ERROR = 9  # codes of HTTP/2
ENHANCE_YOUR_CALM = 11

_TABLE_BYTES = 4096  # what HTTP/2 begins with, and we never allow more
_OVERHEAD = 32  # of a table's entry, as the RFC counts
_MAX_KNOWN = 32
_MAX_KNOWN_BYTES = 2048

# Name and values of the static table, in its order.
_STATIC_TEXT = """\
:authority
:method GET POST
:path / /index.html
:scheme http https
:status 200 204 206 304 400 404 500
accept-charset
accept-encoding gzip,_deflate
accept-language accept-ranges accept access-control-allow-origin age allow authorization cache-control
content-disposition content-encoding content-language content-length content-location content-range content-type
cookie date etag expect expires from host if-match if-modified-since if-none-match if-range if-unmodified-since
last-modified link location max-forwards proxy-authenticate proxy-authorization range referer refresh retry-after
server set-cookie strict-transport-security transfer-encoding user-agent vary via www-authenticate"""


def _static_table() -> Headers:
    entries: list[tuple[bytes, bytes]] = []
    for line in _STATIC_TEXT.splitlines():
        first, *rest = line.encode().split(b" ")
        if first.startswith(b":") or first == b"accept-encoding":
            entries += [(first, value.replace(b"_", b" ")) for value in rest or [b""]]
        else:
            entries += [(name, b"") for name in (first, *rest)]
    return tuple(entries)


_STATIC = _static_table()
_STATIC_ENTRIES = {entry: place for place, entry in reversed(list(enumerate(_STATIC, 1)))}
_STATIC_NAMES = {name: place for place, (name, _) in reversed(list(enumerate(_STATIC, 1)))}

# The length of each byte's Huffman code, and of the end mark's, as a letter: A is 5 bits. The codes follow from it:
# they count upwards by length, then by byte.
_LENGTHS = (
    "ISXXXXXXXTZXXZXXXXXXXXZXXXXXXXXXBFFHIBDGFFDGDBBBAAABBBBBBBCDKBHFIBCCCCCCCCCCCCCCCCCCCCCCDCDIOIJBKABABABBBACCBBBABCBAABCCC"
    "CCKGJIXPRPPRRRSRSSSSSTSTTRSTSSSSQRSRSSTRQPRRSSQSRRTQRSSQQRQSRSSPRRRSRRSVVPORSRUVVVWWVTUOQVWWVWTQQVVXWWWPTPQRQQSRRUUTTVSVW"
    "VVWWWWWXWWWWWVZ"
)
_END_MARK = 256


def huffman_codes() -> list[tuple[int, int]]:
    """Gives code and length in bits of each byte, and of the end mark behind them."""
    lengths = [ord(letter) - ord("A") + 5 for letter in _LENGTHS]
    codes = [(0, 0)] * len(lengths)
    code = before = 0
    for symbol in sorted(range(len(lengths)), key=lambda symbol: (lengths[symbol], symbol)):
        code <<= lengths[symbol] - before
        before = lengths[symbol]
        codes[symbol] = code, before
        code += 1
    return codes


@lru_cache(1)
def _huffman_steps() -> tuple[list[tuple[int, bytes]], frozenset[int]]:
    """Gives where four bits lead from each place in the tree of codes, and the places at which a text may end.

    Places are numbered; the step of place p by bits b is entry 16 p + b: the next place, -1 for none, and the byte that
    was found on the way.
    """
    children: list[list[int]] = [[-1, -1]]
    leaves: dict[tuple[int, int], int] = {}
    for symbol, (code, length) in enumerate(huffman_codes()):
        place = 0
        for shift in range(length - 1, 0, -1):
            bit = code >> shift & 1
            if children[place][bit] < 0:
                children[place][bit] = len(children)
                children.append([-1, -1])
            place = children[place][bit]
        leaves[place, code & 1] = symbol
    steps = []
    for start in range(len(children)):
        for bits in range(16):
            place, found = start, b""
            for shift in (3, 2, 1, 0):
                leaf = leaves.get((place, bits >> shift & 1))
                if leaf is None:
                    place = children[place][bits >> shift & 1]
                elif leaf == _END_MARK:
                    place = -1
                    break
                else:
                    place, found = 0, bytes([leaf])
            steps.append((place, found))
    # What fills the last byte are the first bits of the end mark, which are ones, at most seven.
    ends = [0]
    while len(ends) < 8:
        ends.append(children[ends[-1]][1])
    return steps, frozenset(ends)


def _read_huffman(data: bytes) -> bytes:
    steps, ends = _huffman_steps()
    place = 0
    found: list[bytes] = []
    for byte in data:
        place, high = steps[16 * place + (byte >> 4)]
        if place < 0:
            break
        place, low = steps[16 * place + (byte & 15)]
        if place < 0:
            break
        found += (high, low)
    if place not in ends:
        raise Http2Error(COMPRESSION_ERROR, "a header's Huffman code is wrong")
    return b"".join(found)


class HeaderReader:
    """Reads the header blocks of one connection, in the order in which they come.

    Args:
        max_bytes: of the names and values of one block, each with 32 more.
    """

    def __init__(self, max_bytes: int = 16 << 10) -> None:
        self._max_bytes = max_bytes
        self._table: deque[tuple[bytes, bytes]] = deque()  # the newest entry first
        self._table_bytes = 0
        self._table_limit = _TABLE_BYTES
        self._known: dict[bytes, Headers] = {}  # blocks that mean the same again, as they change nothing

    def read(self, block: bytes) -> Headers:
        """Gives the fields of a block.

        Raises:
            Http2Error: it is malformed, or holds too much; the connection cannot go on, since the table is not known.
        """
        known = self._known.get(block)
        if known is not None:
            return known
        fields, changed = self._read(block)
        if changed:
            self._known.clear()
        elif len(block) <= _MAX_KNOWN_BYTES:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[block] = fields
        return fields

    def _read(self, block: bytes) -> tuple[Headers, bool]:
        fields: list[tuple[bytes, bytes]] = []
        position, size, changed = 0, 0, False
        while position < len(block):
            first = block[position]
            if first & 0x80:
                index, position = _read_number(block, position, 7)
                field = self._entry(index)
            elif first & 0xE0 == 0x20:
                limit, position = _read_number(block, position, 5)
                if fields or limit > _TABLE_BYTES:
                    raise Http2Error(
                        COMPRESSION_ERROR, "a change of the header table's size is out of place or too large"
                    )
                self._table_limit, changed = limit, True
                self._evict(0)
                continue
            else:
                kept = first & 0x40
                index, position = _read_number(block, position, 6 if kept else 4)
                name, position = (self._entry(index)[0], position) if index else _read_text(block, position)
                value, position = _read_text(block, position)
                field = name, value
                if kept:
                    self._keep(field)
                    changed = True
            size += len(field[0]) + len(field[1]) + _OVERHEAD
            if size > self._max_bytes:
                raise Http2Error(ENHANCE_YOUR_CALM, f"the headers of a request take more than {self._max_bytes} bytes")
            fields.append(field)
        return tuple(fields), changed

    def _entry(self, index: int) -> tuple[bytes, bytes]:
        if 0 < index <= len(_STATIC):
            return _STATIC[index - 1]
        index -= len(_STATIC) + 1
        if 0 <= index < len(self._table):
            return self._table[index]
        raise Http2Error(COMPRESSION_ERROR, "a header refers to an entry that the table does not have")

    def _keep(self, field: tuple[bytes, bytes]) -> None:
        size = len(field[0]) + len(field[1]) + _OVERHEAD
        self._evict(size)
        if size <= self._table_limit:
            self._table.appendleft(field)
            self._table_bytes += size

    def _evict(self, room: int) -> None:
        while self._table and self._table_bytes + room > self._table_limit:
            name, value = self._table.pop()
            self._table_bytes -= len(name) + len(value) + _OVERHEAD


def _read_number(block: bytes, position: int, bits: int) -> tuple[int, int]:
    """Reads an integer of which the first byte holds so many bits; gives it and the place behind it."""
    most = (1 << bits) - 1
    number = block[position] & most
    position += 1
    if number < most:
        return number, position
    for shift in (0, 7, 14):  # nothing that is legal here needs more than three further bytes
        if position >= len(block):
            break
        byte = block[position]
        position += 1
        number += (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise Http2Error(COMPRESSION_ERROR, "a number in a header block is cut off or too large")


def _read_text(block: bytes, position: int) -> tuple[bytes, int]:
    if position >= len(block):
        raise Http2Error(COMPRESSION_ERROR, "a header block is cut off")
    packed = block[position] & 0x80
    length, start = _read_number(block, position, 7)
    end = start + length
    if end > len(block):
        raise Http2Error(COMPRESSION_ERROR, "a header block is cut off")
    text = block[start:end]
    return (_read_huffman(text) if packed else text), end


def write_headers(fields: Iterable[tuple[bytes, bytes]] | Sequence[tuple[bytes, bytes]]) -> bytes:
    """Writes a header block, whole or a part of one: what is written one after the other is one block."""
    parts = []
    for name, value in fields:
        place = _STATIC_ENTRIES.get((name, value)) if value else None
        if place is not None:
            parts.append(bytes([0x80 | place]))
            continue
        place = _STATIC_NAMES.get(name, 0)
        parts.append(_write_number(place, 4))
        if not place:
            parts += (_write_number(len(name), 7), name)
        parts += (_write_number(len(value), 7), value)
    return b"".join(parts)


def _write_number(number: int, bits: int) -> bytes:
    most = (1 << bits) - 1
    if number < most:
        return bytes([number])
    rest = number - most
    written = [most]
    while rest >= 0x80:
        written.append(rest & 0x7F | 0x80)
        rest >>= 7
    return bytes([*written, rest])
