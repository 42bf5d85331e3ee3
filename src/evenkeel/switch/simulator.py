"""Simulates training jobs that share a switch's memory, packet by packet: the face of `native/simulator.c`.

The switches of the simulator apply the C rule that the real ones run. Hosts, links and servers are modelled: links are
first-in-first-out, workers keep a window of fragments open, servers complete what a switch could not. Time is a whole
number of picoseconds and ties have an order, so the same arguments give the same figures on every machine.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np

from evenkeel.arrays import FloatArray
from evenkeel.errors import ConfigurationError, EvenkeelError
from evenkeel.switch.aggregator import Rule, SlotPolicy
from evenkeel.switch.build import load
from evenkeel.switch.packet import MAX_JOBS
from evenkeel.switch.priority import Urgency, priority

__all__ = [
    "POLICIES",
    "LayerLoad",
    "NodeRestart",
    "SimulatedNetwork",
    "SimulatedRun",
    "TrainingJob",
    "simulate",
    "window_of",
]

# What each policy is called in tables, and which rule of the switch it is; None: the switch adds nothing.
POLICIES: dict[str, SlotPolicy | None] = {
    "unlimited": SlotPolicy.UNLIMITED,
    "ps": None,
    "ring": None,
    "switchml": SlotPolicy.SWITCHML,
    "atp": SlotPolicy.ATP,
    "atp-free": SlotPolicy.ATP_FREE,
    "esa-preempt": SlotPolicy.ESA,  # all fragments are equally urgent
    "esa": SlotPolicy.ESA,
    "assoc": SlotPolicy.ASSOC,
}
_NO_RULE = {"ps": 100, "ring": 101}
_PS = 1e12  # picoseconds in a second
_CHANCE = 2**32
_HEADER_BYTES = 64  # of a packet without gradients
_MAX_EVENTS = 20_000_000_000


@dataclass(frozen=True, slots=True)
class LayerLoad:
    """Holds what one layer sends and computes in a step."""

    gradient_bytes: int
    forward_s: float
    backward_s: float


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """Holds a job: workers that do the same steps and add their gradients layer by layer.

    Attributes:
        arrival_s: when it begins.
        layers: from the input to the output.
        factors: `[steps, workers]`, by which each worker's computing is slower in each step.
    """

    arrival_s: float
    layers: tuple[LayerLoad, ...]
    factors: FloatArray

    @property
    def workers(self) -> int:
        """Counts the workers."""
        return int(self.factors.shape[1])

    @property
    def steps(self) -> int:
        """Counts the steps."""
        return int(self.factors.shape[0])


@dataclass(frozen=True, slots=True)
class SimulatedNetwork:
    """Holds what lies between workers and servers.

    Attributes:
        rate_bps: of every link.
        fragment_bytes: that travel together. Less: the same figures, from more events.
        worker_delay_s: from a worker to its switch, its own software included.
        server_delay_s: from the switch to a server.
        trunk_delay_s: from a rack's switch to the root.
        racks: more than 1 makes a tree: each rack adds what its workers send, the root what the racks send.
        servers: 0: as many as there are jobs, each with one. More than there are jobs: fragments take turns.
        window_round_trips: how much each worker has on its way, in round trips to the server.
        loss: chance that a packet is lost on a link.
        duplicate: chance that it comes twice.
        reorder: chance that it is held up by half a round trip.
    """

    rate_bps: float = 100e9
    fragment_bytes: int = 4096
    worker_delay_s: float = 5e-6
    server_delay_s: float = 5e-6
    trunk_delay_s: float = 1e-6
    racks: int = 1
    servers: int = 0
    window_round_trips: float = 1.5
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0

    def __post_init__(self) -> None:
        for name in ("loss", "duplicate", "reorder"):
            if not 0 <= getattr(self, name) <= 0.5:
                raise ConfigurationError(f"{name}: must be from 0 to 0.5, found {getattr(self, name)}")
        if self.rate_bps <= 0 or self.fragment_bytes < _HEADER_BYTES or self.racks < 1 or self.servers < 0:
            raise ConfigurationError("a network has a rate, fragments of 64 bytes or more, and at least one rack")

    @property
    def round_trip_s(self) -> float:
        """Gives the time from a worker to its server and back, without queues."""
        trunk = self.trunk_delay_s if self.racks > 1 else 0.0
        return 2 * (self.worker_delay_s + self.server_delay_s + trunk)

    @property
    def fragment_s(self) -> float:
        """Gives how long a link is busy with a fragment."""
        return self.fragment_bytes * 8 / self.rate_bps


@dataclass(frozen=True, slots=True)
class NodeRestart:
    """Restarts a worker, or a server, which forgets what it held; a worker comes back with another gradient.

    Attributes:
        time_s: when it dies.
        down_s: after which it is back.
        job: of the worker; -1: a server.
        number: of the worker in its job, or of the server.
    """

    time_s: float
    down_s: float
    job: int
    number: int


@dataclass(frozen=True, slots=True)
class SimulatedRun:
    """Holds what came of a simulation.

    Attributes:
        times_s: of each job, from its arrival to its end.
        makespan_s: until the last job ended.
        events: that were handled.
        packets: that arrived anywhere.
        fragments: that were added, of all jobs.
        in_switch: of them, those that a switch completed.
        server_bytes: that went to servers.
        evictions: partial sums that lost their slot.
        bypassed: packets that got none.
        slots_useful: share of all slots' time within a round trip after something was added.
        slots_waiting: share of it in which a slot was taken and nothing had come for longer.
        resends: packets that workers sent again.
        reminders: that servers sent.
        lost: packets that were lost.
        wrong: results that were not the sum of every worker's gradient, each once.
    """

    times_s: FloatArray
    makespan_s: float
    events: int
    packets: int
    fragments: int
    in_switch: int
    server_bytes: int
    evictions: int
    bypassed: int
    slots_useful: float
    slots_waiting: float
    resends: int
    reminders: int
    lost: int
    wrong: int


def window_of(network: SimulatedNetwork) -> int:
    """Counts the fragments that a worker has on its way."""
    return max(2, round(network.window_round_trips * network.round_trip_s / network.fragment_s))


def simulate(
    policy: str,
    jobs: Sequence[TrainingJob],
    network: SimulatedNetwork,
    slots: int,
    *,
    ways: int = 8,
    faults: Sequence[NodeRestart] = (),
    seed: int = 0,
) -> SimulatedRun:
    """Runs all jobs to their end.

    Args:
        policy: one of `POLICIES`.
        jobs: that share the switches.
        network: between them.
        slots: of each switch, a power of two; `unlimited` has as many as it needs.
        ways: of the sets of `assoc`.
        faults: what dies, and when.
        seed: of losses.

    Raises:
        ConfigurationError: no such policy, more jobs or workers than bitmaps hold, or a number of slots that is no
            power of two.
        EvenkeelError: a job did not end, or memory did not suffice.
    """
    if policy not in POLICIES:
        raise ConfigurationError(f"policy: must be one of {', '.join(POLICIES)}, found {policy!r}")
    if not 1 <= len(jobs) <= MAX_JOBS:
        raise ConfigurationError(f"jobs: must be 1 to {MAX_JOBS}, found {len(jobs)}")
    if any(not 1 <= job.workers <= 32 or not job.steps or not job.layers for job in jobs):
        raise ConfigurationError("a job needs a step, a layer and 1 to 32 workers")
    if slots < 1 or slots & (slots - 1):
        raise ConfigurationError(f"slots: must be a power of two, found {slots}")
    for fault in faults:
        known = len(jobs) if fault.job >= 0 else 1
        numbers = jobs[fault.job].workers if 0 <= fault.job < len(jobs) else network.servers or len(jobs)
        if not (-1 <= fault.job < known and 0 <= fault.number < numbers):
            raise ConfigurationError(f"fault: there is no worker or server {fault.number} of job {fault.job}")
    window = window_of(network)
    settings = _settings(policy, len(jobs), network, slots, ways, window)
    if policy == "switchml":  # its slots are cut among the jobs, and twice as many as fragments on their way
        window = max(1, min(window, slots // settings.regions // 2))
    settings.seed, settings.faults = seed, len(faults)
    tables = _JobTables(jobs, network, window, urgent=policy != "esa-preempt")
    native_faults = (_CFault * max(1, len(faults)))(
        *(_CFault(round(each.time_s * _PS), round(each.down_s * _PS), each.job, each.number) for each in faults)
    )
    totals, ends = _CTotals(), np.zeros(len(jobs), np.int64)
    code = _library().evk_simulate(
        byref(settings), tables.jobs, tables.layers, _address(tables.factors), _address(tables.priorities),
        _address(tables.layer_of), _address(tables.rack_of), native_faults, byref(totals), _address(ends),
    )  # fmt: skip
    if code == 1:
        raise EvenkeelError(
            "the simulation needs more memory than there is; simulate fewer workers or larger fragments"
        )
    if totals.unfinished:
        raise EvenkeelError(f"{totals.unfinished} of {len(jobs)} simulated jobs did not end under {policy}")
    switches = network.racks + 1 if network.racks > 1 else 1
    slot_time = max(1, settings.slots * switches * totals.makespan_ps)
    return SimulatedRun(
        times_s=ends / _PS - np.array([job.arrival_s for job in jobs]),
        makespan_s=totals.makespan_ps / _PS,
        events=totals.events,
        packets=totals.packets,
        fragments=totals.fragments,
        in_switch=totals.in_switch,
        server_bytes=totals.server_packets * network.fragment_bytes,
        evictions=totals.evictions,
        bypassed=totals.bypassed,
        slots_useful=totals.useful_ps / slot_time,
        slots_waiting=totals.waiting_ps / slot_time,
        resends=totals.resends,
        reminders=totals.reminders,
        lost=totals.lost,
        wrong=totals.wrong,
    )


def _settings(policy: str, jobs: int, network: SimulatedNetwork, slots: int, ways: int, window: int) -> "_CSettings":
    regions = 1 << (jobs - 1).bit_length()
    rule = POLICIES[policy]
    if rule == SlotPolicy.UNLIMITED:
        slots = regions * (1 << (4 * window + 16 - 1).bit_length())
    if rule == SlotPolicy.SWITCHML:
        slots = max(slots, 2 * regions)
    made = Rule.of(SlotPolicy.ATP if rule is None else rule, slots)
    ways = min(ways, slots) if rule == SlotPolicy.ASSOC else 1
    fragment_ps = round(network.fragment_s * _PS)
    round_trip_ps = round(network.round_trip_s * _PS)
    return _CSettings(
        policy=_NO_RULE.get(policy, made.policy), slots=slots, ways=ways, tombs=made.tombs,
        regions=regions if rule in (SlotPolicy.UNLIMITED, SlotPolicy.SWITCHML) else 1,
        stale_ns=made.stale_ns, tomb_ns=made.tomb_ns,
        packet_ps=fragment_ps, trunk_ps=fragment_ps, server_ps=fragment_ps,
        control_ps=fragment_ps * _HEADER_BYTES // network.fragment_bytes,
        worker_delay_ps=round(network.worker_delay_s * _PS), trunk_delay_ps=round(network.trunk_delay_s * _PS),
        server_delay_ps=round(network.server_delay_s * _PS), racks=network.racks, servers=network.servers or jobs,
        remind_ps=2 * round_trip_ps, timeout_ps=8 * round_trip_ps,
        overtaken_ps=3 * round_trip_ps // 2, useful_ps=2 * round(network.worker_delay_s * _PS),
        loss=round(network.loss * _CHANCE), duplicate=round(network.duplicate * _CHANCE),
        reorder=round(network.reorder * _CHANCE), reorder_ps=round_trip_ps // 2,
        max_events=_MAX_EVENTS, jobs=jobs,
    )  # fmt: skip


class _JobTables:
    """Lays the jobs out in arrays, as the C part reads them."""

    def __init__(self, jobs: Sequence[TrainingJob], network: SimulatedNetwork, window: int, *, urgent: bool) -> None:
        native_jobs: list[_CJob] = []
        native_layers: list[_CLayer] = []
        factors, priorities, layer_of = [], [], []
        workers = factors_before = priorities_before = places_before = 0
        for number, job in enumerate(jobs):
            counts = [max(1, round(layer.gradient_bytes / network.fragment_bytes)) for layer in job.layers]
            native_jobs.append(
                _CJob(
                    round(job.arrival_s * _PS), job.workers, job.steps, len(job.layers), len(native_layers),
                    sum(counts),
                    window, workers, number, factors_before, priorities_before, places_before,
                )
            )  # fmt: skip
            native_layers += [
                _CLayer(round(layer.forward_s * _PS), round(layer.backward_s * _PS), count)
                for layer, count in zip(job.layers, counts, strict=True)
            ]
            factors.append(np.ascontiguousarray(job.factors, np.float32).reshape(-1))
            # Gradients come from the last layer to the first.
            layer_of.append(np.repeat(np.arange(len(counts))[::-1], counts[::-1]).astype(np.uint8))
            sending_s = sum(counts) * network.fragment_s
            computing_s = sum(layer.forward_s + layer.backward_s for layer in job.layers)
            step_s = sending_s + computing_s
            priorities.append(
                np.array(
                    [
                        priority(Urgency((job.steps - step) * step_s, sending_s, computing_s), layer + 1, 1.0)
                        if urgent
                        else 128
                        for step in range(job.steps)
                        for layer in range(len(counts))
                    ],
                    np.uint8,
                )
            )
            workers += job.workers
            factors_before += job.steps * job.workers
            priorities_before += job.steps * len(counts)
            places_before += sum(counts)
        self.jobs = (_CJob * len(native_jobs))(*native_jobs)
        self.layers = (_CLayer * len(native_layers))(*native_layers)
        self.factors, self.priorities = np.concatenate(factors), np.concatenate(priorities)
        self.layer_of = np.concatenate(layer_of)
        self.rack_of = (np.arange(workers) % network.racks).astype(np.int32)


def _integers(names: str) -> list[tuple[str, Any]]:
    return [(name, c_int64) for name in names.split()]


class _CSettings(Structure):
    _fields_ = _integers(
        "policy slots ways tombs regions stale_ns tomb_ns packet_ps trunk_ps server_ps control_ps worker_delay_ps "
        "trunk_delay_ps server_delay_ps racks servers remind_ps timeout_ps overtaken_ps useful_ps loss duplicate "
        "reorder reorder_ps seed max_events jobs faults"
    )


class _CJob(Structure):
    _fields_ = (
        ("arrival_ps", c_int64),
        *(
            (name, c_int32)
            for name in ["workers", "steps", "layers", "first_layer", "fragments", "window", "first_worker", "server"]
        ),
        *_integers("first_factor first_priority first_place"),
    )


class _CLayer(Structure):
    _fields_ = _integers("forward_ps backward_ps fragments")


class _CFault(Structure):
    _fields_ = (("time_ps", c_int64), ("down_ps", c_int64), ("job", c_int32), ("number", c_int32))


class _CTotals(Structure):
    _fields_ = _integers(
        "events packets fragments in_switch server_packets evictions bypassed useful_ps waiting_ps makespan_ps resends "
        "reminders nacks lost duplicates stale wrong unfinished"
    )


def _library() -> ctypes.CDLL:
    library = load("simulator")
    library.evk_simulate.argtypes = (
        POINTER(_CSettings), POINTER(_CJob), POINTER(_CLayer), c_void_p, c_void_p, c_void_p, c_void_p, POINTER(_CFault),
        POINTER(_CTotals), c_void_p,
    )  # fmt: skip
    library.evk_simulate.restype = ctypes.c_int
    return library


def _address(array: "np.ndarray[Any, Any]") -> int:
    return array.ctypes.data
