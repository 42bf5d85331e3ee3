"""Processes that decode: the same pixels as everywhere else, stopped when they take too long, bounded together."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from PIL import Image

from evenkeel.errors import OverloadedError, RequestError, UnreadableImageError
from evenkeel.images.decode import rgb_pixels
from evenkeel.serving.front import image_process
from evenkeel.serving.front.image_process import ImageProcess
from evenkeel.serving.front.images import ImageDecoder
from http_helpers import file_of, make_card

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
FILE = file_of(PICTURE)
NEVER = float("inf")


def run(use: Callable[[ImageProcess], Awaitable[None]]) -> None:
    async def used() -> None:
        process = ImageProcess(4, 5, "lanczos")
        try:
            await use(process)
        finally:
            process.kill()

    asyncio.run(used())


def pid(process: ImageProcess) -> int:
    assert process._process is not None
    return process._process.pid


def ended(number: int) -> bool:
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_process_gives_the_same_pixels_as_the_function_for_one_file_after_the_other() -> None:
    async def use(process: ImageProcess) -> None:
        for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
            content = file_of(PICTURE, form)
            assert await process.decode(content, NEVER) == rgb_pixels(content, 4, 5).tobytes()
            with pytest.raises(UnreadableImageError, match="not an image file of a known format"):
                await process.decode(b"no image", NEVER)
        grey = Image.fromarray(np.full((9, 9), 0x5A00, np.uint16))
        assert set(await process.decode(file_of(np.asarray(grey)), NEVER)) == {0x5A}

    run(use)


def test_a_process_that_hangs_is_killed_at_the_deadline_and_replaced() -> None:
    async def use(process: ImageProcess) -> None:
        await process.decode(FILE, NEVER)
        first = pid(process)
        os.kill(first, signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            await process.decode(FILE, asyncio.get_running_loop().time() + 0.01)
        assert await process.decode(FILE, NEVER) == rgb_pixels(FILE, 4, 5).tobytes()
        assert pid(process) != first

    run(use)


def test_an_image_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_process, "_MAX_S", 0.05)

    async def use(process: ImageProcess) -> None:
        await process.start()
        os.kill(pid(process), signal.SIGSTOP)
        with pytest.raises(UnreadableImageError, match="it takes more than"):
            await process.decode(FILE, NEVER)

    run(use)


def test_a_process_that_dies_at_work_fails_its_image_and_no_other() -> None:
    async def use(process: ImageProcess) -> None:
        await process.start()
        os.kill(pid(process), signal.SIGSTOP)
        work = asyncio.ensure_future(process.decode(FILE, NEVER))
        await asyncio.sleep(0)
        os.kill(pid(process), signal.SIGKILL)
        with pytest.raises(UnreadableImageError, match="the process that decoded it ended"):
            await work
        assert await process.decode(FILE, NEVER) == rgb_pixels(FILE, 4, 5).tobytes()

    run(use)


def test_a_process_that_died_while_it_had_nothing_to_do_is_replaced() -> None:
    async def use(process: ImageProcess) -> None:
        await process.decode(FILE, NEVER)
        os.kill(pid(process), signal.SIGKILL)
        assert process._process is not None
        process._process.wait()
        assert await process.decode(FILE, NEVER) == rgb_pixels(FILE, 4, 5).tobytes()

    run(use)


def test_all_processes_start_with_the_first_file_and_one_that_starts_again_holds_up_nobody() -> None:
    async def used() -> None:
        decoder = ImageDecoder(make_card(), processes=2)
        await decoder.decode_all([FILE])
        processes = [await decoder._idle.get() for _ in range(2)]
        for process in processes:
            decoder._free(process)
        first = pid(processes[1])  # which is taken next
        os.kill(first, signal.SIGSTOP)
        stuck = asyncio.ensure_future(decoder.decode_all([FILE], asyncio.get_running_loop().time() + 60))
        while not decoder._running:
            await asyncio.sleep(0)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(RequestError, match="image 0: the process that decoded it ended"):
            await stuck
        assert not processes[1].ready
        assert (await decoder.decode_all([FILE])).shape == (1, 4, 5, 3)  # by the other one
        assert not processes[1].ready
        again = [await decoder._idle.get() for _ in range(2)]
        assert pid(again[1]) != first
        for process in again:
            process.kill()
        decoder.close()

    asyncio.run(used())


def test_a_process_that_cannot_start_is_no_fault_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_process.sys, "executable", "/nowhere/python")

    async def use(process: ImageProcess) -> None:
        with pytest.raises(OverloadedError, match="no process to decode images can be started"):
            await process.decode(FILE, NEVER)

    run(use)


def test_closing_ends_processes_at_work_and_idle_ones() -> None:
    async def used() -> list[int]:
        decoder = ImageDecoder(make_card(), processes=2)
        await decoder.decode_all([FILE, FILE])
        idle = [await decoder._idle.get() for _ in range(2)]
        for process in idle:
            decoder._free(process)
        numbers = [pid(process) for process in idle]
        os.kill(numbers[1], signal.SIGSTOP)  # the one that is taken first
        work = asyncio.ensure_future(decoder.decode_all([FILE]))
        while not decoder._running:
            await asyncio.sleep(0)
        decoder.close()
        with pytest.raises(asyncio.CancelledError):
            await work
        return numbers

    assert all(ended(number) for number in asyncio.run(used()))


def test_a_client_that_leaves_neither_kills_a_process_nor_frees_its_memory_too_early() -> None:
    async def used() -> None:
        decoder = ImageDecoder(make_card(), processes=1, max_bytes=20_000)
        await decoder.decode_all([FILE])
        process = decoder._idle.get_nowait()
        first = pid(process)
        decoder._idle.put_nowait(process)
        os.kill(first, signal.SIGSTOP)
        work = asyncio.ensure_future(decoder.decode_all([FILE]))
        while not decoder._running:
            await asyncio.sleep(0)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        with pytest.raises(OverloadedError, match="the images that wait to be decoded take"):
            await decoder.decode_all([FILE])
        os.kill(first, signal.SIGCONT)
        await asyncio.gather(*decoder._jobs)
        assert (await decoder.decode_all([FILE])).shape == (1, 4, 5, 3)
        assert pid(process) == first
        decoder.close()

    asyncio.run(used())


def test_a_small_image_does_not_wait_for_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    large = file_of(np.zeros((3000, 3000, 3), np.uint8))
    held = asyncio.Event()

    async def decode(self: ImageProcess, data: bytes, until_s: float) -> bytes:
        if data is large:
            await held.wait()
        return bytes(4 * 5 * 3)

    monkeypatch.setattr(ImageProcess, "decode", decode)

    async def used() -> None:
        decoder = ImageDecoder(make_card(), processes=2)
        works = [asyncio.ensure_future(decoder.decode_all([large])) for _ in range(3)]
        await asyncio.sleep(0)
        assert (await decoder.decode_all([FILE])).shape == (1, 4, 5, 3)
        assert not any(work.done() for work in works)
        held.set()
        for work in works:
            await work
        decoder.close()

    asyncio.run(used())


def test_many_headers_are_read_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    turns, seen = 0, []

    def header(self: ImageDecoder, data: bytes, row: int) -> None:
        seen.append(turns)
        if row == 39:
            raise RequestError("the last")

    monkeypatch.setattr(ImageDecoder, "_header", header)

    async def used() -> None:
        nonlocal turns
        work = asyncio.ensure_future(ImageDecoder(make_card()).decode_all([FILE] * 40))
        while not work.done():
            await asyncio.sleep(0)
            turns += 1
        with pytest.raises(RequestError, match="the last"):
            await work

    asyncio.run(used())
    assert len(set(seen)) >= 8


def test_the_first_bad_file_is_the_one_that_is_named() -> None:
    async def used() -> None:
        decoder = ImageDecoder(make_card(), processes=2)
        with pytest.raises(RequestError, match="image 1: cannot be decoded"):
            await decoder.decode_all([FILE, FILE[:-40], FILE[:-50]])
        await asyncio.gather(*decoder._jobs, return_exceptions=True)
        decoder.close()

    asyncio.run(used())
