"""Loads the switch into the kernel, through libbpf by ctypes, and looks after its maps."""

import ctypes
import errno
import ipaddress
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from ctypes import Structure, byref, c_char_p, c_int, c_size_t, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p, sizeof
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from evenkeel.errors import ConfigurationError, SwitchError
from evenkeel.switch.aggregator import SERVER, Event, Job, Rule, Slot, SlotPolicy, Tomb
from evenkeel.switch.build import bpf_object
from evenkeel.switch.packet import MAX_JOBS, Reason
from evenkeel.switch.table import COUNTERS, NativeJob, NativeSlot, native_job, slot_of, tombs_of

__all__ = [
    "DROP",
    "PASS",
    "REDIRECT",
    "Loaded",
    "Maps",
    "Member",
    "TrialRun",
    "attach",
    "detach",
    "load_program",
    "open_map",
    "require_kernel",
]

DROP, PASS, REDIRECT = 1, 2, 4  # what an XDP program answers
_POLICIES = (SlotPolicy.UNLIMITED, SlotPolicy.ATP, SlotPolicy.ATP_FREE, SlotPolicy.ESA, SlotPolicy.ASSOC)
_LOCKED = 4  # BPF_F_LOCK: a slot is read whole
_MAPS = ("buckets", "jobs", "tombs", "counters", "senders", "receivers", "servers", "ports")
_BROADCAST_MAC = b"\xff" * 6


@dataclass(frozen=True, slots=True)
class Member:
    """Holds where a worker or a server of a job is.

    Attributes:
        address: IPv4.
        udp: port that it receives on.
        port: number of the switch's interface behind which it is; 0: any, which sends it nothing.
        mac: of its interface; all ones where it is not known.
    """

    address: str
    udp: int
    port: int
    mac: bytes = _BROADCAST_MAC


class _SenderKey(Structure):
    _fields_ = (("job", c_uint32), ("address", c_uint32))


class _Sender(Structure):
    _fields_ = (("number", c_uint32), ("port", c_uint32))


class _ReceiverKey(Structure):
    _fields_ = (("job", c_uint32), ("port", c_uint32))


class _Receiver(Structure):
    _fields_ = (
        ("address", c_uint32),
        ("from_address", c_uint32),
        ("udp", c_uint16),
        ("from_udp", c_uint16),
        ("mac", c_uint8 * 6),
        ("unused", c_uint8 * 2),
    )


class _Server(Structure):
    _fields_ = (("address", c_uint32), ("port", c_uint32))


class _PortEntry(Structure):
    _fields_ = (("interface", c_uint32), ("program", c_int))


class _RunOptions(Structure):
    _fields_ = (
        ("size", c_size_t),
        ("data_in", c_void_p),
        ("data_out", c_void_p),
        ("data_size_in", c_uint32),
        ("data_size_out", c_uint32),
        ("context_in", c_void_p),
        ("context_out", c_void_p),
        ("context_size_in", c_uint32),
        ("context_size_out", c_uint32),
        ("answer", c_uint32),
        ("repeat", c_int),
        ("duration_ns", c_uint32),
        ("flags", c_uint32),
        ("cpu", c_uint32),
        ("batch_size", c_uint32),
    )


@dataclass(frozen=True, slots=True)
class TrialRun:
    """Holds what the program did with a frame without any network.

    Attributes:
        answer: `DROP`, `PASS` or `REDIRECT`.
        frame: as the program left it.
        duration_ns: of a run, the mean of all repeats.
    """

    answer: int
    frame: bytes
    duration_ns: int


