"""States the rule by which a switch adds packets, as a pure function; `native/rule.h` is its twin in C.

A *slot* is a piece of memory that adds one fragment. The rule finds the slot that holds a packet's fragment, or decides
which one it may take. What gets no slot, or loses it, goes on to the job's server, which completes what the switch
could not. Policies differ in one thing only, who may take which slot:

- `unlimited`: each job has a region, and fragment f takes slot f modulo its size; a later fragment evicts an earlier
  one. For a switch whose memory holds every fragment that is on its way: software.
- `atp`: a hashed slot; first come, first served; held until the server's result passes. (ATP, NSDI'21.)
- `atp-free`: the same, but a sum that is complete goes to the workers at once, and its slot is free.
- `switchml`: a region as in `unlimited`; a complete sum stays, to answer whoever asks again, until a fragment comes
  that says that all have it; no server. (SwitchML, NSDI'21.)
- `esa`: as `atp-free`, but a more urgent fragment takes the slot, and the partial sum in it goes to its server; each
  failed try halves the holder's priority. (ESA, ICNP'23, as far as its abstract and common knowledge say.)
- `assoc`: ours. Slots come in sets of `ways`, and a newcomer always gets one: of a full set, that of least worth, by
  priority, by the packets that its loss costs the server, and by the time that it has waited without progress. Failed
  tries do not matter. Tombstones send what belongs to an evicted or resent fragment after it, so that none of it takes
  a slot in which it could never be completed.

Laws, tested over every policy: a sum holds exactly the workers in its bitmap, each once; nothing is added twice; at
most one packet leaves for each that comes; a packet that is dropped for a reason of `packet.Reason` changes nothing
but a count. Time is an argument.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evenkeel.errors import ConfigurationError
from evenkeel.switch.packet import MAX_JOBS, MAX_WORDS, Kind, LaneType, Packet, Reason, check_bound

__all__ = [
    "SERVER",
    "Event",
    "Job",
    "Outgoing",
    "Rule",
    "Slot",
    "SlotPolicy",
    "SwitchState",
    "To",
    "Tomb",
    "step",
    "sums_of",
]

SERVER = 32  # as the sender of a packet; 0..31 are workers


class SlotPolicy(IntEnum):
    """Says who may take which slot."""

    UNLIMITED = 0
    ATP = 1
    ATP_FREE = 2
    SWITCHML = 3
    ESA = 4
    ASSOC = 5

    @classmethod
    def of(cls, name: str) -> "SlotPolicy":
        """Finds a policy by its name on command lines: `atp-free`.

        Raises:
            ConfigurationError: there is none.
        """
        for policy in cls:
            if policy.text == name:
                return policy
        raise ConfigurationError(f"policy: must be one of {', '.join(policy.text for policy in cls)}, found {name!r}")

    @property
    def text(self) -> str:
        """Gives the name on command lines."""
        return self.name.lower().replace("_", "-")


class To(IntEnum):
    """Says who gets a packet."""

    NOBODY = 0
    SERVER = 1
    WORKERS = 2
    ALL = 3  # workers and server
    SENDER = 4


class Event(IntEnum):
    """Says what came of a packet that was not dropped; numbered behind `packet.Reason`."""

    INSTALLED = 15  # took an empty slot
    ADDED = 16
    COMPLETED = 17
    EVICTED = 18  # took the slot of another fragment, whose partial sum left for the server
    BYPASSED = 19  # no slot: went to the server as it came
    FLUSHED = 20  # a resend or a reminder took along what the slot held
    BOUNCED = 21  # a reminder of a fragment that is not here
    RESENT = 22  # a resend of a fragment that is not here
    FORWARDED = 23  # a result or a NACK
    ANSWERED = 24  # SwitchML: the worker got the result again
    RELEASED = 25  # besides: a slot freed by a result
    RECLAIMED = 26  # besides: a slot taken from an epoch or a job that is over
    ENTOMBED = 27  # besides: bypassed since others of the fragment were
    LOST = 28  # besides, in the kernel only: a frame could not be lengthened for what should leave


@dataclass(frozen=True, slots=True)
class Rule:
    """Holds a switch's settings.

    Attributes:
        policy: who may take which slot.
        sets: of slots, a power of two.
        ways: slots of a set, 1 to 16; more than 1 for `assoc` only. More: fewer collisions, longer look-ups.
        words: of memory in each slot; no job's fragments are longer.
        regions: a power of two: `unlimited` and `switchml` cut the slots evenly among as many jobs.
        stale_ns: after this time without progress whoever comes may take a slot. Less: less memory lost to packets that
            came twice, more partial sums on their way to servers.
        tomb_ns: `assoc`: how long a tombstone counts if no result clears it.
        tombs: `assoc`: tombstones, a power of two. Fewer: more fragments that bypass the switch for nothing.

    Raises:
        ConfigurationError: a setting out of range.
    """

    policy: SlotPolicy
    sets: int = 1024
    ways: int = 1
    words: int = MAX_WORDS
    regions: int = 1
    stale_ns: int = 1_000_000_000
    tomb_ns: int = 1_000_000_000
    tombs: int = 0

    def __post_init__(self) -> None:
        for name in ("sets", "regions", "tombs"):
            value = getattr(self, name)
            if value & (value - 1) or not (0 if name == "tombs" else 1) <= value <= 1 << 24:
                raise ConfigurationError(f"{name}: must be a power of two up to 2**24, found {value}")
        if self.regions > self.sets or self.regions > MAX_JOBS:
            raise ConfigurationError(f"regions: must be at most {min(self.sets, MAX_JOBS)}, found {self.regions}")
        if not 1 <= self.ways <= 16 or (self.ways > 1 and self.policy != SlotPolicy.ASSOC):
            raise ConfigurationError(f"ways: must be 1 to 16, and 1 for all policies but assoc, found {self.ways}")
        if (self.tombs > 0) != (self.policy == SlotPolicy.ASSOC):
            raise ConfigurationError("tombs: policy assoc needs tombstones, and no other has them")
        if not 1 <= self.words <= MAX_WORDS:
            raise ConfigurationError(f"words: must be 1 to {MAX_WORDS}, found {self.words}")
        if min(self.stale_ns, self.tomb_ns) < 1:
            raise ConfigurationError("stale_ns and tomb_ns: must be at least 1")

    @classmethod
    def of(cls, policy: SlotPolicy, slots: int, **settings: int) -> "Rule":
        """Gives a policy its usual settings for `slots` slots: sets of 8 and 16 tombstones a slot for `assoc`.

        Raises:
            ConfigurationError: a setting out of range.
        """
        if slots < 1 or slots & (slots - 1):
            raise ConfigurationError(f"slots: must be a power of two, found {slots}")
        if policy == SlotPolicy.ASSOC:
            ways = min(8, slots)
            return cls(policy, **{"sets": slots // ways, "ways": ways, "tombs": 16 * slots, **settings})
        return cls(policy, **{"sets": slots, **settings})


@dataclass(frozen=True, slots=True)
class Job:
    """Holds what a switch knows of a job.

    Attributes:
        token: the job's secret, not 0; no two jobs have one.
        workers: how many add.
        lanes: how lanes are written.
        words: of a fragment's sums.
        largest: number that a raw lane stands for.
        epoch: of the latest packet; sums of earlier ones are dropped.
        via_server: finished sums go to the server only, which alone says what the result is. For jobs with a deadline:
            who is in a sum is then decided in one place.

    Raises:
        ConfigurationError: sums could carry from a lane into the next, or more workers than the bitmap holds.
    """

    token: int
    workers: int
    lanes: LaneType
    words: int
    largest: int
    epoch: int = 0
    via_server: bool = False

    def __post_init__(self) -> None:
        check_bound(self.lanes, self.workers, self.largest)
        if not 1 <= self.token < 1 << 64:
            raise ConfigurationError("token: must be a number of 64 bits that is not 0")
        if not 1 <= self.words <= MAX_WORDS or (self.lanes.raw_bits == 4 and self.words % 2):
            raise ConfigurationError(
                f"words: must be 1 to {MAX_WORDS}, and even for lanes of 4 bits, found {self.words}"
            )

    @property
    def everyone(self) -> int:
        """Gives the bitmap of all workers."""
        return (1 << self.workers) - 1

    @property
    def raw_words(self) -> int:
        """Counts the words of a worker's fragment."""
        return self.words // 2 if self.lanes.raw_bits == 4 else self.words


