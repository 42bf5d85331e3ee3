"""What does a packet cost, in the kernel's switch and in user space? Root only.

python benchmarks/switch_cost.py [--part program,network] --json switch_cost.json

`program` times the XDP program by test runs, without any network. `network` has four workers in network namespaces, one
process each, exchange fragments of 1,440 bytes over veth pairs without a rate: one at a time, and as fast as they can.
Three ways: the switch in the kernel; the one in user space, behind one more link, with packets cut to 1,500 bytes
before they cross a veth pair, as on a wire; and the same with runs of packets that cross it whole, up to 64 KB, which
is no network that exists, and in which user space can win.

`one round`: a fragment of each worker, until the first worker has the sum. Four processes have to be woken for that,
which takes longer than a switch does; so `in one process` has four workers with a socket in each namespace take turns
in one process that never sleeps, until all have the sum: what is left of it is the network's and the switch's.

`processor us a packet`: time of all processors that were not idle, workers included, over packets that came to the
switch. `switch us a packet`: of the server's process alone; or the time in the XDP program, where the kernel counts it.
"""

import argparse
import json
import os
import secrets
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from output import show, write_json

from evenkeel.switch.aggregator import SERVER, Job, Rule, SlotPolicy
from evenkeel.switch.deployment import Deployment, down, inside, up
from evenkeel.switch.host import StepEnd, SwitchHost
from evenkeel.switch.kernel import Member, detach, load_program
from evenkeel.switch.packet import Kind, LaneType, Packet, words_for_mtu, write
from evenkeel.switch.terms import Terms

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


WORKERS, PORT, WORDS, NAME = 4, 9700, 180, "cost"
ALONE, RUN = 300, 20_000  # rounds of one fragment; fragments of an exchange
WAYS = ("kernel", "user space", "user space, packets whole")
NETWORK_COLUMNS = {
    "way": ("switch", ""),
    "round_us": ("one round, us", ".0f"),
    "round_p95_us": ("p95", ".0f"),
    "together_us": ("in one process, us", ".0f"),
    "together_p95_us": ("p95", ".0f"),
    "packets_per_s": ("packets/s into it", ",.0f"),
    "gbit_per_s": ("Gbit/s", ".2f"),
    "processor_us": ("processor us a packet", ".2f"),
    "switch_us": ("switch us a packet", ".2f"),
    "resent": ("resent", "d"),
}


def as_worker(text: str) -> None:
    """One worker: exchanges when it is asked to, and prints how long that took."""
    settings = json.loads(text)
    terms = Terms(
        *(0, settings["token"], settings["worker"], WORKERS, LaneType.BYTES, 8 * WORDS), window=settings["window"]
    )
    host = SwitchHost([("10.78.0.5", PORT)], terms, silence_s=20)
    assert host.hello(20)
    first = 0

    def exchange(fragments: int) -> float:
        nonlocal first
        row = np.ones(fragments * terms.up_bytes, np.uint8)
        begin = time.perf_counter()
        totals, _ = host.begin(row, first)
        while (outcome := host.step(1.0)) != StepEnd.FINISHED:
            assert outcome == StepEnd.GOES_ON, outcome
        first += fragments
        took_s = time.perf_counter() - begin
        assert (totals == WORKERS).all()
        return took_s

    print("@ null", flush=True)
    for line in sys.stdin:
        rounds, fragments = json.loads(line)
        took = [exchange(fragments) for _ in range(rounds)]
        print("@", json.dumps({"took_s": took, "resent": host.counters().resent}), flush=True)
    host.close()


