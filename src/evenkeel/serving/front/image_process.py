"""Decodes image files in a process of its own, which can be stopped at any time.

A thread cannot be: a library that decodes a hostile file goes on until it is done. The process gets one file after the
other over the socket pair that it inherits, and answers each with its pixels or with what is wrong with it.
"""

import asyncio
import os
import resource
import socket
import struct
import subprocess
import sys
from contextlib import suppress
from typing import cast

from evenkeel.errors import OverloadedError, UnreadableImageError
from evenkeel.images.decode import rgb_pixels
from evenkeel.images.resize import Filter
from evenkeel.processes import end_with_parent

__all__ = ["ImageProcess", "main"]

_LENGTH = struct.Struct("<Q")
_REPLY = struct.Struct("<?Q")  # whether it is pixels, and how many bytes follow
_START_S = 30.0  # for a process to be ready, on a machine that is busy
# One image: the largest that are taken need a second or two.
_MAX_S = 10.0
# A process is not killed sooner: starting another takes longer than most images do.
_LEAST_S = 0.25
# Address space. Our limits on sizes keep well below; this one is for what they do not foresee.
_MAX_MEMORY = 3 << 30


class ImageProcess:
    """Decodes in a process, which is started again after it had to be killed.

    Args:
        height: of every picture, pixels.
        width: the same.
        interpolation: how files are scaled.
    """

    def __init__(self, height: int, width: int, interpolation: Filter) -> None:
        self._arguments = [str(height), str(width), interpolation]
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    @property
    def ready(self) -> bool:
        """True while it waits for a file."""
        return self._socket is not None and self._process is not None and self._process.poll() is None

    async def start(self) -> None:
        """Starts the process if there is none; returns when it is ready.

        Raises:
            OverloadedError: it cannot be started.
        """
        if self.ready:
            return
        self.kill()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        arguments = [str(theirs.fileno()), str(os.getpid()), *self._arguments]
        # -P: a file beside the user's must not be taken for a module of ours. A session of its own: Ctrl-C in a
        # terminal is for the gateway alone.
        command = [sys.executable, "-P", "-m", "evenkeel.serving.front.image_process", *arguments]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **os.environ},
            )
            theirs.close()
            async with asyncio.timeout(_START_S):
                await _received(ours)
        except BaseException as error:
            theirs.close()
            ours.close()
            self.kill()
            if not isinstance(error, OSError):  # TimeoutError is one
                raise
            raise OverloadedError(f"no process to decode images can be started: {error}; try again soon") from error
        self._socket = ours

    async def decode(self, data: bytes, until_s: float) -> bytes:
        """Gives the pixels of an image file, row by row; the process is killed when it takes too long.

        Args:
            data: the file.
            until_s: the loop's time by which nobody wants it any more.

        Raises:
            UnreadableImageError: no image, damaged, or it takes more than ten seconds.
            OverloadedError: the process cannot be started.
            TimeoutError: `until_s` has passed.
        """
        await self.start()
        loop, link = asyncio.get_running_loop(), self._socket
        assert link is not None
        begin_s = loop.time()
        if begin_s > until_s:
            raise TimeoutError
        try:
            async with asyncio.timeout_at(min(begin_s + _MAX_S, max(until_s, begin_s + _LEAST_S))):
                await loop.sock_sendall(link, _LENGTH.pack(len(data)))
                await loop.sock_sendall(link, data)
                good, content = await _received(link)
        except BaseException as error:
            self.kill()
            if isinstance(error, TimeoutError) and loop.time() < until_s:
                raise UnreadableImageError(f"it takes more than {_MAX_S:g} s to decode") from None
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                raise UnreadableImageError("the process that decoded it ended") from error
            raise
        if not good:
            raise UnreadableImageError(content.decode())
        return content

    def kill(self) -> None:
        """Ends the process, if there is one."""
        process, self._process = self._process, None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if process is not None:
            process.kill()
            try:
                # A process with much memory takes a while to end.
                asyncio.get_running_loop().run_in_executor(None, process.wait)
            except RuntimeError:  # no loop runs any more, so that nobody waits for this
                process.wait()


async def _received(link: socket.socket) -> tuple[bool, bytes]:
    """Reads the next message of the process."""
    good, size = _REPLY.unpack(await _read(link, _REPLY.size))
    return good, await _read(link, size)


async def _read(link: socket.socket, size: int) -> bytes:
    loop, content, place = asyncio.get_running_loop(), bytearray(size), 0
    view = memoryview(content)
    while place < size:
        count = await loop.sock_recv_into(link, view[place:])
        if not count:
            raise ConnectionError("it closed its connection")
        place += count
    return bytes(content)


def main(arguments: list[str]) -> None:
    """Decodes files until the connection ends; see `ImageProcess.start` for the arguments."""
    number, parent, height, width, interpolation = arguments
    end_with_parent(int(parent))
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY, _MAX_MEMORY))
    # The gateway may end at any time.
    with suppress(ConnectionError), socket.socket(fileno=int(number)) as link, link.makefile("rb") as file:
        _reply(link, True, b"")
        while len(begin := file.read(_LENGTH.size)) == _LENGTH.size:
            data = file.read(_LENGTH.unpack(begin)[0])
            try:
                good, content = True, rgb_pixels(data, int(height), int(width), cast(Filter, interpolation)).tobytes()
            except UnreadableImageError as error:
                good, content = False, str(error).encode()
            _reply(link, good, content)


def _reply(link: socket.socket, good: bool, content: bytes) -> None:
    link.sendall(_REPLY.pack(good, len(content)) + content)


if __name__ == "__main__":
    main(sys.argv[1:])