@dataclass(frozen=True, slots=True)
class Slot:
    """Holds the sum of some workers' lanes of one fragment; `done`: complete, and kept for the policy's reason."""

    job: int
    token: int
    epoch: int
    fragment: int
    bitmap: int
    priority: int
    touched_ns: int
    sums: bytes
    done: bool = False


@dataclass(frozen=True, slots=True)
class SwitchState:
    """Holds all that a switch remembers.

    Attributes:
        rule: its settings.
        jobs: by number.
        slots: those that are not empty, by (set, way).
        tombs: when each tombstone was set, in units of 1,024 ns, and for which fragments, by place.
        counts: packets by `packet.Reason` and `Event`.
    """

    rule: Rule
    jobs: Mapping[int, Job]
    slots: Mapping[tuple[int, int], Slot] = field(default_factory=lambda: MappingProxyType({}))
    tombs: Mapping[int, "Tomb"] = field(default_factory=lambda: MappingProxyType({}))
    counts: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))


class Tomb(NamedTuple):
    """Says since when a fragment goes straight to the server; one that shares place and tag does so for nothing."""

    since: int
    tag: int


class Outgoing(NamedTuple):
    """Holds a packet that leaves, and who gets it."""

    to: To
    packet: Packet


def step(state: SwitchState, packet: Packet, sender: int, now_ns: int) -> tuple[SwitchState, tuple[Outgoing, ...]]:
    """Gives the state after a packet, and what leaves: nothing or one packet.

    Args:
        state: before.
        packet: as `packet.parse` gives it.
        sender: number of the worker that it came from, `SERVER`, or any other number for a stranger.
        now_ns: the time.
    """
    after = _Change(state, now_ns)
    if packet.job >= MAX_JOBS:
        return after.dropped(Reason.JOB)
    job = state.jobs.get(packet.job)
    reason = _refusal(job, packet, sender)
    if job is None or reason is not None:
        return after.dropped(Reason.JOB if reason is None else reason)
    after.jobs = {**state.jobs, packet.job: replace(job, epoch=packet.epoch)}
    after.place(packet)
    kind = packet.kind
    if state.rule.policy == SlotPolicy.SWITCHML and kind == Kind.RESEND:
        kind = Kind.GRADIENT
    if kind == Kind.RESULT:
        return after.result(packet, job, sender)
    if kind == Kind.NACK:
        return after.counted(Event.FORWARDED, To.WORKERS, packet)
    if kind == Kind.GRADIENT:
        return after.gradient(packet, job)
    return after.flush(packet, job)