class Maps:
    """Reads and writes what a switch in the kernel knows.

    Args:
        rule: by which it was compiled.
        files: descriptors of its maps, by name; closed by `close`.
    """

    def __init__(self, rule: Rule, files: Mapping[str, int]) -> None:
        self.rule = rule
        self._files = dict(files)
        self._jobs_memory = mmap.mmap(files["jobs"], _pages(sizeof(NativeJob) * MAX_JOBS))
        self._jobs = (NativeJob * MAX_JOBS).from_buffer(self._jobs_memory)

        class NativeBucket(Structure):
            _fields_ = (
                ("lock", c_uint32),
                ("unused", c_uint32),
                ("slots", NativeSlot * rule.ways),
                ("sums", c_uint64 * (rule.ways * rule.words)),
            )

        self._bucket = NativeBucket

    def close(self) -> None:
        """Lets go of the maps; the switch goes on."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def register(self, number: int, job: Job, workers: Sequence[Member], server: Member) -> None:
        """Lets a job's packets in, in place of whatever job had this number.

        Args:
            number: of the job.
            job: what is to be known of it.
            workers: where they are, by number.
            server: where its server is.

        Raises:
            ConfigurationError: it does not fit this switch.
            SwitchError: the kernel refuses.
        """
        if not 0 <= number < MAX_JOBS:
            raise ConfigurationError(f"job: must be 0 to {MAX_JOBS - 1}, found {number}")
        if job.words != self.rule.words:
            raise ConfigurationError(
                f"job {number}: fragments of {job.words} words do not fit: the switch was started for exactly "
                f"{self.rule.words}; start it with the same --mtu as the workers"
            )
        if len(workers) != job.workers:
            raise ConfigurationError(
                f"job {number}: {job.workers} workers need as many addresses, found {len(workers)}"
            )
        ports = [member.port for member in (*workers, server) if member.port]
        if len(set(ports)) != len(ports):
            raise ConfigurationError(
                f"job {number}: two of its members are behind one port; each worker and the server needs its own host"
            )
        self.remove(number)
        for index, member in ((SERVER, server), *enumerate(workers)):
            sender = _Sender(index, member.port)
            self._update("senders", _SenderKey(number, _ipv4(member.address)), sender)
            if not member.port:
                continue
            # To workers a result comes from their server. The server would drop what came from itself.
            towards = _Receiver(_ipv4(member.address), 0, _network16(member.udp), 0, (c_uint8 * 6)(*member.mac))
            if index != SERVER:
                towards.from_address, towards.from_udp = _ipv4(server.address), _network16(server.udp)
            self._update("receivers", _ReceiverKey(number, member.port), towards)
        self._update("servers", c_uint32(number), _Server(_ipv4(server.address), server.port))
        self._jobs[number] = native_job(job)

    def remove(self, number: int) -> None:
        """Lets no packet of a job in any more; what is left of it in slots counts as empty."""
        self._jobs[number] = NativeJob()
        self._update("servers", c_uint32(number), _Server())
        for name, kind in (("senders", _SenderKey), ("receivers", _ReceiverKey)):
            for key in list(self._keys(name, kind)):
                if key.job == number:
                    libbpf().bpf_map_delete_elem(self._files[name], byref(key))

    def add_port(self, interface: int, leaving: int) -> None:
        """Lets packets leave through an interface of this network namespace, addressed by a program's descriptor."""
        self._update("ports", c_uint32(interface), _PortEntry(interface, leaving))

    def set_clock(self, now_ns: int) -> None:
        """Sets the time, where the program was made for tests."""
        self._update("clock", c_uint32(0), c_uint64(now_ns))

    def clock_memory(self) -> mmap.mmap:
        """Gives the memory of that clock, a number of 8 bytes, for C code that sets it often."""
        return mmap.mmap(self._files["clock"], mmap.PAGESIZE)

    @property
    def counts(self) -> dict[Reason | Event, int]:
        """Gives what was counted by all processors, without zeros."""
        processors = libbpf().libbpf_num_possible_cpus()
        found = (c_uint64 * (COUNTERS * processors))()
        self._look_up("counters", c_uint32(0), found)
        sums = [sum(found[place::COUNTERS]) for place in range(COUNTERS)]
        return {what: sums[what] for what in (*Reason, *Event) if sums[what]}

    @property
    def jobs(self) -> dict[int, NativeJob]:
        """Gives the jobs by number."""
        return {number: NativeJob.from_buffer_copy(job) for number, job in enumerate(self._jobs) if job.token}

    @property
    def slots(self) -> dict[tuple[int, int], Slot]:
        """Gives the slots that are not empty, by (set, way)."""
        found, bucket, words = {}, self._bucket(), self.rule.words
        for place in range(self.rule.sets):
            self._look_up("buckets", c_uint32(place), bucket, _LOCKED)
            for way, slot in enumerate(bucket.slots):
                if slot.bitmap:
                    sums = bytes(bucket.sums)[8 * way * words : 8 * (way + 1) * words]
                    found[place, way] = slot_of(slot, sums)
        return found

    @property
    def tombs(self) -> dict[int, Tomb]:
        """Gives when each tombstone was set, by place."""
        found = (c_uint64 * max(self.rule.tombs, 1))()
        self._look_up("tombs", c_uint32(0), found)
        return tombs_of(found)

    def _update(self, name: str, key: Any, value: Any) -> None:
        code = libbpf().bpf_map_update_elem(self._files[name], byref(key), byref(value), c_uint64(0))
        if code:
            raise SwitchError(f"the kernel refuses an entry of the switch's {name}: {os.strerror(-code)}")

    def _look_up(self, name: str, key: Any, value: Any, flags: int = 0) -> None:
        code = libbpf().bpf_map_lookup_elem_flags(self._files[name], byref(key), byref(value), c_uint64(flags))
        if code:
            raise SwitchError(f"the switch's {name} cannot be read: {os.strerror(-code)}")

    def _keys(self, name: str, kind: type[_SenderKey] | type[_ReceiverKey]) -> Iterator[_SenderKey | _ReceiverKey]:
        key, following = None, kind()
        while not libbpf().bpf_map_get_next_key(self._files[name], key and byref(key), byref(following)):
            key = kind.from_buffer_copy(following)
            yield key


