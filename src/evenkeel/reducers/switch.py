"""Adds messages in the network: a switch, or a server, adds packets, and each rank sends its message once."""

import logging
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from evenkeel.coding.wire import Count, Round, Total, Wire
from evenkeel.errors import ConfigurationError, ReducerError
from evenkeel.reducers.ranks.collectives import Collectives
from evenkeel.reducers.ranks.group_collectives import collectives_over
from evenkeel.reducers.reducer import Reducer
from evenkeel.reducers.sharded import Sharded
from evenkeel.switch.host import HostCounters, StepEnd, SwitchHost, resolve, shape_of, unpack_table
from evenkeel.switch.packet import LaneType
from evenkeel.switch.peers import ExchangeState, PeerDesk, PeerStream
from evenkeel.switch.priority import PriorityMeter
from evenkeel.switch.recode import fewer_bits
from evenkeel.switch.terms import ANY_SHAPE, Shape, Terms, fit_terms

__all__ = ["SwitchReducer", "SwitchStats"]

_log = logging.getLogger(__name__)

_SLICE_S = 0.05
_STUCK_S = 0.25  # without a sum, until the other ranks are asked whether they have it
_ASK_AGAIN_S = 0.05
_HELLO_S = 2.0
_RETRY_S = 0.1
_ROUNDS_BETWEEN_RETRIES = 16
_FLOAT_BITS = 32
_OK, _SILENT, _REFUSED = 0, 1, 2
_NO_SHAPE = -1


@dataclass(frozen=True, slots=True)
class SwitchStats:
    """Counts what became of this rank's rounds.

    Attributes:
        through_switch: rounds that the switch added.
        over_shares: rounds that the ranks added themselves, since the switch was gone.
        falls: how often the switch went away.
        returns: how often it came back.
        from_peers: fragments whose sums another rank gave, since they were lost on the way or with a server.
        left_out: fragments of this rank that came too late, and were left out of the sum.
        down: whether the switch is away now.
        transport: what went over this rank's sockets.
    """

    through_switch: int
    over_shares: int
    falls: int
    returns: int
    from_peers: int
    left_out: int
    down: bool
    transport: HostCounters