def sums_of(packet: Packet) -> bytes:
    """Gives what a packet adds: its lanes, spread to the width of sums where that is another."""
    if packet.kind not in (Kind.GRADIENT, Kind.RESEND) or packet.lanes.raw_bits != 4:
        return packet.payload
    pairs = np.frombuffer(packet.payload, np.uint8)
    places = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1)
    if packet.lanes == LaneType.THC:
        places = places + (places > 0) + (places == 15)
    return places.astype(np.uint8).tobytes()


def _refusal(job: Job | None, packet: Packet, sender: int) -> Reason | None:
    """Says why a packet may not be looked at, if so."""
    raw = packet.kind in (Kind.GRADIENT, Kind.RESEND)
    words = len(packet.payload) // 8
    if packet.kind in (Kind.PARTIAL, Kind.CONTROL):
        return Reason.KIND
    if job is None:
        return Reason.JOB
    if packet.token != job.token:
        return Reason.TOKEN
    if packet.lanes != job.lanes:
        return Reason.LANE_TYPE
    if words != job.raw_words if raw else words > job.words:
        return Reason.LENGTH
    if packet.bitmap & ~job.everyone:
        return Reason.BITMAP
    from_worker, from_server = 0 <= sender < job.workers, sender == SERVER
    if raw and not (from_worker and packet.bitmap == 1 << sender):
        return Reason.SENDER
    if not raw and not (from_server or (packet.kind == Kind.RESULT and from_worker)):
        return Reason.SENDER
    if packet.epoch < job.epoch:
        return Reason.EPOCH
    if raw and job.lanes.raw_bits != 4 and int(_lanes(packet.payload, job.lanes).max()) > job.largest:
        return Reason.BOUND
    return None