class Loaded:
    """Holds a program in the kernel that is on no port yet; gone with `close` unless one has it.

    Attributes:
        maps: what it knows.
        entering: descriptor of the program that runs on ports.
        leaving: of the one that runs on what leaves.
    """

    def __init__(self, rule: Rule, path: Path) -> None:
        library = libbpf()
        self._object = library.bpf_object__open_file(str(path).encode(), None)
        if not self._object:
            raise SwitchError(f"libbpf cannot read {path}; delete it, and it is compiled again")
        code = library.bpf_object__load(self._object)
        if code:
            library.bpf_object__close(self._object)
            raise SwitchError(
                f"the kernel refuses the switch: {os.strerror(-code)}. It needs Linux 5.15 or newer, root, and BPF; "
                "`evenkeel switch run` needs none of them"
            )
        self.entering = self._program(b"ek_switch")
        self.leaving = self._program(b"ek_leave")
        found = {
            name: library.bpf_object__find_map_fd_by_name(self._object, name.encode()) for name in (*_MAPS, "clock")
        }
        self.maps = Maps(rule, {name: os.dup(file) for name, file in found.items() if file >= 0})

    def run(self, frame: bytes, repeat: int = 1) -> TrialRun:
        """Runs the program on a frame, without any network.

        Raises:
            SwitchError: the kernel refuses.
        """
        out = ctypes.create_string_buffer(4096)
        given = ctypes.create_string_buffer(frame, len(frame))
        options = _RunOptions(
            size=sizeof(_RunOptions),
            data_in=ctypes.cast(given, c_void_p),
            data_out=ctypes.cast(out, c_void_p),
            data_size_in=len(frame),
            data_size_out=len(out),
            repeat=repeat,
        )
        code = libbpf().bpf_prog_test_run_opts(self.entering, byref(options))
        if code:
            raise SwitchError(f"the kernel does not run the switch for a test: {os.strerror(-code)}")
        return TrialRun(options.answer, out.raw[: options.data_size_out], options.duration_ns)

    def map_ids(self) -> dict[str, int]:
        """Gives the numbers by which other processes find the maps."""
        return {name: _map_id(file) for name, file in self.maps._files.items()}

    def close(self) -> None:
        """Lets go of it."""
        self.maps.close()
        libbpf().bpf_object__close(self._object)

    def _program(self, name: bytes) -> int:
        program = libbpf().bpf_object__find_program_by_name(self._object, name)
        return int(libbpf().bpf_program__fd(c_void_p(program)))


def load_program(rule: Rule, udp: int, *, test_clock: bool = False, adds_again: bool = False) -> Loaded:
    """Compiles the switch for a rule and loads it.

    Args:
        rule: its settings.
        udp: port of the servers, by which the switch knows its packets.
        test_clock: the time is what `Maps.set_clock` says.
        adds_again: what comes twice is added twice, which is wrong, but can be timed.

    Raises:
        ConfigurationError: no root, no clang, no libbpf, or a rule that the kernel's switch does not have.
        SwitchError: the kernel refuses.
    """
    require_kernel()
    if rule.policy not in _POLICIES:
        names = ", ".join(policy.text for policy in _POLICIES)
        raise ConfigurationError(f"policy: in the kernel it must be one of {names}, found {rule.policy.text}")
    if rule.ways & (rule.ways - 1):
        raise ConfigurationError(f"ways: must be a power of two in the kernel, found {rule.ways}")
    settings = {
        "WORDS": rule.words,
        "POLICY": int(rule.policy),
        "SETS": rule.sets,
        "WAYS": rule.ways,
        "REGIONS": rule.regions,
        "TOMBS": rule.tombs,
        "STALE_NS": f"{rule.stale_ns}ull",
        "TOMB_NS": f"{rule.tomb_ns}ull",
        "PORT": udp,
    }
    defines = [f"EK_{name}={value}" for name, value in settings.items()]
    defines += ["EK_TEST_CLOCK=1"] * test_clock + ["EK_ADDS_AGAIN=1"] * adds_again
    return Loaded(rule, bpf_object("switch", tuple(defines)))


