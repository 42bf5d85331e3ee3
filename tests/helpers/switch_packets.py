"""Packets for switches, and the Python rule behind the interface of the C one."""

import hashlib
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import strategies as st

from evenkeel.errors import EvenkeelError, PacketError
from evenkeel.switch.aggregator import SERVER, Job, Rule, SlotPolicy, SwitchState, To, step, sums_of
from evenkeel.switch.kernel import load_program
from evenkeel.switch.packet import Kind, LaneType, Packet, Reason, parse, write

needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None and shutil.which("gcc") is None, reason="no C compiler: apt-get install gcc libc6-dev"
)

WORDS = 2
TOKENS = (11, 2**64 - 3, 7)
# Of different lane types and numbers of workers; of one width, as the XDP program has one.
JOBS = {
    0: Job(TOKENS[0], 3, LaneType.BYTES, WORDS, 60),
    1: Job(TOKENS[1], 2, LaneType.THC, WORDS, 17),
    2: Job(TOKENS[2], 4, LaneType.INTS, WORDS, 2**20, via_server=True),
    3: Job(99, 1, LaneType.SHORTS, WORDS, 65535),
    255: Job(55, 3, LaneType.NIBBLES, WORDS, 15),
}
RULES = {
    "unlimited": Rule(SlotPolicy.UNLIMITED, sets=8, words=WORDS, regions=2),
    "atp": Rule(SlotPolicy.ATP, sets=4, words=WORDS, stale_ns=5000),
    "atp-free": Rule(SlotPolicy.ATP_FREE, sets=4, words=WORDS, stale_ns=5000),
    "switchml": Rule(SlotPolicy.SWITCHML, sets=8, words=WORDS, regions=4),
    "esa": Rule(SlotPolicy.ESA, sets=4, words=WORDS, stale_ns=5000),
    "assoc": Rule(SlotPolicy.ASSOC, sets=2, ways=2, words=WORDS, tomb_ns=6000, tombs=8, stale_ns=9000),
}


