"""What the tests of workers share: a loop for a test, a worker on the same loop, replies one can wait for."""

import asyncio
import contextlib
import functools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from evenkeel.backends.backend import Backend, Reply
from evenkeel.backends.worker.frames import Frame, FrameKind, FrameReader
from evenkeel.backends.worker.model import Model
from evenkeel.backends.worker.server import serve
from evenkeel.backends.worker.session import ClientOptions
from evenkeel.delays.laws import Delay

# Short, so that a test of a lost worker does not wait; frozen workers are waited for only where a test says so.
OPTIONS = ClientOptions(start_timeout_s=20.0, heartbeat_s=0.05, frozen_after_s=20.0, first_pause_s=0.01)
FOR_EVER = -1  # key of a task that never ends, see ScriptedDelay


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """The async `test` as a plain one, on the loop used in production, ended if it hangs."""

    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(asyncio.wait_for(test(*arguments, **named), 30))

    return run


def doubling(name: str = "double", **known: Any) -> Model:
    """A model that doubles its rows."""
    return Model(name, lambda rows: rows * 2, **known)


def raising(name: str = "raise") -> Model:
    """A model that always raises."""

    def run(rows: np.ndarray) -> np.ndarray:
        raise RuntimeError("no such layer")

    return Model(name, run)


class ScriptedDelay(Delay):
    """Seconds by key; 0 for keys without an entry, an hour for FOR_EVER."""

    def __init__(self, seconds: Mapping[int, float] | None = None) -> None:
        self._seconds = {FOR_EVER % 2**64: 3600.0, **(seconds or {})}
        self.drawn: list[tuple[int, int]] = []

    def draw(self, key: int, worker: int, now_s: float) -> float:
        self.drawn.append((key, worker))
        return self._seconds.get(key, 0.0)

    @property
    def mean_s(self) -> float:
        return 0.0


@contextlib.asynccontextmanager
async def serving(listen: str, models: Sequence[Model], **options: Any) -> AsyncIterator[str]:
    """A worker on this loop, until the block is left; gives its address."""
    listening = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    task = asyncio.ensure_future(
        serve(models, listen, stop=stop, on_listening=listening.set_result, **{"drain_s": 0.0, **options})
    )
    await asyncio.wait([task, listening], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    try:
        yield await listening
    finally:
        stop.set()
        await task


class Replies:
    """Collects the replies of one ticket; to be given to `submit`."""

    def __init__(self) -> None:
        self.all: list[Reply] = []
        self._first = asyncio.get_running_loop().create_future()

    def __call__(self, reply: Reply) -> None:
        self.all.append(reply)
        if not self._first.done():
            self._first.set_result(reply)

    def __await__(self) -> Any:
        return self._first.__await__()


async def ask(backend: Backend, inputs: np.ndarray, model: str = "double", key: int = 0) -> Reply:
    """The reply to one task."""
    replies = Replies()
    backend.submit(model, inputs, replies, key)
    return await replies


def send(backend: Backend, inputs: np.ndarray, model: str = "double", key: int = 0) -> tuple[int, Replies]:
    """Submit one task: its ticket, and what will collect its replies."""
    replies = Replies()
    return backend.submit(model, inputs, replies, key), replies


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something that a process or a peer does has happened."""
    while not condition():
        await asyncio.sleep(0.002)


class RawPeer:
    """A client that says what it likes: bytes out, frames in."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer
        self._frames = FrameReader()
        self._ready: list[Frame] = []

    @classmethod
    async def connect(cls, path: Path) -> "RawPeer":
        return cls(*await asyncio.open_unix_connection(str(path)))

    def send(self, *pieces: bytes | memoryview) -> None:
        for piece in pieces:
            self.writer.write(piece)

    async def receive(self) -> Frame | None:
        """The next frame; None once the other side closed."""
        while not self._ready:
            try:
                data = await self._reader.read(65536)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self._ready += self._frames.feed(data)
            assert self._frames.error is None
        return self._ready.pop(0)

    async def receive_kind(self, kind: FrameKind) -> Frame:
        frame = await self.receive()
        assert frame is not None, f"closed before {kind.name}"
        assert frame.kind is kind
        return frame

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


def open_files() -> set[str]:
    """Targets of this process's open files and memory maps that a worker's connection may have left behind."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/self/fd/{name}"))
    found |= {line.split(None, 5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()}
    return {name for name in found if "evenkeel" in name and "memfd" in name}
