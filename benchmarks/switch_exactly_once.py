"""Is every sum exact, each worker in it once? Runs the C rule in a network that loses, doubles and reorders packets.

    python benchmarks/switch_exactly_once.py [--fragments 10000000] [--policies esa,assoc] [--loss 0.01] [--json FILE]

Workers, a server for each job and one switch with few slots; workers die and come back with other gradients (a new
epoch), servers die and forget all. Every sum that leaves the switch and every result that a worker takes is compared
with what it should be. Prints a row for each policy; exit code 1 if a sum was wrong, or nothing went on for a second.
"""

import argparse
import ctypes
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from output import write_json

from evenkeel.switch import build
from evenkeel.switch.aggregator import Job, Rule, SlotPolicy
from evenkeel.switch.kernel import Member, load_program
from evenkeel.switch.packet import LaneType
from evenkeel.switch.table import Table

COUNTED = (
    *("finished", "wrong", "steps", "packets", "lost", "doubled", "resends", "reminders", "nacks", "answers"),
    *("server_restarts", "worker_restarts", "stuck"),
)

LOOPBACK = 1  # by whose number frames of test runs come in


class Settings(ctypes.Structure):
    _fields_ = (
        ("fragments", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("jobs", ctypes.c_uint32),
        ("workers", ctypes.c_uint32),
        ("loss", ctypes.c_uint32),
        ("twice", ctypes.c_uint32),
        ("late", ctypes.c_uint32),
        ("restart_every", ctypes.c_uint32),
        ("program", ctypes.c_int32),
        ("with_server", ctypes.c_uint32),
        ("clock", ctypes.c_void_p),
    )


class Outcome(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in COUNTED)


def compiled(folder: str, broken: bool) -> ctypes.CDLL:
    here, library = Path(__file__).parent, Path(folder) / "exactly_once.so"
    native = Path(build.__file__).parent / "native"
    flags = ["-O3", "-march=native", "-shared", "-fPIC", f"-I{native}", *["-DEK_ADDS_AGAIN"] * broken]
    subprocess.run(["cc", *flags, here / "switch_exactly_once.c", "-o", library], check=True)
    return ctypes.CDLL(str(library))


def rule_of(policy: SlotPolicy, slots: int) -> Rule:
    # Regions hold two windows of 32 fragments for each of four jobs.
    regions = {"sets": 256, "regions": 4} if policy in (SlotPolicy.UNLIMITED, SlotPolicy.SWITCHML) else {}
    return Rule.of(policy, slots, words=2, stale_ns=1_000_000, **regions)


def measure(library: ctypes.CDLL, policy: str, chosen: argparse.Namespace) -> dict:
    rule = rule_of(SlotPolicy.of(policy), chosen.slots)
    table = Table(rule)
    millionths = (round(1e6 * share) for share in (chosen.loss, chosen.twice, chosen.late))
    settings = Settings(chosen.fragments, chosen.seed, 4, 4, *millionths, chosen.restart_every, -1)
    settings.with_server = policy != "switchml"
    outcome, began = Outcome(), time.perf_counter()
    if not chosen.kernel:
        library.run(ctypes.byref(settings), table.address, ctypes.byref(outcome))
        counts = table.counts
    else:
        loaded = load_program(rule, 7000, test_clock=True)
        loaded.maps.add_port(LOOPBACK, loaded.leaving)
        for number in range(4):
            members = [Member(f"10.1.0.{worker + 1}", 5000, 0) for worker in range(4)]
            job = Job(1000 + number, 4, LaneType.BYTES, rule.words, 31)
            loaded.maps.register(number, job, members, Member("10.1.0.33", 7000, LOOPBACK))
        clock = ctypes.c_uint64.from_buffer(loaded.maps.clock_memory())
        settings.program, settings.clock = loaded.entering, ctypes.addressof(clock)
        library.run(ctypes.byref(settings), table.address, ctypes.byref(outcome))
        counts = loaded.maps.counts
        loaded.close()
    row = {"policy": policy, "by": "kernel" if chosen.kernel else "user space", "seed": chosen.seed}
    row |= {name: getattr(outcome, name) for name in COUNTED} | {"seconds": round(time.perf_counter() - began, 1)}
    return row | {f"switch_{what.name.lower()}": count for what, count in counts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--fragments",
        type=int,
        help="that all workers of a job have the result of; default: 10 million, or 1 million with --kernel",
    )
    parser.add_argument("--policies", default=",".join(policy.text for policy in SlotPolicy))
    parser.add_argument("--kernel", action="store_true", help="let the XDP program add, by test runs; needs root")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--loss", type=float, default=0.01)
    parser.add_argument("--twice", type=float, default=0.01)
    parser.add_argument(
        "--late", type=float, default=0.02, help="share of packets that are up to 50 times as long on their way"
    )
    parser.add_argument("--restart-every", type=int, default=10_000, help="fragments of a job; 0: never")
    parser.add_argument("--broken", action="store_true", help="add what comes twice twice, to see that this is seen")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    chosen.fragments = chosen.fragments or (1_000_000 if chosen.kernel else 10_000_000)
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(folder, chosen.broken)
        rows = []
        for policy in chosen.policies.split(","):
            if chosen.kernel and policy == "switchml":
                continue
            rows.append(measure(library, policy, chosen))
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    write_json(chosen.json, {name: value for name, value in vars(chosen).items() if name != "json"}, rows)
    sys.exit(any(row["wrong"] or row["stuck"] for row in rows))


if __name__ == "__main__":
    main()
