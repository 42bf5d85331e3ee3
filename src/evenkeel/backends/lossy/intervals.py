"""Cuts a baseline JPEG at its restart markers, and decodes it from any subset of the pieces.

A *restart interval* is a run of blocks whose coded bytes can be decoded without those before it. What else a decoder
needs, the tables and the size, follows from a `JpegForm`, on which both ends agree before any image is sent.

Laws: from any subset of intervals comes an image of the right size; with colours at full resolution (`subsampling` 0)
the pixels of an interval that is there are those of the whole image's decoding, whatever else is missing or garbage.
"""

import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evenkeel.arrays import PixelArray
from evenkeel.errors import ConfigurationError, UnreadableImageError

__all__ = ["MAX_INTERVALS", "MAX_SIDE", "JpegForm", "cut_intervals"]

MAX_SIDE = 4096
MAX_INTERVALS = 65_536
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_NO_DATA = re.compile(rb"\xff(?:[^\x00]|$)", re.DOTALL)  # a marker, or half of one
_SOF0, _SOS, _DRI, _EOI = 0xC0, 0xDA, 0xDD, 0xD9
_GREY = 128
_BLOCK = 8  # pixels


@dataclass(frozen=True)
class JpegForm:
    """Says how images are coded: all that both ends must agree on.

    Attributes:
        width: pixels.
        height: pixels.
        quality: of JPEG, 1 to 100.
        subsampling: 0: colours at full resolution; 2: at half of it, both ways.
        blocks: in a restart interval; fewer cost more bytes and make smaller holes.
    """

    width: int
    height: int
    quality: int = 75
    subsampling: int = 0
    blocks: int = 1

    def __post_init__(self) -> None:
        if not (1 <= self.width <= MAX_SIDE and 1 <= self.height <= MAX_SIDE):
            raise ConfigurationError(f"an image has 1 to {MAX_SIDE} pixels a side, found {self.width} x {self.height}")
        if not 1 <= self.quality <= 100:
            raise ConfigurationError(f"quality: from 1 to 100, found {self.quality}")
        if self.subsampling not in (0, 2):
            raise ConfigurationError(f"subsampling: 0 or 2, found {self.subsampling}")
        if not 1 <= self.blocks <= 0xFFFF:
            raise ConfigurationError(f"blocks: from 1 to 65535, found {self.blocks}")
        if self.count > MAX_INTERVALS:
            raise ConfigurationError(
                f"an image of {self.count:,} restart intervals; at most {MAX_INTERVALS:,}: take more blocks in each"
            )

    @property
    def side(self) -> int:
        """Gives the side of a block, in pixels; with colours at half resolution a block has four squares."""
        return 2 * _BLOCK if self.subsampling else _BLOCK

    @property
    def rows(self) -> int:
        """Counts rows of blocks."""
        return -(-self.height // self.side)

    @property
    def columns(self) -> int:
        """Counts columns of blocks."""
        return -(-self.width // self.side)

    @property
    def count(self) -> int:
        """Counts the intervals of an image."""
        return -(-self.rows * self.columns // self.blocks)

    @cached_property
    def digest(self) -> bytes:
        """Gives 8 bytes that differ where two ends would read the same bytes otherwise."""
        said = f"{self.width} {self.height} {self.quality} {self.subsampling} {self.blocks} ".encode()
        return hashlib.blake2b(said + self._blank[0], digest_size=8).digest()

    @cached_property
    def _blank(self) -> tuple[bytes, list[bytes]]:
        """Gives the head of every image of this form, and the intervals of a grey one, to fill holes with."""
        return cut_intervals(self._written(np.full((self.height, self.width, 3), _GREY, np.uint8)))

    def encode(self, pixels: PixelArray) -> list[bytes]:
        """Gives the intervals of an image, uint8 `[height, width, 3]`.

        Raises:
            UnreadableImageError: its shape or datatype is another one.
        """
        if pixels.shape != (self.height, self.width, 3) or pixels.dtype != np.uint8:
            raise UnreadableImageError(
                f"expected UINT8 [{self.height}, {self.width}, 3], found {pixels.dtype} {list(pixels.shape)}"
            )
        return cut_intervals(self._written(pixels))[1]

    def decode(self, intervals: Sequence[bytes | None]) -> tuple[PixelArray, NDArray[np.bool_]]:
        """Decodes what is there.

        Args:
            intervals: all of an image, in order; None for one that is missing.

        Returns:
            pixels `[height, width, 3]`, grey where nothing is known; and which blocks `[rows, columns]` are known.
        """
        head, blanks = self._blank
        if len(intervals) != len(blanks):
            raise UnreadableImageError(f"an image has {len(blanks)} intervals, found {len(intervals)}")
        # A marker inside an interval would end it, or the image, early.
        here = np.array([bool(one) and _NO_DATA.search(one) is None for one in intervals])  # type: ignore[arg-type]
        pieces = [head]
        for number, (blank, one) in enumerate(zip(blanks, intervals, strict=True)):
            pieces += [one if one is not None and here[number] else blank, bytes((0xFF, 0xD0 + number % 8))]
        pieces[-1] = bytes((0xFF, _EOI))
        try:
            with warnings.catch_warnings(), Image.open(BytesIO(b"".join(pieces)), formats=("JPEG",)) as image:
                warnings.simplefilter("ignore")
                pixels = np.array(image.convert("RGB"))
        except Exception:  # Pillow's readers raise many kinds; whatever it was, nothing is known of this image
            here[:] = False
            pixels = np.full((self.height, self.width, 3), _GREY, np.uint8)
        known = np.repeat(here, self.blocks)[: self.rows * self.columns]
        return pixels, known.reshape(self.rows, self.columns)

    def _written(self, pixels: PixelArray) -> bytes:
        file = BytesIO()
        Image.fromarray(pixels).save(
            file, "JPEG", quality=self.quality, subsampling=self.subsampling, restart_marker_blocks=self.blocks
        )
        return file.getvalue()


def cut_intervals(data: bytes) -> tuple[bytes, list[bytes]]:
    """Cuts a baseline JPEG of one scan into its head, up to the coded data, and its restart intervals.

    Raises:
        UnreadableImageError: it is damaged, or of another kind.
    """
    place, interval, baseline = 2, 0, False
    if data[:2] != b"\xff\xd8":
        raise UnreadableImageError("no JPEG file")
    while True:
        if len(data) < place + 4 or data[place] != 0xFF:
            raise UnreadableImageError("a JPEG whose head is damaged")
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if length < 2:
            raise UnreadableImageError("a JPEG whose head is damaged")
        baseline = baseline or marker == _SOF0
        if marker == _DRI:
            interval = int.from_bytes(data[place + 4 : place + 6], "big")
        place += 2 + length
        if marker == _SOS:
            break
    if not baseline:
        raise UnreadableImageError("a JPEG of another kind than baseline")
    end = data.rfind(bytes((0xFF, _EOI)))
    if end < place:
        raise UnreadableImageError("a JPEG without an end; is the file complete?")
    intervals = _RESTART.split(data[place:end]) if interval else [data[place:end]]
    if any(_NO_DATA.search(one) is not None for one in intervals):
        raise UnreadableImageError("a JPEG of more than one scan, or damaged")
    return data[:place], intervals
