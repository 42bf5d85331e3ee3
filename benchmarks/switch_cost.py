"""What does a packet cost the switch in the kernel? Times the XDP program by test runs, without any network. Root only.

python benchmarks/switch_cost.py --json switch_cost.json
"""

import argparse
import socket
import statistics
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
from output import show, write_json

from evenkeel.switch.aggregator import SERVER, Job, Rule, SlotPolicy
from evenkeel.switch.kernel import Member, load_program
from evenkeel.switch.packet import Kind, LaneType, Packet, words_for_mtu, write

UDP, TOKEN = 7000, 77
LARGEST = {LaneType.BYTES: 31, LaneType.SHORTS: 4095, LaneType.INTS: 2**20, LaneType.THC: 17, LaneType.NIBBLES: 15}


def address(number: int) -> str:
    return f"10.1.0.{number + 1}"


def frame_of(data: bytes, worker: int) -> bytes:
    udp = struct.pack("!4H", 5000, UDP, 8 + len(data), 0) + data
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0)
    ends = socket.inet_aton(address(worker)) + socket.inet_aton(address(SERVER))
    return b"\2" * 12 + b"\x08\x00" + ip + ends + udp


def ones(lanes: LaneType, words: int) -> bytes:
    """Raw lanes that all are 1."""
    kind = {8: np.uint8, 16: np.uint16, 32: np.uint32}[lanes.sum_bits]
    return np.ones(8 * words // kind().itemsize, kind).tobytes()


def measure(policy: str, lanes: LaneType, mtu: int, repeat: int, runs: int) -> dict:
    words = words_for_mtu(mtu)
    rule = Rule.of(SlotPolicy.of(policy), 1024, words=words)
    job = Job(TOKEN, 8, lanes, words, LARGEST[lanes])
    coordinates = words * 64 // lanes.sum_bits
    row = {"policy": policy, "lanes": lanes.name, "mtu": mtu, "coordinates": coordinates}
    for what, adds_again in (("add", True), ("duplicate", False)):
        loaded = load_program(rule, UDP, adds_again=adds_again)
        loaded.maps.register(0, job, [Member(address(w), 5000, 0) for w in range(8)], Member(address(SERVER), UDP, 0))
        packet = Packet(Kind.GRADIENT, lanes, 0, TOKEN, 0, 1, payload=ones(lanes, job.raw_words))
        for worker in (0, 1):
            loaded.run(frame_of(write(replace(packet, bitmap=1 << worker)), worker))
        frame = frame_of(write(packet), 0)
        times = sorted(loaded.run(frame, repeat).duration_ns for _ in range(runs))
        loaded.close()
        row[f"{what}_ns"] = statistics.median(times)
        row[f"{what}_least_ns"] = times[0]
    row["add_ns_per_coordinate"] = round(row["add_ns"] / coordinates, 4)
    return row


COLUMNS = {
    "policy": ("policy", ""),
    "lanes": ("lanes", ""),
    "mtu": ("mtu", "d"),
    "coordinates": ("coordinates", "d"),
    "add_ns": ("add, ns", "d"),
    "duplicate_ns": ("drop, ns", "d"),
    "add_ns_per_coordinate": ("ns a coordinate", ".3f"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=200_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    rows = []
    for policy in ("unlimited", "esa", "assoc"):
        for lanes in (LaneType.BYTES, LaneType.THC, LaneType.SHORTS, LaneType.INTS):
            for mtu in (1500, 3498) if policy == "esa" else (1500,):
                rows.append(measure(policy, lanes, mtu, chosen.repeat, chosen.runs))
    show("A packet's cost in the XDP program; drop: the same without adding", rows, COLUMNS)
    write_json(chosen.json, {"repeat": chosen.repeat, "runs": chosen.runs}, rows)


if __name__ == "__main__":
    main()