def together(made: Deployment, rounds: int) -> list[float]:
    """Times rounds of one fragment, in us, with all workers in this process."""

    def joined(worker: int) -> SwitchHost:
        terms = Terms(0, token, worker, WORKERS, LaneType.BYTES, 8 * WORDS, window=128)
        host = SwitchHost([("10.78.0.5", PORT)], terms, silence_s=20)
        assert host.hello(20)
        return host

    token = secrets.randbits(60)
    with ThreadPoolExecutor(WORKERS) as pool:
        hosts = list(pool.map(lambda worker: inside(made.ports[worker].host, lambda: joined(worker)), range(WORKERS)))
    took, row = [], np.ones(hosts[0].terms.up_bytes, np.uint8)
    try:
        for first in range(rounds):
            begin = time.perf_counter()
            totals = [host.begin(row, first)[0] for host in hosts]
            waiting = hosts
            while waiting:
                waiting = [host for host in waiting if host.step(0) != StepEnd.FINISHED]
            took.append(1e6 * (time.perf_counter() - begin))
            assert all((total == WORKERS).all() for total in totals)
    finally:
        for host in hosts:
            host.close()
    return took[rounds // 10 :]  # those before warm everything up


@contextmanager
def processes(made: Deployment, ready: str, commands: list[list[str]]) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes in hosts, each of which has said that it is ready."""
    running: list[subprocess.Popen[str]] = []
    try:
        for host, command in enumerate(commands):
            at = host if len(commands) > 1 else WORKERS
            inside_it = ["ip", "netns", "exec", made.ports[at].host, sys.executable, *command]
            running.append(subprocess.Popen(inside_it, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        for each in running:
            heard(each, ready)
        yield running
    finally:
        for each in running:
            each.terminate()
            each.communicate()


def heard(process: "subprocess.Popen[str]", mark: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if mark in line:
            return line
    raise SystemExit(f"a process ended with {process.wait()} before it said {mark!r}")


def do(workers: "list[subprocess.Popen[str]]", rounds: int, fragments: int) -> list[dict[str, Any]]:
    for each in workers:
        assert each.stdin is not None
        each.stdin.write(f"[{rounds}, {fragments}]\n")
        each.stdin.flush()
    return [json.loads(heard(each, "@ ")[2:]) for each in workers]


def busy_s() -> float:
    """Time that all processors were not idle."""
    values = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(values) - values[3] - values[4]) / os.sysconf("SC_CLK_TCK")


def own_s(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def program_ns() -> int | None:
    """Time in all XDP programs so far; None where the kernel does not count it."""
    done = subprocess.run(["bpftool", "prog", "show", "-j"], capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    found = [program for program in json.loads(done.stdout) if program.get("type") == "xdp"]
    return sum(program["run_time_ns"] for program in found) if any("run_time_ns" in p for p in found) else None


def over_network(way: str, exchanges: int) -> dict[str, Any]:
    rule = Rule.of(SlotPolicy.UNLIMITED, 4096, words=WORDS, regions=8)
    made = up(WORKERS + 1, rule, PORT, mode="native", name=NAME)
    try:
        if way != "kernel":
            inside(made.namespace, lambda: [detach(socket.if_nametoindex(port.interface)) for port in made.ports])
        if way == WAYS[2]:
            for port in made.ports:
                command = ["ip", "-n", port.host, "link", "set", "eth0", "gso_max_segs", "65535"]
                subprocess.run(command, check=True)
        serve = ["-m", "evenkeel", "switch", "ps" if way == "kernel" else "run", "--bind", f"10.78.0.5:{PORT}"]
        settings = {"token": secrets.randbits(60), "window": 128}
        workers = [[__file__, "--as-worker", json.dumps({**settings, "worker": number})] for number in range(WORKERS)]
        with processes(made, "serving", [serve]):
            at_once = together(made, ALONE)
        with processes(made, "serving", [serve]) as (server,), processes(made, "@", workers) as running:
            do(running, 20, 1)
            alone = [1e6 * value for value in do(running, ALONE, 1)[0]["took_s"]]
            do(running, 1, 1000)
            before = busy_s(), own_s(server.pid), program_ns()
            found = do(running, exchanges, RUN)
            after = busy_s(), own_s(server.pid), program_ns()
    finally:
        down(NAME)
    packets, took_s = WORKERS * RUN * exchanges, sum(found[0]["took_s"])
    inside_ns = None if before[2] is None or after[2] is None else after[2] - before[2]
    in_switch_s = after[1] - before[1] if way != "kernel" else None if inside_ns is None else inside_ns / 1e9
    return {
        "way": way,
        "workers": WORKERS,
        "round_us": statistics.median(alone),
        "round_p95_us": statistics.quantiles(alone, n=20)[-1],
        "together_us": statistics.median(at_once),
        "together_p95_us": statistics.quantiles(at_once, n=20)[-1],
        "packets_per_s": packets / took_s,
        "gbit_per_s": packets * 1500 * 8 / took_s / 1e9,
        "processor_us": 1e6 * (after[0] - before[0]) / packets,
        "switch_us": None if in_switch_s is None else 1e6 * in_switch_s / packets,
        "resent": sum(each["resent"] for each in found),
    }


@contextmanager
def counted_programs() -> Iterator[None]:
    """Has the kernel count the time of BPF programs meanwhile, if it can."""
    switch = Path("/proc/sys/kernel/bpf_stats_enabled")
    try:
        before = switch.read_text()
        switch.write_text("1")
    except OSError:
        yield
        return
    try:
        yield
    finally:
        switch.write_text(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="program,network", help="what to measure")
    parser.add_argument("--repeat", type=int, default=200_000, help="runs of the program that are timed together")
    parser.add_argument("--runs", type=int, default=5, help="of these")
    parser.add_argument("--exchanges", type=int, default=5, help="of 20,000 fragments, over the network")
    parser.add_argument("--as-worker", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if chosen.as_worker:
        as_worker(chosen.as_worker)
        return
    rows: list[dict[str, Any]] = []
    if "program" in chosen.part:
        for policy in ("unlimited", "esa", "assoc"):
            for lanes in (LaneType.BYTES, LaneType.THC, LaneType.SHORTS, LaneType.INTS):
                for mtu in (1500, 3498) if policy == "esa" else (1500,):
                    rows.append({"part": "program", **measure(policy, lanes, mtu, chosen.repeat, chosen.runs)})
        show("A packet's cost in the XDP program; drop: the same without adding", rows, COLUMNS)
    if "network" in chosen.part:
        with counted_programs():
            found = [over_network(way, chosen.exchanges) for way in WAYS]
        show("Four workers over veth pairs", found, NETWORK_COLUMNS)
        rows += [{"part": "network", **row} for row in found]
    write_json(
        chosen.json,
        {name: getattr(chosen, name) for name in ("part", "repeat", "runs", "exchanges")},
        rows,
    )


if __name__ == "__main__":
    main()
