"""The transport of a switch on a network and a clock of our own: the C code of hosts and servers, without sockets.

One thread, seeded, so that a run can be repeated. Packets are lost, doubled and reordered; workers and servers restart.
"""

import ctypes
import heapq
import random
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from ctypes import CFUNCTYPE, POINTER, byref, c_char_p, c_int, c_uint8, c_uint16, c_uint32, c_uint64
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evenkeel.switch import build
from evenkeel.switch.aggregator import SERVER, Job, Rule, To
from evenkeel.switch.host import HostTerms, StepEnd, typed
from evenkeel.switch.packet import Kind, LaneType, parse
from evenkeel.switch.registrar import JobAsked, largest_of
from evenkeel.switch.server import SERVER_COUNTERS, typed_server
from evenkeel.switch.table import Table
from evenkeel.switch.terms import Control, Terms, Welcome, hello, read_control

MS = 1_000_000
_TAKE = CFUNCTYPE(c_int, c_int, POINTER(c_uint32), POINTER(c_uint16), POINTER(c_uint8), c_int)
_GIVE = CFUNCTYPE(None, c_int, c_uint32, c_uint16, POINTER(c_uint8), c_int)
_SERVER_FD = 1000
_STUCK_NS = 250 * MS


@cache
def library() -> ctypes.CDLL:
    """Host and server in one library, over virtual sockets."""
    native, here = Path(build.__file__).parent / "native", Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "virtual.so"
        sources = [native / "host.c", native / "server.c", here / "virtual_network.c"]
        compiler = shutil.which("cc") or "gcc"
        flags = ["-O2", "-shared", "-fPIC", "-DEK_VIRTUAL", f"-I{native}"]
        subprocess.run([compiler, *flags, *map(str, sources), "-o", str(made)], check=True)
        return typed_server(typed(ctypes.CDLL(str(made))))


@dataclass
class Weather:
    """What happens to packets.

    Attributes:
        loss: share that is lost.
        twice: share that comes twice.
        late: share that is up to 20 ms late, and so overtaken.
        latency_ns: of each way between a host and the middle.
        rate_bps: of each link, each way; 0: unlimited.
        queue_ns: how long a packet may wait for a link, before it is lost.
    """

    loss: float = 0.0
    twice: float = 0.0
    late: float = 0.0
    latency_ns: int = 20_000
    rate_bps: float = 0.0
    queue_ns: int = 50 * MS


@dataclass
class Worker:
    """One worker, and what it has."""

    number: int
    handle: int = 0
    job: int | None = None
    exchange: int = 0
    joined: bool = False
    computing: bool = False
    hello_ns: int = 0
    moved_ns: int = 0
    left: int = -1
    totals: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    bitmaps: NDArray[np.uint32] = field(default_factory=lambda: np.zeros(0, np.uint32))
    message: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    generation: int = 0  # grows when it restarts, and computes other gradients
    past: dict[int, tuple[int, NDArray[np.uint8], NDArray[np.uint32]]] = field(default_factory=dict)
    finished_ns: dict[int, int] = field(default_factory=dict)