def attach(interface: int, program: int, *, native: bool) -> None:
    """Puts a program on an interface of this network namespace that has none.

    Raises:
        ConfigurationError: there is a program already.
        SwitchError: the kernel refuses.
    """
    only_if_none, mode = 1, 4 if native else 2
    code = libbpf().bpf_xdp_attach(interface, program, only_if_none | mode, None)
    if code in (-errno.EBUSY, -errno.EEXIST):
        raise ConfigurationError(
            f"interface {interface} has an XDP program already, perhaps another switch's: take that away first"
        )
    if code:
        raise SwitchError(
            f"interface {interface} takes no XDP program in {'native' if native else 'generic'} mode: "
            f"{os.strerror(-code)}. In native mode a veth port needs an MTU of at most 3498; try --mode generic"
        )


def detach(interface: int) -> None:
    """Takes an interface's program away, in whatever mode; none is no error."""
    for mode in (4, 2):
        libbpf().bpf_xdp_detach(interface, mode, None)


def open_map(number: int) -> int:
    """Opens a map by its number and gives a descriptor.

    Raises:
        SwitchError: it is gone.
    """
    file = libbpf().bpf_map_get_fd_by_id(number)
    if file < 0:
        raise SwitchError("the switch is gone from the kernel; run: evenkeel switch down, then up")
    return int(file)


def require_kernel() -> None:
    """Refuses where no switch can be put into the kernel, and says what is missing.

    Raises:
        ConfigurationError: not Linux, not root, or libbpf is missing.
    """
    instead = "; `evenkeel switch run` is the same switch in user space and needs none of this"
    if os.uname().sysname != "Linux":
        raise ConfigurationError(f"a switch in the kernel needs Linux's XDP; this is {os.uname().sysname}{instead}")
    if os.geteuid() != 0:
        raise ConfigurationError(f"a switch in the kernel needs root; run it with sudo{instead}")
    try:
        libbpf()
    except ConfigurationError as error:
        raise ConfigurationError(f"{error}{instead}") from error


@cache
def libbpf() -> ctypes.CDLL:
    """Gives the library.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise ConfigurationError("libbpf is missing; run: apt-get install libbpf1") from error
    library.bpf_object__open_file.restype = c_void_p
    library.bpf_object__open_file.argtypes = (c_char_p, c_void_p)
    library.bpf_object__load.argtypes = (c_void_p,)
    library.bpf_object__close.argtypes = (c_void_p,)
    library.bpf_object__find_program_by_name.restype = c_void_p
    library.bpf_object__find_program_by_name.argtypes = (c_void_p, c_char_p)
    library.bpf_program__fd.argtypes = (c_void_p,)
    library.bpf_object__find_map_fd_by_name.argtypes = (c_void_p, c_char_p)
    library.bpf_xdp_attach.argtypes = (c_int, c_int, c_uint32, c_void_p)
    library.bpf_xdp_detach.argtypes = (c_int, c_uint32, c_void_p)
    library.libbpf_set_print(None)  # what goes wrong is said by our errors
    return library


def _map_id(file: int) -> int:
    for line in Path(f"/proc/self/fdinfo/{file}").read_text().splitlines():
        if line.startswith("map_id:"):
            return int(line.split()[1])
    raise SwitchError("this kernel does not say the numbers of BPF maps")


def _ipv4(address: str) -> int:
    """Gives an address as the number that its bytes in a packet are, on a little-endian machine."""
    return int.from_bytes(ipaddress.IPv4Address(address).packed, "little")


def _network16(number: int) -> int:
    return int.from_bytes(number.to_bytes(2, "big"), "little")


def _pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
