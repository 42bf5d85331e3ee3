"""Turns image files into model input, away from the event loop.

A file becomes one row of pixel values 0..255 in the card's layout and datatype, decoded and scaled as everywhere else
(`images/decode.py`). What its header says is looked at first: a file that would take too much is refused before it is
decoded. Decoding happens in processes that are killed when it takes too long.
"""

import asyncio
import math
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import numpy as np

from evenkeel.arrays import Array
from evenkeel.errors import OverloadedError, RequestError, TooLargeError, UnreadableImageError
from evenkeel.images.header import FORMATS, MAX_PIXELS, ImageHeader, check_size, read_header
from evenkeel.models.cards import ModelCard
from evenkeel.serving.front.image_process import ImageProcess

__all__ = ["ImageDecoder", "from_pixels"]

# How files begin in base64: JPEG, PNG, GIF, WebP, and what browsers and scripts hand over as text.
_AS_TEXT = (b"/9j/", b"iVBORw0KGgo", b"R0lGOD", b"UklGR", b"data:image/")
_HOW_TO_SEND = "send image files as binary tensors, or base64 with the tensor parameter content_type: base64"
_LARGE_BYTES = 32 << 20
_AT_ONCE = 4  # headers that are read before others have their turn; one takes some milliseconds at worst


def from_pixels(pixels: Array, card: ModelCard) -> Array:
    """Puts rows `[n, H, W, 3]` of uint8 into the card's layout and datatype, contiguous; values stay 0..255."""
    if card.layout == "NCHW":
        pixels = pixels.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(pixels, dtype=np.uint8 if card.datatype == "UINT8" else np.float32)


class ImageDecoder:
    """Decodes image files for one model, in processes that it starts with the first of them.

    Args:
        card: of the model.
        processes: images that are decoded at once. Large ones may take all but one of them, so that a small one never
            waits for a large one.
        max_bytes: files, and what decoding them takes, of all requests together; more are shed.
        max_pixels: a request whose files have more in all is refused before any is decoded.
        max_waiting: files that may wait to be decoded; more are shed, so that the wait stays short.
    """

    def __init__(
        self,
        card: ModelCard,
        *,
        processes: int = 2,
        max_bytes: int = 1 << 30,
        max_pixels: int = MAX_PIXELS,
        max_waiting: int = 256,
    ) -> None:
        self._card = card
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
        self._max_waiting = max_waiting
        self._waiting = self._bytes = 0
        self._side = max(card.height, card.width)
        self._idle: asyncio.LifoQueue[ImageProcess] = asyncio.LifoQueue()
        self._unstarted = [ImageProcess(card.height, card.width, card.interpolation) for _ in range(processes)]
        self._large = asyncio.Semaphore(max(1, processes - 1))
        self._jobs: set[asyncio.Task[Any]] = set()
        self._running: set[asyncio.Task[Any]] = set()

    async def decode_all(self, files: Sequence[bytes], until_s: float = math.inf) -> Array:
        """Decodes files to rows `[n, ...]` in the card's layout and datatype.

        Args:
            files: image files.
            until_s: the loop's time of the deadline; what is not decoded then is given up soon after.

        Raises:
            RequestError: a file is no image, or is damaged; the message says which.
            TooLargeError: a file has, or all have together, too many pixels.
            OverloadedError: too many files, or too many bytes, wait already.
        """
        headers = []
        for row, data in enumerate(files):
            if row % _AT_ONCE == _AT_ONCE - 1:
                await asyncio.sleep(0)
            headers.append(self._header(data, row))
        pixels = sum(header.pixels for header in headers)
        if pixels > self._max_pixels:
            raise TooLargeError(
                f"{len(files)} images have {pixels / 1e6:.3g} million pixels in all; at most "
                f"{self._max_pixels / 1e6:g} million are taken in one request"
            )
        costs = [len(data) + header.decoding_bytes(self._side) for data, header in zip(files, headers, strict=True)]
        # A single big request on an idle decoder may exceed the bounds: it would otherwise never be served.
        if self._waiting and self._waiting + len(files) > self._max_waiting:
            raise OverloadedError(f"{self._waiting} images wait to be decoded; try again soon")
        if self._waiting and self._bytes + sum(costs) > self._max_bytes:
            raise OverloadedError(
                f"the images that wait to be decoded take {self._bytes / 1e6:,.0f} MB already; try again soon"
            )
        while self._unstarted:
            self._free(self._unstarted.pop())
        jobs = [
            self._begin(data, row, cost, until_s) for row, (data, cost) in enumerate(zip(files, costs, strict=True))
        ]
        try:
            rows = [await asyncio.shield(job) for job in jobs]
        finally:
            for job in jobs:
                if job not in self._running:  # one that is at work ends soon, or is killed at its deadline
                    job.cancel()
        return from_pixels(np.stack(rows), self._card)

    def close(self) -> None:
        """Stops decoding, and end the processes."""
        for job in self._jobs:
            job.cancel()  # which ends its process
        while not self._idle.empty():
            self._idle.get_nowait().kill()

    def _header(self, data: bytes, row: int) -> ImageHeader:
        try:
            header = read_header(data)
        except UnreadableImageError as error:
            raise RequestError(f"image {row}: {error}") from error
        if header is None:
            hint = f"; {_HOW_TO_SEND}" if data.startswith(_AS_TEXT) else ""
            raise RequestError(
                f"image {row}: not an image file of a known format, which are {', '.join(FORMATS)} "
                f"({len(data)} bytes){hint}"
            )
        try:
            check_size(header, self._max_pixels)
        except UnreadableImageError as error:
            raise TooLargeError(f"image {row}: {error}") from error
        return header

    def _begin(self, data: bytes, row: int, cost: int, until_s: float) -> asyncio.Task[Array]:
        self._waiting += 1
        self._bytes += cost
        job = asyncio.get_running_loop().create_task(self._decode(data, row, cost, until_s))
        self._jobs.add(job)
        job.add_done_callback(partial(self._end, cost))
        return job

    def _end(self, cost: int, job: asyncio.Task[Array]) -> None:
        self._jobs.discard(job)
        self._running.discard(job)
        self._waiting -= 1
        self._bytes -= cost
        if not job.cancelled():
            job.exception()  # several files may be bad; only the first is reported, the others are not forgotten

    def _free(self, process: ImageProcess) -> None:
        """Lets the process take a file, as soon as it is ready."""
        if process.ready:
            self._idle.put_nowait(process)
        else:
            job = asyncio.get_running_loop().create_task(self._start(process))
            self._jobs.add(job)
            job.add_done_callback(self._jobs.discard)

    async def _start(self, process: ImageProcess) -> None:
        with suppress(OverloadedError):  # tried again, and said, when a file comes to it
            await process.start()
        self._idle.put_nowait(process)

    async def _decode(self, data: bytes, row: int, cost: int, until_s: float) -> Array:
        """Decodes one file to uint8 `[H, W, 3]`."""
        async with self._large if cost > _LARGE_BYTES else nullcontext():
            process = await self._idle.get()
            job = asyncio.current_task()
            assert job is not None
            self._running.add(job)
            try:
                pixels = await process.decode(data, until_s)
            except UnreadableImageError as error:
                raise RequestError(f"image {row}: {error}") from error
            finally:
                if job.cancelling():  # everything ends
                    process.kill()
                else:
                    self._free(process)
        return np.frombuffer(pixels, np.uint8).reshape(self._card.height, self._card.width, 3)
