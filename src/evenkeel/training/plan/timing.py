"""Predicts a training step's time from formulas: every code, every schedule, and the break-even rate.

The alpha-beta model: a message of `n` bytes takes `alpha + n beta`, adding it takes `n gamma`, and a collective costs
another `S` for its workers to meet. With `p` workers, `L` segments (DDP's buckets), and each worker's contribution of
`up` bytes, of which everybody gets the sum in `down` bytes:

    ring, or sharded     l_comm  = 2(p-1) alpha + (p-1)/p (up + down) beta + (p-1)/p added gamma + S
    one server           l_comm  = 2 alpha + p (up + down) beta + (p-1) added gamma + S
    synchronous          T = l_up + l_for + l_back + l_enc + l_comm + l_dec
    layer-wise           T = l_up + l_for + max(l_b/L + L c, l_b + c) + l_dec
    pipelined            T = max(l_up + l_for + l_back, L c) + l_enc + l_dec
                         with l_b = l_back + l_enc, and c the l_comm of one segment

The ring of fp32 numbers has up = down = 4 bytes a parameter, the textbook 2(p-1)/p n beta. Layer-wise is plain DDP: a
segment's sum travels while the segments before it in the model are still computed. Decoding is counted in full, as if
nothing hid it. Pipe-SGD (NeurIPS 2018) sends its pipelined sum in one piece (L = 1); our hook sends it bucket by
bucket, so that a code keeps its shapes, and pays for L meetings. It codes in the thread that communicates, on a core
that the computation wants too, so coding is hidden behind neither.

To both a code adds what its exchanges were measured to take beyond that, if they were: ranks wait for each other's
coding, and direct messages do not go at a ring's rate.

What this leaves out: encoding that slows the backward pass down by more than its own time, segments of unequal size,
and links that are not all alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from evenkeel.errors import ConfigurationError

__all__ = [
    "SCHEDULES",
    "CodeCost",
    "NetworkLink",
    "Prediction",
    "Schedule",
    "Step",
    "comm_s",
    "ddp_segments",
    "fp32",
    "predict",
    "require_time",
    "server_comm_s",
    "step_s",
]

Schedule = Literal["parameter server", "synchronous", "layer-wise", "pipelined"]
SCHEDULES: tuple[Schedule, ...] = ("parameter server", "synchronous", "layer-wise", "pipelined")

_BASELINE: tuple[str, Schedule] = ("fp32", "layer-wise")
_FIRST_BUCKET_BYTES = 2**20  # DDP's own, so that communication begins early
_BUCKET_BYTES = 25 * 2**20
_SLOWEST_BPS, _FASTEST_BPS = 1e3, 1e15  # between which a break-even rate is looked for


@dataclass(frozen=True)
class NetworkLink:
    """Describes what the network and the adding cost; each field slows communication down."""

    alpha_s: float  # latency of one message
    beta_s_per_byte: float  # one over the bandwidth of a worker's link, each way
    gamma_s_per_byte: float = 0.0  # adding what came to what is there
    sync_s: float = 0.0  # S: what a collective costs beyond its messages

    def __post_init__(self) -> None:
        for name in ("alpha_s", "beta_s_per_byte", "gamma_s_per_byte", "sync_s"):
            require_time(name, getattr(self, name))

    @property
    def rate_bps(self) -> float:
        """Gives bits a second, one way; infinite where a byte costs nothing."""
        return 8 / self.beta_s_per_byte if self.beta_s_per_byte else math.inf


@dataclass(frozen=True)
class Step:
    """Describes one worker's own work in a step, and how many numbers it has to share."""

    forward_s: float  # l_for
    backward_s: float  # l_back
    parameters: int
    update_s: float = 0.0  # l_up: the optimiser's
    segments: int = 1  # L: more hide more of the communication, and cost more meetings

    def __post_init__(self) -> None:
        for name in ("forward_s", "backward_s", "update_s"):
            require_time(name, getattr(self, name))
        if self.parameters < 1:
            raise ConfigurationError(f"parameters: must be 1 or more, found {self.parameters}")
        if self.segments < 1:
            raise ConfigurationError(f"segments: must be 1 or more, found {self.segments}")

    @property
    def compute_s(self) -> float:
        """Gives the step with a network that costs nothing: no code and no schedule can be faster."""
        return self.update_s + self.forward_s + self.backward_s


