"""Lets workers help each other out: who has a sum gives it to those who lost it, and all agree when nobody has it.

Each worker has a desk, a socket with a thread of its own, since it may be computing when it is asked. About an
exchange, known by its first fragment, a worker is in one of three states:

- working: it may still complete it;
- frozen: its server is silent, and it has promised to complete the exchange by nothing but the sums of a worker that
  has all of them;
- done: it has all sums, and gives them to whoever asks.

If all workers are frozen, nobody is done, and nobody will be: then, and only then, they may add in another way. Each
finds that out for itself, and all of them the same.
"""

import queue
import socket
import struct
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evenkeel.switch.host import SwitchHost

__all__ = ["ExchangeState", "PeerAnswer", "PeerDesk", "PeerStream"]

_MESSAGE = struct.Struct("<4sBBHIQIII")  # magic, kind, state, worker, job, token, exchange, fragment, bitmap
_MAGIC = b"EKP1"
_ASK, _STATE, _SUM = 1, 2, 3
_LISTED = 64
_KEPT_BYTES = 64 << 20
_WAITING = 4096


class ExchangeState(IntEnum):
    """Says how far a worker is with an exchange."""

    WORKING = 0
    FROZEN = 1
    DONE = 2


@dataclass(frozen=True, slots=True)
class PeerAnswer:
    """Holds what a worker said: its state, or a sum with it."""

    worker: int
    job: int
    first: int
    state: ExchangeState
    fragment: int
    bitmap: int
    total: bytes | None


@dataclass
class PeerStream:
    """Holds what a worker can tell of one job's exchanges.

    Attributes:
        host: the job's transport.
        next: number of the first fragment of the next exchange; those before have all their sums here.
        frozen: first fragment of the exchange that this worker has frozen; None where it has not.
        past: exchanges that are over: first fragment, sums and who is in them, newest last.
    """

    host: SwitchHost
    next: int = 0
    frozen: int | None = None
    past: deque[tuple[int, NDArray[np.uint8], NDArray[np.uint32]]] = field(default_factory=deque)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def finish(self, first: int, totals: NDArray[np.uint8], bitmaps: NDArray[np.uint32]) -> None:
        """Keeps the sums of an exchange that is over, and forgets old ones: two at least stay."""
        with self.lock:
            self.past.append((first, totals, bitmaps))
            self.next = first + len(bitmaps)
            while len(self.past) > 2 and sum(kept[1].nbytes for kept in self.past) > _KEPT_BYTES:
                self.past.popleft()

    def state(self, first: int) -> ExchangeState:
        """Says how far this worker is with an exchange."""
        if self.next > first:
            return ExchangeState.DONE
        return ExchangeState.FROZEN if self.frozen == first else ExchangeState.WORKING

    def total(self, fragment: int) -> tuple[int, bytes] | None:
        """Gives who is in a fragment, and its sum, if it is here."""
        size = self.host.down_bytes
        with self.lock:
            for first, totals, bitmaps in self.past:
                at = fragment - first
                if 0 <= at < len(bitmaps):
                    return int(bitmaps[at]), totals[at * size : (at + 1) * size].tobytes()
            return self.host.get(fragment) if fragment >= self.next else None