class _Change:
    """Makes one step: collects what changes."""

    def __init__(self, before: SwitchState, now_ns: int) -> None:
        self.rule, self.now = before.rule, now_ns
        self.jobs, self.slots, self.tombs = before.jobs, before.slots, before.tombs
        self.counts = dict(before.counts)
        self.set = 0
        self.found: tuple[int, int] | None = None

    def place(self, packet: Packet) -> None:
        """Finds a packet's set, and the slot that holds its fragment, if one does."""
        if self.rule.policy in (SlotPolicy.UNLIMITED, SlotPolicy.SWITCHML):
            region = self.rule.sets // self.rule.regions
            self.set = packet.job % self.rule.regions * region + packet.fragment % region
        else:
            self.set = _hash(packet.job, packet.fragment) % self.rule.sets
        mine = (packet.job, packet.token, packet.epoch, packet.fragment)
        for place in self._places():
            slot = self.slots.get(place)
            if slot is not None and (slot.job, slot.token, slot.epoch, slot.fragment) == mine:
                self.found = place

    def dropped(self, reason: Reason) -> tuple[SwitchState, tuple[Outgoing, ...]]:
        """Counts a packet, and forgets it."""
        self._count(reason)
        return self._state(), ()

    def counted(self, event: Event, to: To, packet: Packet) -> tuple[SwitchState, tuple[Outgoing, ...]]:
        """Counts a packet of which a packet comes."""
        self._count(event)
        return self._state(), (Outgoing(to, packet),)

    def result(self, packet: Packet, job: Job, sender: int) -> tuple[SwitchState, tuple[Outgoing, ...]]:
        """Lets a result pass, and frees what it answers."""
        if sender != SERVER:  # a worker answers the server's NACK
            return self.counted(Event.FORWARDED, To.SERVER, packet)
        if self.found is not None:
            self._free(self.found)
            self._count(Event.RELEASED)
        if packet.bitmap == job.everyone:
            self._dig_up(packet.job, packet.fragment)
        else:  # who was left out comes too late: straight to the server
            self._bury(packet.job, packet.fragment)
        return self.counted(Event.FORWARDED, To.WORKERS, packet)

    def flush(self, packet: Packet, job: Job) -> tuple[SwitchState, tuple[Outgoing, ...]]:
        """Gives the server what a slot holds, and a resend with it; a resend never stays in a slot.

        Both leave as one packet, since neither a switch pipeline nor XDP makes two packets of one. A sum that overlaps
        with what the server has is refused there, and then each worker is asked by itself: their resends find no slot.
        """
        self._bury(packet.job, packet.fragment)
        if self.found is None:
            return self.counted(Event.BOUNCED if packet.kind == Kind.REMINDER else Event.RESENT, To.SERVER, packet)
        slot = self.slots[self.found]
        if packet.kind == Kind.RESEND and not slot.bitmap & packet.bitmap:
            slot = replace(slot, bitmap=slot.bitmap | packet.bitmap, sums=_added(slot.sums, packet, job))
        self._free(self.found)
        return self.counted(Event.FLUSHED, To.SERVER, _as_packet(slot, Kind.PARTIAL, job))

    def gradient(self, packet: Packet, job: Job) -> tuple[SwitchState, tuple[Outgoing, ...]]:
        """Adds a worker's lanes, finds them a slot, or lets them go on to the server."""
        if packet.bitmap == job.everyone:  # of a job with one worker
            return self._completed(_filled(packet, self.now), job)
        if self.found is None:
            return self._newcomer(packet)
        slot = self.slots[self.found]
        if slot.bitmap & packet.bitmap:
            if self.rule.policy == SlotPolicy.SWITCHML and slot.done:
                return self.counted(Event.ANSWERED, To.SENDER, _as_packet(slot, Kind.RESULT, job))
            return self.dropped(Reason.DUPLICATE)
        slot = replace(
            slot,
            bitmap=slot.bitmap | packet.bitmap,
            priority=max(slot.priority, packet.priority),
            touched_ns=self.now,
            sums=_added(slot.sums, packet, job),
        )
        if slot.bitmap != job.everyone:
            self._put(self.found, slot)
            self._count(Event.ADDED)
            return self._state(), ()
        if self.rule.policy in (SlotPolicy.ATP, SlotPolicy.SWITCHML):
            self._put(self.found, replace(slot, done=True))
        else:
            self._free(self.found)
        return self._completed(slot, job)

    def _completed(self, slot: Slot, job: Job) -> tuple[SwitchState, tuple[Outgoing, ...]]:
        echoed = self.rule.policy == SlotPolicy.ATP or (job.via_server and self.rule.policy != SlotPolicy.SWITCHML)
        kind = Kind.PARTIAL if echoed else Kind.RESULT
        return self.counted(Event.COMPLETED, To.SERVER if echoed else To.ALL, _as_packet(slot, kind, job))

    def _newcomer(self, packet: Packet) -> tuple[SwitchState, tuple[Outgoing, ...]]:
        """Decides about the first packet of a fragment, or the first that is not on its way to the server already."""
        policy = self.rule.policy
        if policy == SlotPolicy.ASSOC and self._buried(packet):
            self._count(Event.ENTOMBED)
            return self.counted(Event.BYPASSED, To.SERVER, packet)
        worth, chosen = min((self._worth(place), place) for place in self._places())
        if worth < 0:
            if chosen in self.slots:
                self._count(Event.RECLAIMED)
            return self._install(chosen, packet)
        slot = self.slots[chosen]
        later = slot.job == packet.job and 0 < (packet.fragment - slot.fragment) % (1 << 32) < 1 << 31
        if policy == SlotPolicy.SWITCHML:
            # Who sends f has the result of f - region, so all have that of what is here: it may go.
            return self._install(chosen, packet) if later else self.dropped(Reason.STALE)
        if (
            self._waited(slot) >= self.rule.stale_ns
            or (policy == SlotPolicy.UNLIMITED and later)
            or (policy == SlotPolicy.ESA and packet.priority > worth)
            or policy == SlotPolicy.ASSOC
        ):
            self._bury(slot.job, slot.fragment)
            self._put(chosen, _filled(packet, self.now))
            return self.counted(Event.EVICTED, To.SERVER, _as_packet(slot, Kind.PARTIAL, self.jobs[slot.job]))
        if policy == SlotPolicy.ESA:
            self._put(chosen, replace(slot, priority=slot.priority >> 1))
        return self.counted(Event.BYPASSED, To.SERVER, packet)

    def _install(self, place: tuple[int, int], packet: Packet) -> tuple[SwitchState, tuple[Outgoing, ...]]:
        self._put(place, _filled(packet, self.now))
        self._count(Event.INSTALLED)
        return self._state(), ()

    def _worth(self, place: tuple[int, int]) -> int:
        """Says what is lost if a slot is taken, on the scale of priorities; -1 if it is empty or outdated."""
        slot = self.slots.get(place)
        job = None if slot is None else self.jobs.get(slot.job)
        if slot is None or job is None or (slot.token, slot.epoch) != (job.token, job.epoch):
            return -1
        if self.rule.policy != SlotPolicy.ASSOC:
            return slot.priority
        missing = job.workers - slot.bitmap.bit_count()
        return 1024 + slot.priority + _log(missing + 1) - _log(self._waited(slot) + 1)

    def _waited(self, slot: Slot) -> int:
        return max(self.now - slot.touched_ns, 0)

    def _places(self) -> list[tuple[int, int]]:
        return [(self.set, way) for way in range(self.rule.ways)]

    def _put(self, place: tuple[int, int], slot: Slot) -> None:
        self.slots = {**self.slots, place: slot}

    def _free(self, place: tuple[int, int]) -> None:
        self.slots = {other: slot for other, slot in self.slots.items() if other != place}

    def _bury(self, job: int, fragment: int) -> None:
        """Sets a fragment's tombstone."""
        if self.rule.tombs:
            self.tombs = {**self.tombs, self._tomb_place(job, fragment): Tomb(self.now >> 10, _tag(job, fragment))}

    def _dig_up(self, job: int, fragment: int) -> None:
        """Removes a fragment's tombstone, if it lies there."""
        if self.rule.tombs:
            mine = (self._tomb_place(job, fragment), _tag(job, fragment))
            self.tombs = {place: tomb for place, tomb in self.tombs.items() if (place, tomb.tag) != mine}

    def _buried(self, packet: Packet) -> bool:
        tomb = self.tombs.get(self._tomb_place(packet.job, packet.fragment))
        if tomb is None or tomb.tag != _tag(packet.job, packet.fragment):
            return False
        return 0 <= (self.now >> 10) - tomb.since < self.rule.tomb_ns >> 10

    def _tomb_place(self, job: int, fragment: int) -> int:
        return _mix(_hash(job, fragment) + 0x9E3779B9) % self.rule.tombs

    def _count(self, what: Reason | Event) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def _state(self) -> SwitchState:
        return SwitchState(self.rule, self.jobs, self.slots, self.tombs, self.counts)