@dataclass(frozen=True)
class CodeCost:
    """Describes what a whole gradient costs with a code."""

    name: str
    up_bytes: float  # each worker's contribution
    down_bytes: float  # the sum as everybody gets it
    added_bytes: float  # a contribution as it is added
    encode_s: float = 0.0  # l_enc
    decode_s: float = 0.0  # l_dec
    collectives: int = 1  # one after another for each segment, such as norms before the numbers they scale
    excess_s: float = 0.0  # that exchanges take beyond the formula, as measured
    harm: int = 0  # how far from plain fp32: the less, the better where times are alike
    pipelines: bool = True  # whether PipeSGD can carry it; not the hooks that torch brings

    def sent_bytes(self, workers: int) -> float:
        """Counts the bytes that one worker sends in a step, by ring or sharded."""
        return (workers - 1) / workers * (self.up_bytes + self.down_bytes)


@dataclass(frozen=True)
class Prediction:
    """Holds what was predicted for one code under one schedule."""

    code: str
    schedule: Schedule
    step_s: float
    comm_s: float  # of all segments, hidden or not
    encode_s: float
    decode_s: float
    sent_bytes: float  # by one worker in a step
    wait_s: float  # of the step, beyond the worker's own work: what the network and the code add
    speedup: float  # over plain DDP: fp32, layer-wise
    break_even_bps: float  # slower links than this gain; infinite: all do, 0: none does
    harm: int
    available: bool  # whether DDP can do it, by itself or with a hook; the others are for comparison

    @property
    def is_plain(self) -> bool:
        """True for what DDP does by itself."""
        return (self.code, self.schedule) == _BASELINE


def fp32(parameters: int) -> CodeCost:
    """Estimates plain numbers."""
    size = 4.0 * parameters
    return CodeCost("fp32", size, size, size)


def ddp_segments(parameters: int) -> int:
    """Counts the buckets that DDP makes of fp32 gradients: a small first one, then 25 MiB each."""
    size = 4 * parameters
    return 1 if size <= _FIRST_BUCKET_BYTES else 1 + math.ceil((size - _FIRST_BUCKET_BYTES) / _BUCKET_BYTES)


def comm_s(link: NetworkLink, workers: int, cost: CodeCost, segments: int = 1) -> float:
    """Gives seconds of a gradient's communication by ring or sharded, in `segments` pieces one after another."""
    meetings = segments * cost.collectives * (2 * (workers - 1) * link.alpha_s + link.sync_s)
    share = (workers - 1) / workers
    added_s = share * cost.added_bytes * link.gamma_s_per_byte
    return meetings + cost.sent_bytes(workers) * link.beta_s_per_byte + added_s + cost.excess_s


def server_comm_s(link: NetworkLink, workers: int, cost: CodeCost) -> float:
    """Gives seconds of a gradient's communication through one server, whose link carries what all workers send."""
    meetings = cost.collectives * (2 * link.alpha_s + link.sync_s)
    carried = workers * (cost.up_bytes + cost.down_bytes)
    added_s = (workers - 1) * cost.added_bytes * link.gamma_s_per_byte
    return meetings + carried * link.beta_s_per_byte + added_s + cost.excess_s