class Transport:
    """Workers of one job, its server, and a switch in the server's process, in the middle, or nowhere.

    Args:
        terms: of the job.
        fragments: of an exchange.
        exchanges: how many there are.
        where: `user`: the rule is in the server's process; `kernel`: in the middle; `alone`: nowhere.
        rule: of the switch.
        weather: what happens to packets.
        seed: of all that.
        compute_ns: from a worker's sum to its next message.
    """

    def __init__(
        self,
        terms: Sequence[Terms],
        fragments: int,
        exchanges: int,
        where: str,
        rule: Rule,
        weather: Weather,
        seed: int,
        compute_ns: Callable[[int, int], int] = lambda worker, exchange: 0,
    ) -> None:
        self.terms, self.fragments, self.exchanges = terms, fragments, exchanges
        self.where, self.weather = where, weather
        self.compute_ns = compute_ns
        self.draw = random.Random(seed)
        self.now, self._serial, self.epoch = 0, 0, 0
        self.events: list[tuple[int, int, Callable[[], None]]] = []
        self.inboxes: dict[int, deque[tuple[int, bytes]]] = {_SERVER_FD: deque()}
        self.busy: dict[tuple[str, int], int] = {}
        self.table = Table(rule) if where != "alone" else None
        self.enrolled: dict[int, int] = {}
        self.sum_bits = terms[0].sum_bits if where == "user" else 0
        self.workers = [Worker(number) for number in range(len(terms))]
        self.expected: dict[tuple[int, int], list[NDArray[np.uint8]]] = {}
        self._keep = (_TAKE(self._take), _GIVE(self._give), CFUNCTYPE(c_int, POINTER(JobAsked))(self._enroll))
        self.server: Any = None
        library().virtual_network(*self._keep[:2])
        library().virtual_clock(c_uint64(0))
        self._start_server()
        for worker in self.workers:
            self.inboxes[worker.number] = deque()
            self._open(worker)
            self._say_hello(worker)

    # ---- what happens to the nodes ----

    def restart_server(self) -> None:
        """It forgets everything."""
        library().server_behind(self.server, 0, 0, None)  # killed: it takes no leave
        library().server_close(self.server)
        self.inboxes[_SERVER_FD].clear()
        if self.where == "user" and self.table is not None:
            self.table = Table(self.table.rule)
        self._start_server()

    def restart_worker(self, number: int) -> None:
        """It dies, and computes other gradients; all go back to what not all have, in a new epoch."""
        self.epoch += 1
        self.workers[number].generation += 1
        base = min(worker.exchange for worker in self.workers)
        for worker in self.workers:
            worker.exchange, worker.joined = base, False
            worker.past = {at: found for at, found in worker.past.items() if at < base}
            if worker.number == number:
                library().host_close(worker.handle)
                self._open(worker)
            library().host_anew(worker.handle, self.epoch)
            self._begin(worker)
            self._say_hello(worker)

    def run(self, until_ns: int) -> None:
        """Goes on until all workers have all sums, or the time is over."""
        self.after(0, self._tick)
        while self.events and self.now < until_ns:
            if all(worker.exchange == self.exchanges for worker in self.workers):
                return
            self.now, _, work = heapq.heappop(self.events)
            library().virtual_clock(c_uint64(self.now))
            work()

    def close(self) -> None:
        """Frees what C holds."""
        library().server_behind(self.server, 0, 0, None)
        library().server_close(self.server)
        for worker in self.workers:
            library().host_close(worker.handle)

    def after(self, wait_ns: int, work: Callable[[], None]) -> None:
        """Does something later."""
        self._serial += 1
        heapq.heappush(self.events, (self.now + wait_ns, self._serial, work))

    def counters(self) -> dict[str, int]:
        """Those of the server."""
        count = c_int()
        found = library().server_counters(self.server, byref(count))
        return dict(zip(SERVER_COUNTERS, found[: count.value], strict=True))

    # ---- workers ----

    def _open(self, worker: Worker) -> None:
        terms = self.terms[worker.number]
        settings = HostTerms(
            *(terms.job, self.epoch, terms.worker, terms.world, terms.lane_type, terms.up_bytes),
            *(terms.down_bytes(self.sum_bits), terms.at_least, terms.window, 1 << 12, terms.token, 10**18),
        )
        addresses, ports = (c_uint32 * 1)(_SERVER_FD), (c_uint16 * 1)(7000)
        worker.handle = library().host_open(worker.number, addresses, ports, 1, byref(settings))
        worker.job = None
        self._begin(worker)

    def _begin(self, worker: Worker) -> None:
        terms, size = self.terms[worker.number], self.fragments * self.terms[worker.number].up_bytes
        key = worker.number, worker.exchange, worker.generation
        random_lanes = np.random.default_rng(key)
        if terms.lane_type == LaneType.INTS:
            worker.message = random_lanes.integers(0, 1 << 20, size // 4, np.uint32).view(np.uint8)
        else:
            worker.message = random_lanes.integers(0, 256, size, dtype=np.uint8)
        down = terms.down_bytes(self.sum_bits)
        worker.totals = np.zeros(self.fragments * down, np.uint8)
        worker.bitmaps = np.zeros(self.fragments, np.uint32)
        worker.left, worker.moved_ns, worker.computing = -1, self.now, False
        arrays = worker.message.ctypes.data, worker.totals.ctypes.data, worker.bitmaps.ctypes.data
        library().host_begin(worker.handle, *arrays, worker.exchange * self.fragments, self.fragments, 128)

    def _say_hello(self, worker: Worker) -> None:
        terms, first = self.terms[worker.number], worker.exchange * self.fragments
        worker.joined, worker.hello_ns = False, self.now
        self._post(worker.number, _SERVER_FD, hello(terms, worker.job, self.epoch, first, first, 1, 0))

    def _turn(self, worker: Worker) -> None:
        if worker.computing or worker.exchange == self.exchanges:
            return  # what comes meanwhile waits in its socket
        if not worker.joined:
            inbox = self.inboxes[worker.number]
            while inbox and not worker.joined:
                found = read_control(inbox.popleft()[1], self.terms[worker.number], self.epoch)
                if found is not None and found[0] == Control.WELCOME and (welcome := Welcome.read(found[1])):
                    assert welcome.sum_bits == self.sum_bits
                    worker.joined, worker.job = True, welcome.job
                    library().host_renumber(worker.handle, welcome.job)
                    library().host_anew(worker.handle, self.epoch)
            if not worker.joined:
                if self.now - worker.hello_ns > 100 * MS:
                    self._say_hello(worker)
                return
        while True:
            outcome = StepEnd(library().host_step(worker.handle, 0))
            if outcome != StepEnd.GOES_ON or not self.inboxes[worker.number]:
                break
        if outcome == StepEnd.UNKNOWN:
            self._say_hello(worker)
        elif outcome == StepEnd.FINISHED:
            worker.past[worker.exchange] = worker.generation, worker.totals, worker.bitmaps
            worker.finished_ns[worker.exchange] = self.now
            worker.exchange += 1
            if worker.exchange < self.exchanges:
                worker.computing = True
                epoch, exchange = self.epoch, worker.exchange
                self.after(self.compute_ns(worker.number, exchange), lambda: self._next(worker, epoch, exchange))
        else:
            self._help(worker)

    def _next(self, worker: Worker, epoch: int, exchange: int) -> None:
        if (self.epoch, worker.exchange) == (epoch, exchange):
            self._begin(worker)
            self._turn(worker)

    def _help(self, worker: Worker) -> None:
        """What desks do: who has a sum gives it to a worker that has been stuck for a while."""
        found = (c_uint32 * 256)()
        count = library().host_missing(worker.handle, found, 256)
        if count != worker.left:
            worker.left, worker.moved_ns = count, self.now
        elif self.now - worker.moved_ns > _STUCK_NS:
            worker.moved_ns = self.now
            down = self.terms[0].down_bytes(self.sum_bits)
            for other in self.workers:
                past = other.past.get(worker.exchange)
                for fragment in found[:count]:
                    at = fragment - worker.exchange * self.fragments
                    bitmap, total = c_uint32(), ctypes.create_string_buffer(down)
                    if past is not None:
                        bitmap.value, body = int(past[2][at]), past[1][at * down : (at + 1) * down].tobytes()
                        library().host_put(worker.handle, fragment, bitmap, c_char_p(body))
                    elif other.exchange == worker.exchange and library().host_get(
                        other.handle, fragment, byref(bitmap), total
                    ):
                        library().host_put(worker.handle, fragment, bitmap, c_char_p(total.raw))

    # ---- the server and the switch ----

    def _start_server(self) -> None:
        address = self.table.address if self.where == "user" and self.table is not None else None
        self.server = library().server_open(_SERVER_FD, address, 1 << 10, 1 << 24, 1, 0, 0)
        if self.where == "kernel":
            words = self.terms[0].lanes * self.terms[0].lane_type.sum_bits // 64
            library().server_behind(self.server, words, 0, self._keep[2])

    def _enroll(self, pointer: Any) -> int:
        asked = pointer.contents
        known = self.enrolled.get(asked.job) == asked.token
        if asked.joined != (1 << asked.workers) - 1:
            return int(asked.job) if known else -1
        number = asked.job if known else len(self.enrolled) + 3  # never the name
        self.enrolled[number] = asked.token
        lanes, deadline = LaneType(asked.lanes), bool(asked.via_server)
        largest = largest_of(lanes, asked.workers)
        assert self.table is not None
        job = Job(asked.token, asked.workers, lanes, asked.words, largest, epoch=asked.epoch, via_server=deadline)
        self.table.register(number, job)
        return int(number)

    def _serve(self) -> None:
        timed = c_int()
        while library().server_turn(self.server, byref(timed)) and self.inboxes[_SERVER_FD]:
            pass

    def _tick(self) -> None:
        self._serve()
        for worker in self.workers:
            self._turn(worker)
        self.after(MS, self._tick)

    # ---- the network ----

    def _take(self, fd: int, address: Any, port: Any, room: Any, most: int) -> int:
        if not self.inboxes[fd]:
            return -1
        source, data = self.inboxes[fd].popleft()
        address[0], port[0] = _swapped32(source), _swapped16(7000)
        assert len(data) <= most
        ctypes.memmove(room, data, len(data))
        return len(data)

    def _give(self, fd: int, address: int, port: int, data: Any, size: int) -> None:
        self._post(fd, _swapped32(address), ctypes.string_at(data, size))

    def _post(self, source: int, to: int, data: bytes) -> None:
        """Sends a packet over its host's link to the middle; a server in user space is in the middle itself."""
        if source == _SERVER_FD and self.where != "kernel":
            self._leave(source, to, data)
        else:
            self._link(("up", source), len(data), lambda: self._in_the_middle(source, to, data))

    def _in_the_middle(self, source: int, to: int, data: bytes) -> None:
        if self.where != "kernel" or self.table is None:
            self._leave(source, to, data)
            return
        packet = parse(data)
        if packet.kind == Kind.CONTROL or packet.job not in self.enrolled:
            self._leave(source, to, data)
            return
        sender = SERVER if source == _SERVER_FD else source
        whom, out = self.table.step(data, sender, self.now)
        if whom == To.NOBODY:
            return
        if whom == To.ALL:
            for worker in self.workers:
                self._leave(source, worker.number, out)
        self._leave(source, to if whom == To.WORKERS else _SERVER_FD, out)

    def _leave(self, source: int, to: int, data: bytes) -> None:
        if to == _SERVER_FD and self.where != "kernel":
            self._arrive(source, to, data)
        else:
            self._link(("down", to), len(data), lambda: self._arrive(source, to, data))

    def _link(self, link: tuple[str, int], size: int, then: Callable[[], None]) -> None:
        weather = self.weather
        wait = 0
        if weather.rate_bps:
            wait = max(self.busy.get(link, 0) - self.now, 0)
            if wait > weather.queue_ns:
                return
            wait += round((size + 42) * 8e9 / weather.rate_bps)
            self.busy[link] = self.now + wait
        if self.draw.random() < weather.loss:
            return
        for _ in range(2 if self.draw.random() < weather.twice else 1):
            late = self.draw.randrange(20 * MS) if self.draw.random() < weather.late else 0
            jitter = self.draw.randrange(weather.latency_ns // 4 + 1) if weather.late else 0
            self.after(wait + weather.latency_ns + jitter + late, then)

    def _arrive(self, source: int, to: int, data: bytes) -> None:
        self.inboxes[to].append((source, data))
        if to == _SERVER_FD:
            self._serve()
        else:
            self._turn(self.workers[to])


def _swapped32(number: int) -> int:
    return int.from_bytes(number.to_bytes(4, "big"), "little")


def _swapped16(number: int) -> int:
    return int.from_bytes(number.to_bytes(2, "big"), "little")