class PeerDesk:
    """Answers other workers, and asks them.

    Args:
        bind: address to bind.
        worker: number of this one.
        world: how many there are.

    Attributes:
        address: of the desk; the others must know it.
    """

    def __init__(self, bind: str, worker: int, world: int) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((bind, 0))
        self._socket.settimeout(0.2)
        self.address: tuple[str, int] = self._socket.getsockname()
        self._worker, self._world = worker, world
        self._token = 0
        self._peers: dict[int, tuple[str, int]] = {}
        self._streams: dict[int, PeerStream] = {}
        self._answers: queue.Queue[PeerAnswer] = queue.Queue(_WAITING)
        self._frozen_peers: dict[int, int] = {}  # job -> exchange that somebody has frozen
        self._closed = threading.Event()
        self.dropped = 0
        self._thread = threading.Thread(target=self._serve, name="evenkeel-peers", daemon=True)

    def open(self, token: int, addresses: Sequence[tuple[str, int]]) -> None:
        """Begins to answer.

        Args:
            token: known to the workers only.
            addresses: of all desks, this one's too.
        """
        self._token = token
        self._peers = {worker: address for worker, address in enumerate(addresses) if worker != self._worker}
        self._thread.start()

    def add(self, stream: PeerStream) -> None:
        """Answers for one more job."""
        self._streams[stream.host.terms.job] = stream

    def remove(self, stream: PeerStream) -> None:
        """Answers for a job no longer."""
        job = stream.host.terms.job
        self._streams.pop(job, None)
        self._frozen_peers.pop(job, None)

    def frozen_by_another(self, job: int, first: int) -> bool:
        """Says whether another worker has frozen this exchange, or a later one."""
        frozen = self._frozen_peers.get(job)
        return frozen is not None and frozen >= first

    def ask(self, stream: PeerStream, first: int, missing: Sequence[int]) -> None:
        """Asks all others how far they are with an exchange, and for these fragments of it."""
        head = self._message(_ASK, stream, stream.state(first), first)
        body = struct.pack(f"<{min(len(missing), _LISTED)}I", *missing[:_LISTED])
        for address in self._peers.values():
            self._send(head + body, address)

    def answers(self, wait_s: float) -> list[PeerAnswer]:
        """Gives what has come in; waits so long for the first."""
        found: list[PeerAnswer] = []
        try:
            found.append(self._answers.get(timeout=wait_s))
            while True:
                found.append(self._answers.get_nowait())
        except queue.Empty:
            return found

    def close(self) -> None:
        """Ends the thread; who asks from now on hears nothing."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while not self._closed.is_set():
            try:
                packet, address = self._socket.recvfrom(65536)
            except TimeoutError:
                continue
            except OSError:
                if self._closed.is_set():
                    return
                continue  # what an earlier answer met
            if not self._take(packet, address):
                self.dropped += 1

    def _take(self, packet: bytes, address: tuple[Any, ...]) -> bool:
        """Answers, or keeps, what another worker said; False where nobody of this job said it."""
        if len(packet) < _MESSAGE.size:
            return False
        magic, kind, state, worker, job, token, first, fragment, bitmap = _MESSAGE.unpack_from(packet)
        body, stream = packet[_MESSAGE.size :], self._streams.get(job)
        if magic != _MAGIC or token != self._token or worker not in self._peers or stream is None:
            return False
        if state not in ExchangeState._value2member_map_:
            return False
        if kind == _ASK:
            self._answer(stream, first, ExchangeState(state), body, address)
            return True
        if kind not in (_STATE, _SUM):
            return False
        total = body if kind == _SUM else None
        try:
            self._answers.put_nowait(PeerAnswer(worker, job, first, ExchangeState(state), fragment, bitmap, total))
        except queue.Full:
            return False
        return True

    def _answer(
        self, stream: PeerStream, first: int, theirs: ExchangeState, body: bytes, address: tuple[Any, ...]
    ) -> None:
        if theirs == ExchangeState.FROZEN:
            job = stream.host.terms.job
            self._frozen_peers[job] = max(first, self._frozen_peers.get(job, 0))
        state = stream.state(first)
        self._send(self._message(_STATE, stream, state, first), address)
        if theirs == ExchangeState.FROZEN and state != ExchangeState.DONE:
            return  # what is here may never become whole
        count = min(len(body) // 4, _LISTED)
        for fragment in struct.unpack(f"<{count}I", body[: 4 * count]):
            found = stream.total(fragment)
            if found is not None:
                self._send(self._message(_SUM, stream, state, first, fragment, found[0]) + found[1], address)

    def _message(
        self, kind: int, stream: PeerStream, state: ExchangeState, first: int, fragment: int = 0, bitmap: int = 0
    ) -> bytes:
        job = stream.host.terms.job
        return _MESSAGE.pack(_MAGIC, kind, state, self._worker, job, self._token, first, fragment, bitmap)

    def _send(self, packet: bytes, address: tuple[Any, ...]) -> None:
        try:
            self._socket.sendto(packet, address)
        except OSError:
            self.dropped += 1  # they ask again
