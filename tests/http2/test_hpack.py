"""Header blocks: the RFC's own examples, Huffman against its plain twin, bounds."""

import pytest
from hypothesis import given, strategies as st

from evenkeel.errors import Http2Error
from evenkeel.http2.hpack import HeaderReader, huffman_codes, write_headers

FIRST = ((b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/"), (b":authority", b"www.example.com"))
CACHED = (*FIRST, (b"cache-control", b"no-cache"))
CUSTOM = (
    (b":method", b"GET"),
    (b":scheme", b"https"),
    (b":path", b"/index.html"),
    (b":authority", b"www.example.com"),
    (b"custom-key", b"custom-value"),
)


@pytest.mark.parametrize(
    "blocks",
    [
        # RFC 7541, C.3 and C.4: the same three requests as plain text and as Huffman codes.
        [
            "828684410f7777772e6578616d706c652e636f6d",
            "828684be58086e6f2d6361636865",
            "828785bf400a637573746f6d2d6b65790c637573746f6d2d76616c7565",
        ],
        [
            "828684418cf1e3c2e5f23a6ba0ab90f4ff",
            "828684be5886a8eb10649cbf",
            "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf",
        ],
    ],
)
def test_the_rfcs_requests(blocks):
    reader = HeaderReader()
    assert [reader.read(bytes.fromhex(block)) for block in blocks] == [FIRST, CACHED, CUSTOM]


def test_a_table_that_shrinks_forgets_its_oldest_entries():
    # RFC 7541, C.5, where the table has 256 bytes: the third response evicts what the first one brought.
    reader = HeaderReader()
    reader.read(b"\x3f\xe1\x01")  # 256
    reader.read(
        bytes.fromhex(
            "4803333032580770726976617465611d4d6f6e2c203231204f637420323031332032303a31333a323120474d546e1768747470733a2f2f"
            "7777772e6578616d706c652e636f6d"
        )
    )
    second = reader.read(bytes.fromhex("4803333037c1c0bf"))
    assert second[0] == (b":status", b"307")
    assert second[1] == (b"cache-control", b"private")
    assert second[3] == (b"location", b"https://www.example.com")
    reader.read(b"\x20")  # 0: all is forgotten
    with pytest.raises(Http2Error, match="the table does not have"):
        reader.read(b"\xbe")


def test_a_block_that_means_something_else_later_is_read_again():
    reader = HeaderReader()
    reader.read(b"\x40\x01a\x01b")
    assert reader.read(b"\xbe") == ((b"a", b"b"),)
    reader.read(b"\x40\x01c\x01d")
    assert reader.read(b"\xbe") == ((b"c", b"d"),)


CODES = huffman_codes()


def huffman(data: bytes) -> bytes:
    """The plain twin: codes one behind the other, filled up with ones."""
    bits = "".join(f"{CODES[byte][0]:0{CODES[byte][1]}b}" for byte in data)
    bits += "1" * (-len(bits) % 8)
    return int(bits or "0", 2).to_bytes(len(bits) // 8)


@given(st.binary(max_size=40))
def test_huffman_codes_are_read_as_their_twin_writes_them(data):
    packed = huffman(data)
    assert HeaderReader().read(b"\x00\x01n" + bytes([0x80 | len(packed)]) + packed) == ((b"n", data),)


def test_the_codes_are_those_of_the_rfc():
    assert CODES[ord("a")] == (0x3, 5)
    assert CODES[ord("\\")] == (0x7FFF0, 19)
    assert CODES[249] == (0xFFFFFFE, 28)
    assert CODES[256] == (0x3FFFFFFF, 30)
    assert sum(2.0**-length for _, length in CODES) == 1


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=200), st.binary(max_size=200)), max_size=8))
def test_what_is_written_is_read(fields):
    assert HeaderReader().read(write_headers(fields)) == tuple(fields)


def test_static_entries_are_written_as_one_byte():
    assert write_headers([(b":status", b"200"), (b":method", b"POST")]) == b"\x88\x83"
    assert write_headers([(b"content-type", b"")]) == b"\x0f\x10\x00"


@pytest.mark.parametrize(
    ("block", "says"),
    [
        (b"\x80", "the table does not have"),
        (b"\xff\xff\xff\xff\x7f", "cut off or too large"),
        (b"\xff", "cut off or too large"),
        (b"\x40", "cut off"),
        (b"\x00\x05ab", "cut off"),
        (b"\x82\x20", "out of place or too large"),
        (b"\x3f\xe2\x1f", "out of place or too large"),  # 4097
        (b"\x00\x01a\x81\x00", "Huffman code is wrong"),  # padded with zeros
        (b"\x00\x01a\x84\xff\xff\xff\xff", "Huffman code is wrong"),  # the end mark
        (b"\x00\x01a\x82\x1f\xff", "Huffman code is wrong"),  # more than a byte of padding
    ],
)
def test_what_is_wrong_ends_the_connection(block, says):
    with pytest.raises(Http2Error, match=says) as caught:
        HeaderReader().read(block)
    assert caught.value.code == 9


def test_a_small_block_cannot_become_a_large_list():
    reader = HeaderReader(max_bytes=16_000)
    reader.read(write_headers([(b"x", b"y")]) + b"\x40\x01a" + b"\x7f\xa1\x1e" + 4000 * b"z")
    with pytest.raises(Http2Error, match="more than 16000 bytes") as caught:
        reader.read(4 * b"\xbe")
    assert caught.value.code == 11
