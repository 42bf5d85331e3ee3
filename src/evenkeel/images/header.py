"""Reads what the header of an image file says of its size, without decoding anything.

A small file can say that it holds billions of pixels, or thousands of passes over them. What a header says is read
here in time and memory that depend on the file's own length alone, so that such a file is refused before a decoder
sees it.
"""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

from evenkeel.errors import UnreadableImageError

__all__ = ["FORMATS", "MAX_PIXELS", "ImageHeader", "check_scans", "check_size", "is_image_file", "read_header"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

MAX_PIXELS = 64_000_000  # of one image
# Pillow keeps 8 bytes beside each row, and allocates rows one by one: an image one pixel wide is mostly that.
MAX_SIDE = 32_768
# Passes over the pixels of a JPEG: 10 in libjpeg's progressive files. Each costs time, however few bytes it has.
MAX_SCANS = 64
_MAX_SEGMENTS = 500  # of a JPEG before its pixels, and entries of a TIFF; a colour profile takes 255 at most
_MAX_BETWEEN = 1024  # bytes that belong to no segment of a JPEG
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = frozenset((0xC2, 0xC6, 0xCA, 0xCE))
# A marker within the coded data of a JPEG: neither a stuffed zero, nor a restart, nor a filling byte.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_PPM = re.compile(rb"P[1-6]\s+(?:#[^\r\n]*[\r\n]\s*)*(\d{1,9})\s+(?:#[^\r\n]*[\r\n]\s*)*(\d{1,9})\s")
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # bytes


@dataclass(frozen=True)
class ImageHeader:
    """Holds what an image file says of itself.

    Attributes:
        form: its format, one of `FORMATS`.
        width: pixels, before any turn that its Exif data ask for.
        height: pixels.
        buffered: whether its decoder keeps coefficients of the whole image, as for a progressive JPEG.
        scans_from: where in the file the first scan of a JPEG begins; 0 for other formats.
    """

    form: str
    width: int
    height: int
    buffered: bool = False
    scans_from: int = 0

    @property
    def pixels(self) -> int:
        """Counts its pixels."""
        return self.width * self.height

    def decoding_bytes(self, side: int) -> int:
        """Estimates the memory that decoding it for a picture of `side` pixels takes at most, in bytes.

        Pillow keeps a pixel in 4 bytes, and another 4 where the colours have to be converted; its reader of WebP keeps
        two canvases and a copy besides. A JPEG is decoded at a half, a quarter or an eighth of its size where that
        leaves twice the wanted side.
        """
        kept = self.pixels
        if self.form == "JPEG":
            shrunk = 1
            while shrunk < 8 and min(self.width, self.height) // (2 * shrunk) >= 2 * side:
                shrunk *= 2
            kept //= shrunk**2
        coefficients = 6 * self.pixels if self.buffered else 0
        return (16 if self.form == "WEBP" else 8) * kept + coefficients


def is_image_file(data: bytes) -> bool:
    """Says whether `data` begins like an image file of a known format."""
    return _reader(data) is not None


def read_header(data: bytes) -> ImageHeader | None:
    """Reads what the image file `data` says of its size; gives None where it has no known format.

    Raises:
        UnreadableImageError: its header is damaged.
    """
    reader = _reader(data)
    if reader is None:
        return None
    try:
        header = reader(data)
    except (struct.error, IndexError) as error:
        raise UnreadableImageError("its header cannot be read; is the file complete?") from error
    if header.width < 1 or header.height < 1:
        raise UnreadableImageError(f"it has no pixels: {header.width} x {header.height}")
    return header


def check_size(header: ImageHeader, max_pixels: int = MAX_PIXELS) -> None:
    """Refuses an image that would take too much time or memory to decode.

    Raises:
        UnreadableImageError: too many pixels, or too long a side.
    """
    size = f"{header.width} x {header.height} pixels"
    if header.pixels > max_pixels:
        raise UnreadableImageError(f"{size}; at most {max_pixels / 1e6:g} million are taken")
    if max(header.width, header.height) > MAX_SIDE:
        raise UnreadableImageError(f"{size}; a side may have at most {MAX_SIDE:,}")


def check_scans(data: bytes, header: ImageHeader) -> None:
    """Refuses a JPEG whose decoder would pass over its pixels too often; looks through the whole file.

    Raises:
        UnreadableImageError: more than `MAX_SCANS` scans.
    """
    place, scans = header.scans_from, 0
    while place and (found := _MARKER.search(data, place)) is not None:
        marker, place = data[found.end() - 1], found.end()
        if marker == 0xD9 or len(data) < place + 2:  # a cut-off file is reported by the decoder
            return
        scans += marker == 0xDA
        if scans > MAX_SCANS:
            raise UnreadableImageError(f"a JPEG of more than {MAX_SCANS} scans")
        place += 0 if marker == 0x01 else max(2, int.from_bytes(data[place : place + 2], "big"))


def _reader(data: bytes) -> Callable[[bytes], ImageHeader] | None:
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg
    if data.startswith(_PNG):
        return _png
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _gif
    # Two letters are too few to know a BMP by: pixels that are no file at all may begin with them.
    if data[:2] == b"BM" and data[6:10] == bytes(4) and int.from_bytes(data[14:18], "little") in _BMP_HEADERS:
        return _bmp
    if data.startswith((b"II*\0", b"MM\0*")):
        return _tiff
    if _PPM.match(data, 0, 4096):
        return _ppm
    return None


def _jpeg(data: bytes) -> ImageHeader:
    place, size, components, progressive = 2, None, 0, False
    for _ in range(_MAX_SEGMENTS):
        found = _MARKER.search(data, place, place + _MAX_BETWEEN)
        if found is None or data[found.end() - 1] == 0xD9:
            raise UnreadableImageError("a JPEG without pixels; is the file complete?")
        marker, place = data[found.end() - 1], found.end()
        if marker == 0x01:  # the one marker with nothing behind it
            continue
        (length,) = struct.unpack_from(">H", data, place)
        if marker in _JPEG_FRAMES:
            height, width, components = struct.unpack_from(">HHB", data, place + 3)
            size, progressive = (width, height), marker in _PROGRESSIVE
        elif marker == 0xDA:
            if size is None:
                break
            # Where the first scan does not hold all colours, the decoder has to keep them until the last one came.
            buffered = progressive or data[place + 2] < components
            return ImageHeader("JPEG", *size, buffered, found.start())
        place += max(2, length)
    raise UnreadableImageError(f"a JPEG without a size in its first {_MAX_SEGMENTS:,} segments")


def _png(data: bytes) -> ImageHeader:
    return ImageHeader("PNG", *struct.unpack_from(">II", data, 16))


def _webp(data: bytes) -> ImageHeader:
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (length & 0x3FFF for length in struct.unpack_from("<HH", data, 26))
    return ImageHeader("WEBP", width, height)


def _gif(data: bytes) -> ImageHeader:
    return ImageHeader("GIF", *struct.unpack_from("<HH", data, 6))


def _bmp(data: bytes) -> ImageHeader:
    if data[14] == 12:
        return ImageHeader("BMP", *struct.unpack_from("<HH", data, 18))
    width, height = struct.unpack_from("<ii", data, 18)
    return ImageHeader("BMP", width, abs(height))  # below zero: its rows go from top to bottom


def _tiff(data: bytes) -> ImageHeader:
    order = "<" if data[:1] == b"I" else ">"
    (place,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, place)
    if count > _MAX_SEGMENTS:
        raise UnreadableImageError(f"a TIFF of {count:,} entries")
    values = {}
    for entry in range(count):
        tag, kind = struct.unpack_from(f"{order}HH", data, place + 2 + 12 * entry)
        form = {1: "B", 3: "H", 4: "I"}.get(kind)
        if form is not None:
            values[tag] = struct.unpack_from(order + form, data, place + 10 + 12 * entry)[0]
    # A tile is decoded whole, though the image may be smaller.
    width, height = values.get(256, 0), values.get(257, 0)
    if width and height:
        width, height = max(width, values.get(322, 0)), max(height, values.get(323, 0))
    return ImageHeader("TIFF", width, height)


def _ppm(data: bytes) -> ImageHeader:
    found = _PPM.match(data, 0, 4096)
    assert found is not None  # `_reader` has matched it
    return ImageHeader("PPM", int(found[1]), int(found[2]))
