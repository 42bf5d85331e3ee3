"""Image files as model input: JPEG and PNG, decoded off the event loop.

A file becomes one row of pixel values 0..255 in the card's layout and datatype: upright by its EXIF orientation, RGB
(transparency is dropped), the shorter side scaled to the card's size (bilinear with antialiasing) and the centre cut
out. A file that already has the card's size is not touched.
"""

import asyncio
import warnings
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import suppress
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from evenkeel.arrays import Array
from evenkeel.errors import OverloadedError, RequestError, TooLargeError
from evenkeel.models.cards import ModelCard

__all__ = ["ImageDecoder", "from_pixels", "is_image_file"]

_FORMATS = ("JPEG", "PNG")
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")

# How the signatures begin in base64.
_BASE64_SIGNATURES = (b"/9j/", b"iVBORw0KGgo")
_HOW_TO_SEND = "send image files as binary tensors, or base64 with the tensor parameter content_type: base64"


def is_image_file(data: bytes) -> bool:
    """True when `data` begins like a JPEG or PNG file."""
    return data.startswith(_SIGNATURES)


def from_pixels(pixels: Array, card: ModelCard) -> Array:
    """Rows `[n, H, W, 3]` of uint8 in the card's layout and datatype, contiguous; values stay 0..255."""
    if card.layout == "NCHW":
        pixels = pixels.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(pixels, dtype=np.uint8 if card.datatype == "UINT8" else np.float32)


class ImageDecoder:
    """Decodes image files for one model.

    Args:
        card: of the model.
        executor: threads that decode; their number bounds how many images are decoded at once.
        most_pixels: a request whose files have more in all is refused before any is decoded.
        most_waiting: files that may wait for a thread; more are shed, so that the wait stays short.
    """

    def __init__(
        self, card: ModelCard, executor: Executor, *, most_pixels: int = 64_000_000, most_waiting: int = 256
    ) -> None:
        self._card = card
        self._executor = executor
        self._most_pixels = most_pixels
        self._most_waiting = most_waiting
        self._waiting = 0
        # Our own limit applies, so that Pillow's advice to the programmer would only fill the server's log.
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

    async def decode_all(self, files: Sequence[bytes]) -> Array:
        """Rows `[n, ...]` in the card's layout and datatype.

        Raises:
            RequestError: a file is no JPEG or PNG, or is damaged; the message says which.
            TooLargeError: a file has, or all have together, too many pixels.
            OverloadedError: too many files wait already.
        """
        # A single big request on an idle decoder may exceed the bound: it would otherwise never be served.
        if self._waiting and self._waiting + len(files) > self._most_waiting:
            raise OverloadedError(f"{self._waiting} images wait to be decoded; try again soon")
        loop = asyncio.get_running_loop()
        self._waiting += len(files)
        jobs: list[asyncio.Future[Array]] = []
        try:
            if len(files) > 1:
                await loop.run_in_executor(self._executor, self._check_sum, files)
            jobs += [loop.run_in_executor(self._executor, self.decode, data, row) for row, data in enumerate(files)]
            return from_pixels(np.stack([await job for job in jobs]), self._card)
        finally:
            self._waiting -= len(files)
            for job in jobs:
                job.cancel()
                # Several files may be bad; only the first is reported, and the others must not count as forgotten.
                job.add_done_callback(lambda done: done.cancelled() or done.exception())

    def decode(self, data: bytes, row: int = 0) -> Array:
        """One file as uint8 `[H, W, 3]`; see `decode_all`."""
        try:
            with Image.open(BytesIO(data), formats=_FORMATS) as image:
                pixels = image.width * image.height
                if pixels > self._most_pixels:
                    raise _too_large(row, f"{image.width} x {image.height} pixels", self._most_pixels)
                return self._fit(image)
        except TooLargeError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise _too_large(row, "too many pixels", self._most_pixels) from error
        except UnidentifiedImageError:
            hint = f"; {_HOW_TO_SEND}" if _is_base64(data) else ""
            raise RequestError(f"image {row} is neither a JPEG nor a PNG file ({len(data)} bytes){hint}") from None
        # Pillow's readers raise many kinds (OSError, SyntaxError, struct.error, ...) on damaged files.
        except Exception as error:
            raise RequestError(f"image {row} cannot be decoded: {error}; is the file complete?") from error

    def _check_sum(self, files: Sequence[bytes]) -> None:
        """Refuse files that have too many pixels together, by what their headers say."""
        pixels = 0
        for data in files:
            # What cannot be read is reported when its turn to be decoded comes.
            with suppress(Exception), Image.open(BytesIO(data), formats=_FORMATS) as image:
                pixels += image.width * image.height
        if pixels > self._most_pixels:
            raise TooLargeError(
                f"{len(files)} images have {pixels / 1e6:.3g} million pixels in all; at most "
                f"{self._most_pixels / 1e6:g} million are taken in one request"
            )

    def _fit(self, image: Image.Image) -> Array:
        width, height = self._card.width, self._card.height
        # JPEG can be decoded at 1/2, 1/4 or 1/8 for much less; twice the target keeps the antialiasing honest.
        image.draft("RGB", (2 * width, 2 * height))
        upright = ImageOps.exif_transpose(image).convert("RGB")
        if upright.size != (width, height):
            scale = min(upright.width / width, upright.height / height)
            left = (upright.width - scale * width) / 2
            top = (upright.height - scale * height) / 2
            box = (left, top, left + scale * width, top + scale * height)
            upright = upright.resize((width, height), Image.Resampling.BILINEAR, box=box)
        return np.asarray(upright)


def _is_base64(data: bytes) -> bool:
    # A data URL is the other form in which browsers and scripts hand files over as text.
    return data.startswith((*_BASE64_SIGNATURES, b"data:image/"))


def _too_large(row: int, what: str, most: int) -> TooLargeError:
    return TooLargeError(f"image {row} has {what}; at most {most / 1e6:g} million are taken")