def step_s(link: NetworkLink, workers: int, step: Step, cost: CodeCost, schedule: Schedule) -> float:
    """Gives seconds of one step; the formulas stand in the module's text."""
    compute_s = step.compute_s + cost.encode_s + cost.decode_s
    if schedule == "parameter server":
        return compute_s + server_comm_s(link, workers, cost)
    if schedule == "synchronous":
        return compute_s + comm_s(link, workers, cost)
    whole_s = comm_s(link, workers, cost, step.segments)
    if schedule == "pipelined":
        return max(step.compute_s, whole_s) + cost.encode_s + cost.decode_s
    last_s = whole_s / step.segments
    busy_s = step.backward_s + cost.encode_s
    tail_s = max(busy_s / step.segments + whole_s, busy_s + last_s)
    return step.update_s + step.forward_s + tail_s + cost.decode_s


def predict(
    link: NetworkLink,
    workers: int,
    step: Step,
    codes: Sequence[CodeCost],
) -> list[Prediction]:
    """Predicts every code under every schedule, each beside plain DDP.

    Args:
        link: what the network costs.
        workers: 2 or more.
        step: one worker's own work.
        codes: plain fp32 is the measure of all others, and added in front where it is missing.

    Raises:
        ConfigurationError: fewer than two workers.
    """
    if workers < 2:
        raise ConfigurationError(f"workers: must be 2 or more, found {workers}; one alone has nothing to send")
    plain = fp32(step.parameters)
    if all(code.name != plain.name for code in codes):
        codes = [plain, *codes]
    plain_s = step_s(link, workers, step, plain, _BASELINE[1])
    return [
        _prediction(link, workers, step, code, schedule, plain, plain_s) for code in codes for schedule in SCHEDULES
    ]


def _prediction(
    link: NetworkLink, workers: int, step: Step, cost: CodeCost, schedule: Schedule, plain: CodeCost, plain_s: float
) -> Prediction:
    seconds = step_s(link, workers, step, cost, schedule)
    segments = step.segments if schedule in ("layer-wise", "pipelined") else 1
    by_server = schedule == "parameter server"
    return Prediction(
        code=cost.name,
        schedule=schedule,
        step_s=seconds,
        comm_s=server_comm_s(link, workers, cost) if by_server else comm_s(link, workers, cost, segments),
        encode_s=cost.encode_s,
        decode_s=cost.decode_s,
        sent_bytes=cost.up_bytes if by_server else cost.sent_bytes(workers),
        wait_s=seconds - step.compute_s,
        speedup=plain_s / seconds if seconds else 1.0,
        break_even_bps=_break_even_of_schedule(link, workers, step, cost, schedule, plain),
        # A stale gradient is worse than rounding to bf16, better than a second lossy step.
        harm=2 * cost.harm + (3 if schedule == "pipelined" else 0),
        available=schedule == "layer-wise" or (schedule == "pipelined" and cost.pipelines),
    )


def _break_even_of_schedule(
    link: NetworkLink, workers: int, step: Step, cost: CodeCost, schedule: Schedule, plain: CodeCost
) -> float:
    """Finds the rate up to which this is at least as fast as plain DDP at every slower rate too."""

    def gains(rate_bps: float) -> bool:
        there = replace(link, beta_s_per_byte=8 / rate_bps)
        plain_s = step_s(there, workers, step, plain, _BASELINE[1])
        # Equal times are no loss, however they were rounded.
        return step_s(there, workers, step, cost, schedule) <= plain_s * (1 + 1e-12)

    decades = math.log10(_FASTEST_BPS / _SLOWEST_BPS)
    rates = [_SLOWEST_BPS * 10 ** (decades * place / 240) for place in range(241)]
    loses = next((place for place, rate in enumerate(rates) if not gains(rate)), None)
    if loses is None:
        return math.inf
    if loses == 0:
        return 0.0
    low, high = rates[loses - 1], rates[loses]
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if gains(middle) else (low, middle)
    return low


def require_time(name: str, value: float) -> None:
    """Refuses a time that is none."""
    if not 0 <= value < math.inf:
        raise ConfigurationError(f"{name}: must be a finite time of 0 or more, found {value:g}")
