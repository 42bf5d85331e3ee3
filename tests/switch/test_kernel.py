"""The switch in the kernel does bit for bit what the Python rule does."""

import socket
import struct

import pytest
from hypothesis import given, settings

from evenkeel.switch.aggregator import SERVER, To
from evenkeel.switch.kernel import DROP, PASS, REDIRECT, Member, load_program
from evenkeel.switch.packet import Kind, Packet, parse, write
from switch_packets import JOBS, RULES, PlainTable, arrivals, filled, lanes_of, why_no_kernel

UDP = 7000
LOOPBACK = 1


WHY_NOT = why_no_kernel()
pytestmark = [pytest.mark.root, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]
KERNEL_RULES = [name for name in RULES if name != "switchml"]


def address(sender: int) -> str:
    return f"10.1.{sender // 250}.{sender % 250 + 1}"


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def frame_of(data: bytes, sender: int) -> bytes:
    to = address(0) if sender == SERVER else address(SERVER)
    ports = (UDP, 5000) if sender == SERVER else (5000, UDP)
    udp = struct.pack("!4H", *ports, 8 + len(data), 0) + data
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0)
    ends = socket.inet_aton(address(sender)) + socket.inet_aton(to)
    return b"\2" * 12 + b"\x08\x00" + ip + ends + udp


class KernelTable:
    """The program behind the interface of `table.Table`."""

    def __init__(self, rule):
        self.loaded = load_program(rule, UDP, test_clock=True)
        self.loaded.maps.add_port(LOOPBACK, self.loaded.leaving)  # by which frames of a test run come in
        for number, job in JOBS.items():
            workers = [Member(address(worker), 5000, 0) for worker in range(job.workers)]
            self.loaded.maps.register(number, job, workers, Member(address(SERVER), UDP, LOOPBACK))

    def step(self, data: bytes, sender: int, now_ns: int) -> tuple[To, bytes]:
        self.loaded.maps.set_clock(now_ns)
        sent = self.loaded.run(frame_of(data, sender))
        came = parse(data) if sent.answer != DROP else None
        if came is None or came.job not in JOBS:  # a job that the switch does not know is its server's business
            assert came is None or sent.answer == PASS
            return To.NOBODY, b""
        if sent.answer == PASS:
            assert sent.frame == frame_of(data, sender)
            return To.WORKERS if sender == SERVER and came.kind != Kind.REMINDER else To.SERVER, data
        assert sent.answer == REDIRECT
        left = sent.frame[42:]
        if left != data:
            self.check_headers(sent.frame)
        return To.ALL if parse(left).kind == Kind.RESULT else To.SERVER, left

    def check_headers(self, frame: bytes) -> None:
        ip, udp = frame[14:34], frame[34:]
        assert checksum(ip) == 0xFFFF
        assert struct.unpack("!H", ip[2:4])[0] == 20 + len(udp)
        assert struct.unpack("!H", udp[4:6])[0] == len(udp)
        assert checksum(ip[12:20] + b"\0\x11" + udp[4:6] + udp) == 0xFFFF

    @property
    def epochs(self):
        return {number: job.epoch for number, job in self.loaded.maps.jobs.items()}


@pytest.fixture(scope="module", params=KERNEL_RULES)
def policy(request):
    return request.param


@settings(max_examples=15, deadline=None)
@given(came=arrivals(hostile=True, most=40))
def test_kernel_and_python_agree_after_every_packet(policy, came):
    plain, kernel = filled(PlainTable(RULES[policy])), KernelTable(RULES[policy])
    try:
        for each in came:
            if each.data[3:5] == bytes([Kind.CONTROL, 0]):  # passes: it is between hosts
                continue
            assert kernel.step(each.data, each.sender, each.now_ns) == plain.step(each.data, each.sender, each.now_ns)
            maps = kernel.loaded.maps
            assert (maps.slots, maps.tombs, maps.counts) == (plain.slots, plain.tombs, plain.counts)
            assert kernel.epochs == plain.epochs
    finally:
        kernel.loaded.close()


def test_what_is_not_a_packet_of_the_switch_passes():
    kernel = KernelTable(RULES["esa"])
    frame = frame_of(
        write(Packet(Kind.GRADIENT, JOBS[0].lanes, 0, JOBS[0].token, 0, 1, payload=lanes_of(0, 0, 0, 0))), 0
    )
    others = {
        "another port": frame[:36] + b"\0\7" + frame[38:],
        "TCP": frame[:23] + b"\6" + frame[24:],
        "IPv6": frame[:12] + b"\x86\xdd" + frame[14:],
        "a fragment": frame[:20] + b"\x20\0" + frame[22:],
        "cut short": frame[:-4],
    }
    for what, other in others.items():
        assert kernel.loaded.run(other).answer == PASS, what
    assert kernel.loaded.maps.counts == {}
    kernel.loaded.close()
