"""Runs the C rule from Python: a switch in memory, for tests and long runs."""

import ctypes
from collections.abc import Iterable
from ctypes import POINTER, Structure, byref, c_uint8, c_uint16, c_uint32, c_uint64
from typing import Any

from evenkeel.switch.aggregator import Event, Job, Rule, Slot, To, Tomb
from evenkeel.switch.build import load
from evenkeel.switch.packet import HEADER_BYTES, MAX_JOBS, Reason

__all__ = [
    "COUNTERS",
    "NativeJob",
    "NativeRule",
    "NativeSlot",
    "Table",
    "native_job",
    "native_rule",
    "slot_of",
    "tombs_of",
]

COUNTERS = 29


class NativeJob(Structure):
    """Mirrors `struct ek_job`."""

    _fields_ = (
        ("token", c_uint64),
        ("epoch", c_uint32),
        ("largest", c_uint32),
        ("words", c_uint16),
        ("workers", c_uint8),
        ("lanes", c_uint8),
        ("via_server", c_uint8),
        ("zero", c_uint8),
        ("unused", c_uint8 * 2),
    )


class NativeSlot(Structure):
    """Mirrors `struct ek_slot`."""

    _fields_ = (
        ("token", c_uint64),
        ("touched", c_uint64),
        ("job", c_uint32),
        ("fragment", c_uint32),
        ("epoch", c_uint32),
        ("bitmap", c_uint32),
        ("priority", c_uint8),
        ("done", c_uint8),
        ("unused", c_uint8 * 6),
    )


class NativeRule(Structure):
    """Mirrors `struct ek_rule`."""

    _fields_ = (
        ("policy", c_uint32),
        ("sets", c_uint32),
        ("ways", c_uint32),
        ("words", c_uint32),
        ("regions", c_uint32),
        ("tombs", c_uint32),
        ("stale_ns", c_uint64),
        ("tomb_ns", c_uint64),
    )


class _NativeTable(Structure):
    _fields_ = (
        ("rule", NativeRule),
        ("jobs", POINTER(NativeJob)),
        ("slots", POINTER(NativeSlot)),
        ("sums", POINTER(c_uint64)),
        ("tombs", POINTER(c_uint64)),
        ("counters", POINTER(c_uint64)),
    )


class Table:
    """Holds a switch's memory and steps it by the C rule.

    Args:
        rule: its settings.

    Raises:
        ConfigurationError: the C rule could not be compiled.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        slots = rule.sets * rule.ways
        self._library = load("rule")
        self._library.ek_switch_step.restype = c_uint32
        self._jobs = (NativeJob * MAX_JOBS)()
        self._slots = (NativeSlot * slots)()
        self._sums = (c_uint64 * (slots * rule.words))()
        self._tombs = (c_uint64 * max(rule.tombs, 1))()
        self._counters = (c_uint64 * COUNTERS)()
        self._out = ctypes.create_string_buffer(HEADER_BYTES + 8 * rule.words)
        self._table = _NativeTable(native_rule(rule), self._jobs, self._slots, self._sums, self._tombs, self._counters)

    @property
    def address(self) -> Any:
        """Gives a pointer to the C structure, for C code that steps many times; valid as long as this object lives."""
        return byref(self._table)

    def register(self, number: int, job: Job) -> None:
        """Lets a job's packets in, or changes what is known of it."""
        self._jobs[number] = native_job(job)

    def step(self, data: bytes, sender: int, now_ns: int) -> tuple[To, bytes]:
        """Gives who gets what: the packet's own bytes, or what the switch made; nothing for `To.NOBODY`."""
        done = self._library.ek_switch_step(
            byref(self._table), data, c_uint32(len(data)), c_uint32(sender), c_uint64(now_ns), self._out
        )
        to = To(done & 255)
        if to == To.NOBODY:
            return to, b""
        if not done >> 8 & 255:
            return to, data
        words = int.from_bytes(self._out.raw[6:8], "little")
        return to, self._out.raw[: HEADER_BYTES + 8 * words]

    @property
    def counts(self) -> dict[Reason | Event, int]:
        """Gives what was counted, without zeros."""
        return {what: self._counters[what] for what in (*Reason, *Event) if self._counters[what]}

    @property
    def slots(self) -> dict[tuple[int, int], Slot]:
        """Gives the slots that are not empty, by (set, way)."""
        found = {}
        for place, slot in enumerate(self._slots):
            if slot.bitmap:
                words = self._jobs[slot.job].words
                sums = ctypes.string_at(ctypes.addressof(self._sums) + 8 * place * self.rule.words, 8 * words)
                found[divmod(place, self.rule.ways)] = slot_of(slot, sums)
        return found

    @property
    def tombs(self) -> dict[int, Tomb]:
        """Gives when each tombstone was set, by place."""
        return tombs_of(self._tombs)

    @property
    def epochs(self) -> dict[int, int]:
        """Gives the epoch of each job."""
        return {number: job.epoch for number, job in enumerate(self._jobs) if job.token}


def native_job(job: Job) -> NativeJob:
    """Writes a job as C has it."""
    return NativeJob(job.token, job.epoch, job.largest, job.words, job.workers, job.lanes, job.via_server)


def native_rule(rule: Rule) -> NativeRule:
    """Writes a rule as C has it."""
    return NativeRule(
        rule.policy,
        rule.sets,
        rule.ways,
        rule.words,
        rule.regions,
        rule.tombs,
        rule.stale_ns,
        rule.tomb_ns,
    )


def tombs_of(written: Iterable[int]) -> dict[int, Tomb]:
    """Reads the tombstones that C wrote, by place."""
    return {place: Tomb((tomb >> 16) - 1, tomb & 0xFFFF) for place, tomb in enumerate(written) if tomb}


def slot_of(slot: NativeSlot, sums: bytes) -> Slot:
    """Reads a slot that C wrote."""
    return Slot(
        slot.job,
        slot.token,
        slot.epoch,
        slot.fragment,
        slot.bitmap,
        slot.priority,
        slot.touched,
        sums,
        bool(slot.done),
    )