def lanes_of(job: int, epoch: int, fragment: int, worker: int) -> bytes:
    """The one gradient that a worker has for a fragment in an epoch: raw lanes within the job's bound."""
    facts = JOBS.get(job, JOBS[0])
    seed = int.from_bytes(hashlib.sha256(repr((job, epoch, fragment, worker)).encode()).digest()[:8], "little")
    random = np.random.default_rng(seed)
    if facts.lanes.raw_bits == 4:
        return random.integers(0, 256, 8 * facts.raw_words, dtype=np.uint8).tobytes()
    kind = {8: np.uint8, 16: np.uint16, 32: np.uint32}[facts.lanes.sum_bits]
    return random.integers(0, facts.largest + 1, 8 * facts.words // kind().itemsize, dtype=kind).tobytes()


def sum_over(packet: Packet) -> bytes:
    """What the packet should hold: the sum of the gradients of all workers in its bitmap."""
    kind = {8: np.uint8, 16: np.uint16, 32: np.uint32}[packet.lanes.sum_bits]
    total = np.zeros(8 * WORDS // kind().itemsize, np.uint64)
    for worker in range(32):
        if packet.bitmap >> worker & 1:
            raw = lanes_of(packet.job, packet.epoch, packet.fragment, worker)
            one = Packet(Kind.GRADIENT, packet.lanes, packet.job, 1, 0, 1, payload=raw)
            total += np.frombuffer(sums_of(one), kind)
    assert int(total.max()) < 1 << packet.lanes.sum_bits
    return total.astype(kind).tobytes()


def sum_of(packets: list[Packet]) -> bytes:
    """The sum of what some raw packets hold."""
    kind = {8: np.uint8, 16: np.uint16, 32: np.uint32}[packets[0].lanes.sum_bits]
    total = sum(np.frombuffer(sums_of(packet), kind).astype(np.uint64) for packet in packets)
    return total.astype(kind).tobytes()


def why_no_kernel() -> str:
    """Why no switch can be put into the kernel here, if so."""
    try:
        load_program(RULES["esa"], 7000, test_clock=True).close()
    except EvenkeelError as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class Arrival:
    """Bytes that come to a switch."""

    data: bytes
    sender: int
    now_ns: int


class PlainTable:
    """The Python rule with the interface of `switch.table.Table`."""

    def __init__(self, rule: Rule) -> None:
        self.state = SwitchState(rule, {})

    def register(self, number: int, job: Job) -> None:
        self.state = SwitchState(
            self.state.rule, {**self.state.jobs, number: job}, self.state.slots, self.state.tombs, self.state.counts
        )

    def step(self, data: bytes, sender: int, now_ns: int) -> tuple[To, bytes]:
        try:
            packet = parse(data)
        except PacketError as error:
            reason = Reason(error.reason)
            counts = {**self.state.counts, reason: self.state.counts.get(reason, 0) + 1}
            self.state = SwitchState(self.state.rule, self.state.jobs, self.state.slots, self.state.tombs, counts)
            return To.NOBODY, b""
        self.state, sent = step(self.state, packet, sender, now_ns)
        return (sent[0].to, write(sent[0].packet)) if sent else (To.NOBODY, b"")

    @property
    def counts(self):
        return dict(self.state.counts)

    @property
    def slots(self):
        return dict(self.state.slots)

    @property
    def tombs(self):
        return dict(self.state.tombs)

    @property
    def epochs(self):
        return {number: job.epoch for number, job in self.state.jobs.items()}


def filled(table, jobs=JOBS):
    """The table, with all jobs registered."""
    for number, job in jobs.items():
        table.register(number, job)
    return table


@st.composite
def honest(draw, now_ns: int = 0) -> Packet:
    """A packet that a worker or a server may send, with the worker's one gradient."""
    number = draw(st.sampled_from(sorted(JOBS)))
    job = JOBS[number]
    worker = draw(st.integers(0, job.workers - 1))
    fragment = draw(st.sampled_from([0, 1, 2, 3, 4, 2**32 - 1]))
    epoch = draw(st.sampled_from([0, 0, 0, 0, 1]))
    kind = draw(st.sampled_from([Kind.GRADIENT] * 12 + [Kind.RESEND] * 2 + [Kind.REMINDER, Kind.NACK, Kind.RESULT]))
    priority = draw(st.sampled_from([0, 1, 100, 116, 132, 255]))
    fields = {"job": number, "token": job.token, "fragment": fragment, "epoch": epoch, "priority": priority}
    if kind in (Kind.GRADIENT, Kind.RESEND):
        payload = lanes_of(number, epoch, fragment, worker)
        return Packet(kind, job.lanes, bitmap=1 << worker, payload=payload, **fields)
    bitmap = 0 if kind == Kind.REMINDER else draw(st.integers(1, job.everyone))
    room = bytes(8 * job.words * draw(st.booleans())) if kind == Kind.REMINDER else b""
    packet = Packet(kind, job.lanes, bitmap=bitmap, payload=room, **fields)
    if kind != Kind.RESULT:
        return packet
    return Packet(kind, job.lanes, bitmap=bitmap, payload=sum_over(packet), **fields)


@st.composite
def arrivals(draw, hostile: bool, most: int = 60) -> list[Arrival]:
    """What comes to a switch, in order; hostile: some of it broken, forged, or from strangers."""
    now, found = 0, []
    for packet in draw(st.lists(honest(), min_size=1, max_size=most)):
        now += draw(st.sampled_from([0, 1, 50, 700, 2000]))
        data = bytearray(write(packet))
        sender = SERVER
        if packet.kind in (Kind.GRADIENT, Kind.RESEND):
            sender = packet.bitmap.bit_length() - 1
        if hostile and draw(st.integers(0, 3)) == 0:
            sender = draw(st.sampled_from([sender, sender, 0, 3, SERVER, 33, 255]))
            for _ in range(draw(st.integers(0, 2))):
                place = draw(st.integers(0, min(len(data) - 1, 39)))
                data[place] = draw(st.sampled_from([0, 1, 2, 6, 7, 255]))
            data = data[: draw(st.sampled_from([len(data)] * 4 + [0, 31, 32, len(data) - 1]))]
        found.append(Arrival(bytes(data), sender, now))
    return found
