"""Loses packets between the hosts of a lab by chance, from a seed: a BPF program of a few instructions at each port.

For kernels without netem, and for losses that a second run repeats. The program counts packets, mixes the number with
the seed, and drops one in so many. It is written as instructions here, so no compiler is needed.
"""

import ctypes
import os
import platform
import struct
from pathlib import Path

from evenkeel.errors import ConfigurationError
from evenkeel.lab.shell import run
from evenkeel.lab.topology import INTERFACE, Topology

__all__ = ["lose_packets"]

_BPF_CALLS = {"x86_64": 321, "aarch64": 280}
_MAP_CREATE, _PROGRAM_LOAD, _PIN = 0, 5, 6
_ARRAY, _CLASSIFIER = 2, 3
_PINS = Path("/sys/fs/bpf")
_MIXERS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = (1 << 64) - 1


def lose_packets(topology: Topology, label: str, share: float, seed: int) -> None:
    """Has each port lose a share of the packets that come from its host.

    Large packets that the kernel would cut later are cut at the host from now on, or one loss would take many.

    Args:
        topology: of a lab that is there.
        label: of the lab.
        share: of packets.
        seed: of the losses.

    Raises:
        ConfigurationError: this kernel does not let it.
    """
    switch = topology.namespaces(label)[0]
    for rank in range(topology.hosts):
        run(("ip", "-n", topology.namespace(label, rank), "link", "set", "dev", INTERFACE, "gso_max_segs", "1"))
        pin = _PINS / f"{label}-loss{rank}"
        port = f"port{rank}"
        program = _load(share, seed + (rank << 32))
        try:
            _call(_PIN, struct.pack("<QI", ctypes.addressof(path := ctypes.create_string_buffer(bytes(pin))), program))
            del path
            run(("tc", "-n", switch, "qdisc", "add", "dev", port, "clsact"))
            # Not `tc -n`, which sees another /sys. The program goes with the lab's namespace; its name is needed once.
            inside = ("nsenter", f"--net=/run/netns/{switch}", "tc")
            run((*inside, "filter", "add", "dev", port, "ingress", "bpf", "da", "object-pinned", str(pin)))
        finally:
            os.close(program)
            pin.unlink(missing_ok=True)


def instructions(counter: int, share: float, seed: int) -> bytes:
    """Writes the program: IPv4 packets are lost by chance, all others pass.

    Args:
        counter: descriptor of an array of one number.
        share: of packets to lose.
        seed: of the losses.
    """
    code: list[bytes] = []

    def put(operation: int, target: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> None:
        code.append(struct.pack("<BBhi", operation, target | source << 4, offset, value))

    def put_wide(target: int, value: int, kind: int = 0) -> None:
        low, high = value & 0xFFFFFFFF, value >> 32
        code.append(struct.pack("<BBhI", 0x18, target | kind << 4, 0, low))
        code.append(struct.pack("<BBhI", 0, 0, 0, high))

    def mix(shift: int) -> None:  # r1 ^= r1 >> shift
        put(0xBF, 3, 1)
        put(0x77, 3, value=shift)
        put(0xAF, 1, 3)

    put(0x61, 6, 1, 16)  # r6 = protocol
    put(0x62, 10, offset=-4)  # key 0 on the stack
    put(0xBF, 2, 10)
    put(0x07, 2, value=-4)
    put_wide(1, counter, kind=1)
    put(0x85, value=1)  # look the counter up
    passes = len(code)
    put(0x15, 0, offset=0, value=0)  # no counter: pass
    put(0x55, 6, offset=0, value=0x0008)  # not IPv4: pass
    put(0xB7, 1, value=1)
    put(0xDB, 0, 1, 0, 1)  # r1 = counter++
    put_wide(2, (seed * _MIXERS[0]) & _MASK)
    put(0x0F, 1, 2)
    for mixer, shift in zip(_MIXERS, (30, 27, 31), strict=True):
        put_wide(2, mixer)
        put(0x2F, 1, 2)
        mix(shift)
    put(0x77, 1, value=32)
    put_wide(2, round(share * 2**32))
    put(0x3D, 1, 2, 2)  # r1 >= share: pass
    put(0xB7, 0, value=2)  # drop
    put(0x95)
    end = len(code)
    put(0xB7, 0, value=0)  # pass
    put(0x95)
    for at in (passes, passes + 1):
        code[at] = code[at][:2] + struct.pack("<h", end - at - 1) + code[at][4:]
    return b"".join(code)


def _load(share: float, seed: int) -> int:
    counter = _call(_MAP_CREATE, struct.pack("<5I", _ARRAY, 4, 8, 1, 0))
    try:
        program = ctypes.create_string_buffer(instructions(counter, share, seed))
        licence = ctypes.create_string_buffer(b"GPL")
        count = (len(program) - 1) // 8
        return _call(
            _PROGRAM_LOAD,
            struct.pack("<IIQQ", _CLASSIFIER, count, ctypes.addressof(program), ctypes.addressof(licence)),
        )
    finally:
        os.close(counter)


def _call(command: int, attributes: bytes) -> int:
    number = _BPF_CALLS.get(platform.machine())
    if number is None:
        raise ConfigurationError(f"loss: packets cannot be lost on a {platform.machine()} machine")
    libc = ctypes.CDLL(None, use_errno=True)
    whole = ctypes.create_string_buffer(attributes.ljust(128, b"\0"), 128)
    given = int(libc.syscall(number, command, whole, 128))
    if given < 0:
        raise ConfigurationError(f"loss: this kernel loads no BPF programs here: {os.strerror(ctypes.get_errno())}")
    return given