def _filled(packet: Packet, now_ns: int) -> Slot:
    return Slot(
        packet.job,
        packet.token,
        packet.epoch,
        packet.fragment,
        packet.bitmap,
        packet.priority,
        now_ns,
        sums_of(packet),
    )


def _as_packet(slot: Slot, kind: Kind, job: Job) -> Packet:
    return Packet(
        kind,
        job.lanes,
        slot.job,
        slot.token,
        slot.fragment,
        slot.bitmap,
        slot.epoch,
        slot.priority,
        slot.sums,
    )


def _added(sums: bytes, packet: Packet, job: Job) -> bytes:
    return (_lanes(sums, job.lanes) + _lanes(sums_of(packet), job.lanes)).tobytes()


def _lanes(payload: bytes, lanes: LaneType) -> NDArray[np.unsignedinteger]:
    kinds = {8: np.uint8, 16: np.uint16, 32: np.uint32}
    return np.frombuffer(payload, kinds[lanes.sum_bits])


def _log(number: int) -> int:
    """Gives 16 * log2 of a number from 1 on, linear between powers of two, rounded down."""
    power = number.bit_length() - 1
    return 16 * power + ((number >> power - 4 if power >= 4 else number << 4 - power) & 15)


def _tag(job: int, fragment: int) -> int:
    return _mix(_hash(job, fragment) + 0x3C6EF372) >> 16


def _hash(job: int, fragment: int) -> int:
    return _mix((fragment * 0x9E3779B1 & 0xFFFFFFFF) ^ (job * 0x85EBCA6B & 0xFFFFFFFF))


def _mix(number: int) -> int:
    number &= 0xFFFFFFFF
    number = (number ^ number >> 16) * 0x7FEB352D & 0xFFFFFFFF
    number = (number ^ number >> 15) * 0x846CA68B & 0xFFFFFFFF
    return number ^ number >> 16