class SwitchReducer(Reducer):
    """Sends each message once to a switch, which adds packets, and takes in the sums.

    A rank sends `up_width` bits a lane and receives `down_width`, whatever the number of ranks; over shares it sends
    and receives (n - 1) / n of both together. Float lanes, which no switch adds exactly, go over shares.

    If the switch or its server goes away, all ranks agree to add over shares from the same round on, say so once, and
    come back when it is back.

    With a deadline, a fragment that has waited so long ends without those ranks that are late: they get the sum all
    the same, `Total.lost` says which granules of theirs are not in it, and error feedback keeps these. A granule of the
    code must then fit into one packet.

    Args:
        switch: address of the switch or parameter server, `host:port`; several share the fragments.
        over: the ranks, or their group (see GroupCollectives); default: all ranks.
        timeout_s: how long a round may take; then it ends with an error on every rank.
        silence_s: how long the switch may be silent while it owes a sum; then the ranks add over shares.
        deadline: seconds from a fragment's first packet after which it ends without the late ranks; None: it waits.
        at_least: how many ranks a sum must hold then; default: all but one.
        recode: bits, 2 to 7, to which a switch in user space rounds each finished sum on its way down; None: sums come
            exact.
        window: most fragments under way.
        steps: of the whole training; a switch with little memory puts the fragments of jobs that end soon first. None:
            priorities go by the time taken so far.
        mtu: most bytes of an IP packet on the way.

    Attributes:
        exchange_s: time that rounds through the switch have taken so far.
        exchange_bytes: lanes that went the busier way in them, without headers.

    Raises:
        ConfigurationError: a setting out of range, or an address that there is not.
    """

    def __init__(
        self,
        switch: str | Sequence[str],
        over: Collectives | dist.ProcessGroup | None = None,
        *,
        timeout_s: float = 60.0,
        silence_s: float = 1.0,
        deadline: float | None = None,
        at_least: int | None = None,
        recode: int | None = None,
        window: int = 512,
        steps: int | None = None,
        mtu: int = 1500,
    ) -> None:
        self._servers = [resolve(each) for each in ([switch] if isinstance(switch, str) else switch)]
        for name, value, low, high in (
            ("timeout_s", timeout_s, 0.0, 1e6),
            ("silence_s", silence_s, 0.0, timeout_s),
            ("deadline", 1.0 if deadline is None else deadline, 0.0, timeout_s),
        ):
            if not low < value <= high:
                raise ConfigurationError(f"{name} must be above {low:g} and at most {high:g} s, found {value!r}")
        for name, number, least, most in (
            ("recode", 5 if recode is None else recode, 2, 7),
            ("window", window, 8, 4096),
            ("mtu", mtu, 576, 3498),
        ):
            if not least <= number <= most:
                raise ConfigurationError(f"{name} must be {least} to {most}, found {number!r}")
        if at_least is not None and deadline is None:
            raise ConfigurationError("at_least says how many ranks a sum must hold at the deadline: give a deadline")
        self.ranks = collectives_over(over, timeout_s)
        self._shares = Sharded(self.ranks)
        self._timeout_s, self._silence_s = timeout_s, silence_s
        self._deadline, self._at_least, self._recode = deadline, at_least, recode
        self.waits = deadline is None
        self._window, self._mtu = window, mtu
        self._steps, self._meter = steps, PriorityMeter(steps)
        self._desk: PeerDesk | None = None
        self._token = 0
        self._shape = ANY_SHAPE
        self._streams: dict[tuple[Any, ...], _WireJob] = {}
        self._broken: str | None = None
        self._down = False
        self._down_rounds = 0
        self._epoch = 0
        self.exchange_s, self.exchange_bytes = 0.0, 0
        self._tally = dict.fromkeys(("through_switch", "falls", "returns", "from_peers", "left_out"), 0)

    def __repr__(self) -> str:
        return (
            f"SwitchReducer(deadline={self._deadline}, at_least={self._at_least}, recode={self._recode}, "
            f"servers={len(self._servers)}, steps={self._steps}, mtu={self._mtu})"
        )

    def total(self, wire: Wire, message: Tensor, lanes: int, this_round: Round) -> Total:
        """Adds all ranks' messages; gives bytes, or lanes where sums are wide or were rounded."""
        if self._broken is not None:
            raise ReducerError(f"the ranks cannot exchange gradients any more: {self._broken}")
        try:
            if wire.down_width >= _FLOAT_BITS or lanes == 0:
                return self._shares.total(wire, message, lanes, this_round)
            if self._desk is None:
                self._meet(message.device)
            stream = self._stream(wire, message.device)
            if self._down:
                self._try_again(message.device)
            if self._down or not self._through_switch(stream, wire, message, lanes, this_round):
                self.fell_back += 1
                return self._shares.total(wire, message, lanes, this_round)
            self._tally["through_switch"] += 1
            return self._total_of(stream, wire, lanes, message.device)
        except ReducerError as error:
            self._broken = self._broken or str(error)
            self._leave()
            self.ranks.close()
            raise

    def stats(self) -> SwitchStats:
        """Counts what became of the rounds so far."""
        found = [stream.peer.host.counters() for stream in self._streams.values()]
        sums = [sum(getattr(each, name) for each in found) for name in HostCounters.__slots__[:-2]]
        latest = [max((getattr(each, name) for each in found), default=0) for name in HostCounters.__slots__[-2:]]
        return SwitchStats(
            **self._tally, over_shares=self.fell_back, down=self._down, transport=HostCounters(*sums, *latest)
        )

    def close(self) -> None:
        """Lets go of the connections."""
        self._broken = self._broken or "the reducer was closed"
        self._leave()
        self.ranks.close()

    def _leave(self) -> None:
        if self._desk is not None:
            self._desk.close()
            self._desk = None
        self._close_streams()

    def _close_streams(self) -> None:
        for stream in self._streams.values():
            if self._desk is not None:
                self._desk.remove(stream.peer)
            stream.peer.host.close()
        self._streams.clear()

    def _meet(self, device: torch.device) -> None:
        """Has the ranks agree on a token, and tell each other where they can be asked."""
        ranks = self.ranks
        bind = _own_address(self._servers[0])
        desk = PeerDesk(bind, ranks.rank, ranks.world)
        secret = torch.tensor([1 + secrets.randbelow(1 << 62)], dtype=torch.int64, device=device)
        settings = crc32(repr(self).encode())
        row = torch.tensor([int.from_bytes(socket.inet_aton(bind), "big"), desk.address[1], settings], device=device)
        try:
            ranks.broadcast(secret)
            rows = [[int(value) for value in each] for each in ranks.gather(row)]
        except ReducerError:
            desk.close()
            raise
        if any(each[2] != settings for each in rows):
            desk.close()
            raise ConfigurationError("the ranks differ in their SwitchReducer's settings: give all the same")
        self._token = int(secret)
        desk.open(self._token, [(socket.inet_ntoa(each[0].to_bytes(4, "big")), each[1]) for each in rows])
        self._desk = desk
        self._shape = self._ask_shape(_HELLO_S, device) or ANY_SHAPE

    def _ask_shape(self, wait_s: float, device: torch.device) -> Shape | None:
        """Finds out what fragments the switch adds, the same on all ranks; None where it is silent."""
        said = torch.full([2], _NO_SHAPE, dtype=torch.int64, device=device)
        found = shape_of(self._servers[0], wait_s) if self.ranks.rank == 0 else None
        if found is not None:
            said[0], said[1] = found.words, found.bytes_only
        self.ranks.broadcast(said)
        words, bytes_only = (int(value) for value in said)
        return None if words == _NO_SHAPE else Shape(words, bool(bytes_only))

    def _stream(self, wire: Wire, device: torch.device) -> "_WireJob":
        """Gives the job that adds messages of this wire; a new one is opened by all ranks."""
        key = wire.table, wire.up_width, wire.down_width, wire.granule if self._deadline else 1
        if key not in self._streams:
            self._streams[key] = self._opened(wire, len(self._streams), device)
        return self._streams[key]

    def _opened(self, wire: Wire, number: int, device: torch.device) -> "_WireJob":
        ranks, table, map_bytes, levels = self.ranks, wire.table, None, None
        bits = wire.down_width if wire.down_width <= 16 else 0
        if self._recode is not None and table is not None and self._recode < wire.down_width <= 8:
            levels, map_bytes = fewer_bits(table, ranks.world, self._recode)
            bits = self._recode
        granule = wire.granule if self._deadline is not None else 1
        kind, lanes, filled = fit_terms(
            table, wire.up_width, wire.down_width, ranks.world, granule, self._mtu, bits, self._shape
        )
        at_least = 0
        if self._deadline is not None:
            at_least = max(1, ranks.world - 1) if self._at_least is None else self._at_least
            if not 1 <= at_least <= ranks.world:
                raise ConfigurationError(f"at_least must be 1 to {ranks.world}, the number of ranks, found {at_least}")
        terms = Terms(
            job=number,
            token=self._token,
            worker=ranks.rank,
            world=ranks.world,
            lane_type=kind,
            lanes=lanes,
            sum_bits=bits,
            map=map_bytes,
            deadline_s=self._deadline or 0.0,
            at_least=at_least,
            window=self._window,
        )
        host = SwitchHost(self._servers, terms, silence_s=self._silence_s)
        host.epoch = self._epoch
        peer = PeerStream(host)
        said = _OK if self._down else self._greet(host, _HELLO_S)
        if not self._down and self._agree(said, device) == _SILENT:
            self._fall("it did not answer")
        assert self._desk is not None
        self._desk.add(peer)
        return _WireJob(peer, levels, filled)

    def _greet(self, host: SwitchHost, wait_s: float) -> int:
        try:
            return _OK if host.hello(wait_s) else _SILENT
        except ConfigurationError as error:
            self._refusal = str(error)
            return _REFUSED

    _refusal = ""

    def _agree(self, said: int, device: torch.device) -> int:
        """Gives the worst of what the ranks say.

        Raises:
            ConfigurationError: on every rank, where one was refused.
        """
        worst = int(self.ranks.largest(torch.tensor([said], dtype=torch.int32, device=device)))
        if worst == _REFUSED:
            raise ConfigurationError(self._refusal or "the switch refused another rank; see its output")
        return worst

    def _through_switch(self, stream: "_WireJob", wire: Wire, message: Tensor, lanes: int, this_round: Round) -> bool:
        """Exchanges a message for the sum; False where all ranks have agreed that the switch is gone."""
        peer, host = stream.peer, stream.peer.host
        assert self._desk is not None
        rows = stream.rows_of(wire, message, lanes)
        first, begin = peer.next, time.perf_counter()
        priority = self._meter.begin(this_round.step, begin)
        with peer.lock:
            totals, bitmaps = host.begin(rows, first, priority)
        before = host.counters().sent_bytes
        until, left, moved = begin + self._timeout_s, -1, begin
        while (outcome := host.step(_SLICE_S)) != StepEnd.FINISHED:
            now = time.perf_counter()
            if outcome == StepEnd.UNKNOWN and self._greet(host, _RETRY_S) == _OK:
                host.anew()
            if outcome == StepEnd.SILENT or self._desk.frozen_by_another(host.terms.job, first):
                if not self._ask_the_others(peer, first, until):
                    self._fall("it fell silent")
                    return False
                break
            missing = host.missing()
            if len(missing) != left or (missing and missing[0] != stream.stuck_at):
                left, stream.stuck_at, moved = len(missing), missing[0] if missing else -1, now
            elif now - moved > _STUCK_S:
                self._desk.ask(peer, first, missing)
                self._take_answers(peer, first, _ASK_AGAIN_S, {})
            if now > until:
                raise ReducerError(
                    f"rank {self.ranks.rank} of {self.ranks.world} waited longer than timeout_s={self._timeout_s:g} "
                    "for the other ranks' parts of a sum in the switch; see their output for the first failure"
                )
        peer.finish(first, totals, bitmaps)
        took_s = time.perf_counter() - begin
        self._meter.end(took_s)
        self.ranks.exchanged_s += took_s
        self.exchange_s += took_s
        self.exchange_bytes += max(rows.nbytes, totals.nbytes)
        self.ranks.sent_bytes += host.counters().sent_bytes - before
        return True

    def _ask_the_others(self, peer: PeerStream, first: int, until: float) -> bool:
        """Freezes the exchange: True where a rank that is done has given what was missing, False where nobody is done.

        Raises:
            ReducerError: a rank does not answer.
        """
        assert self._desk is not None
        peer.frozen = first
        states: dict[int, ExchangeState] = {}
        others = self.ranks.world - 1
        while True:
            missing = peer.host.missing()
            if not missing:
                peer.frozen = None
                return True
            if list(states.values()).count(ExchangeState.FROZEN) == others:
                return False
            if time.perf_counter() > until:
                silent = sorted(set(range(self.ranks.world)) - states.keys() - {self.ranks.rank})
                raise ReducerError(
                    f"the switch is gone, and rank {self.ranks.rank} of {self.ranks.world} could not agree with the "
                    f"others on what to do within timeout_s={self._timeout_s:g}; silent: {silent}"
                )
            self._desk.ask(peer, first, missing)
            self._take_answers(peer, first, _ASK_AGAIN_S, states)

    def _take_answers(self, peer: PeerStream, first: int, wait_s: float, states: dict[int, ExchangeState]) -> None:
        """Puts sums in place that other ranks gave, and notes how far they are."""
        assert self._desk is not None
        for answer in self._desk.answers(wait_s):
            if answer.job != peer.host.terms.job or answer.first != first:
                continue
            if answer.total is None:
                states[answer.worker] = answer.state
            elif peer.frozen is None or answer.state == ExchangeState.DONE:
                self._tally["from_peers"] += peer.host.put(answer.fragment, answer.bitmap, answer.total)

    def _fall(self, why: str) -> None:
        self._down, self._down_rounds = True, 0
        self._tally["falls"] += 1
        if self.ranks.rank == 0:
            _log.warning(
                "the switch at %s is gone (%s): the ranks add gradients over shares until it is back",
                ", ".join(f"{host}:{port}" for host, port in self._servers),
                why,
            )

    def _try_again(self, device: torch.device) -> None:
        """Goes back to the switch if all ranks reach it; every few rounds, on all ranks in the same."""
        self._down_rounds += 1
        if self._down_rounds % _ROUNDS_BETWEEN_RETRIES:
            return
        shape = self._ask_shape(_RETRY_S, device)
        if shape is None:
            return
        self._epoch += 1
        if shape != self._shape:  # another kind of switch: its fragments are others
            self._shape = shape
            self._close_streams()
        said = _OK
        for stream in self._streams.values():
            stream.peer.host.anew(self._epoch)
            said = max(said, self._greet(stream.peer.host, _HELLO_S) if said == _OK else said)
        if self._agree(said, device) != _OK:
            return
        for stream in self._streams.values():
            stream.peer.frozen = None
        self._down = False
        self._tally["returns"] += 1
        if self.ranks.rank == 0:
            _log.warning("the switch is back: it adds gradients again")

    def _total_of(self, stream: "_WireJob", wire: Wire, lanes: int, device: torch.device) -> Total:
        """Gives the sum of the last exchange in the form that codes take."""
        host = stream.peer.host
        _, totals, bitmaps = stream.peer.past[-1]
        count, lost = self._counts(stream, wire, lanes, bitmaps, device)
        lane_type = host.terms.lane_type
        totals = stream.filled_part(totals)
        if stream.levels is not None and host.sum_bits:
            sums = torch.from_numpy(unpack_table(totals, stream.levels, host.sum_bits, lanes))
            return Total(sums.to(device), count, lost=lost)
        if host.sum_bits:
            packed = torch.from_numpy(totals[: wire.total_bytes(lanes)])
            return Total(packed.to(device), count, packed=True, lost=lost)
        if lane_type.sum_bits == 8:
            return Total(torch.from_numpy(totals[:lanes]).to(device), count, lost=lost)
        typed: NDArray[Any] = totals.view(np.uint16 if lane_type == LaneType.SHORTS else np.int32)[:lanes]
        return Total(torch.from_numpy(typed.astype(np.int32)).to(device), count, lost=lost)

    def _counts(
        self, stream: "_WireJob", wire: Wire, lanes: int, bitmaps: NDArray[np.uint32], device: torch.device
    ) -> tuple[Count, Tensor | None]:
        world, rank = self.ranks.world, self.ranks.rank
        if self._deadline is None or bool((bitmaps == bitmaps.dtype.type((1 << world) - 1)).all()):
            return world, None
        granules, each = -(-lanes // wire.granule), stream.filled // wire.granule
        within = torch.from_numpy(((bitmaps[:, None] >> np.arange(world, dtype=np.uint32)) & 1).astype(np.int64))
        counts = within.sum(1).repeat_interleave(each)[:granules]
        lost = (within[:, rank] == 0).repeat_interleave(each)[:granules]
        missed = int((within[:, rank] == 0).sum())
        self._tally["left_out"] += missed
        return counts.to(device), lost.to(device) if missed else None


@dataclass
class _WireJob:
    """Holds one wire's job: its transport, what rounded sums stand for, and how many lanes of a fragment are filled."""

    peer: PeerStream
    levels: NDArray[np.uint8] | None
    filled: int
    stuck_at: int = -1

    def rows_of(self, wire: Wire, message: Tensor, lanes: int) -> NDArray[np.uint8]:
        """Gives a message as whole fragments."""
        terms = self.peer.host.terms
        if terms.lane_type.raw_bits == 4:
            row = message.cpu().contiguous().numpy()
        else:
            kind = {LaneType.BYTES: np.uint8, LaneType.SHORTS: np.uint16, LaneType.INTS: np.uint32}[terms.lane_type]
            row = wire.unpack(message, lanes).cpu().numpy().astype(kind).view(np.uint8)
        fragments, each = -(-lanes // self.filled), self.filled * terms.lane_type.raw_bits // 8
        rows = np.zeros(fragments * each, np.uint8)
        rows[: row.size] = row
        if each == terms.up_bytes:
            return rows
        wider = np.zeros((fragments, terms.up_bytes), np.uint8)
        wider[:, :each] = rows.reshape(fragments, each)
        return wider.reshape(-1)

    def filled_part(self, totals: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Leaves out what only fills up fragments."""
        host = self.peer.host
        if self.filled == host.terms.lanes:
            return totals
        each = self.filled * (host.sum_bits or host.terms.lane_type.sum_bits) // 8
        return np.ascontiguousarray(totals.reshape(-1, host.down_bytes)[:, :each]).reshape(-1)


def _own_address(server: tuple[str, int]) -> str:
    """Finds the address of this machine from which a server is reached."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(server)
        except OSError as error:
            raise ConfigurationError(f"switch: there is no way to {server[0]}: {error.strerror}") from error
        address: str = probe.getsockname()[0]
        return address
