"""Makes training jobs for the simulator: what models send and compute, how uneven workers are, when jobs begin."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from evenkeel.arrays import FloatArray
from evenkeel.errors import ConfigurationError, MissingExtraError
from evenkeel.files import read_arrays
from evenkeel.switch.simulator import LayerLoad, TrainingJob
from evenkeel.text_values import read_number, unknown

__all__ = ["MIXES", "MODELS", "Workload", "make_jobs", "recorded_spread"]

# Gradients in MB of float32, and milliseconds of a forward and a backward pass on an A100. Source: the profiles of
# SwitchML's simulator (ChenYuHo/SwitchML-omnetpp, ModelStats.cc), A100 at the batch size of the V100 columns.
MODELS = MappingProxyType(
    {
        "alexnet": (244, 80, 58),
        "bert-large": (1341, 22, 107),
        "googlenet": (26, 42, 96),
        "inception3": (95, 82, 173),
        "resnet50": (102, 48, 101),
        "resnet101": (178, 47, 93),
        "resnet152": (241, 64, 130),
        "vgg11": (531, 37, 58),
        "vgg16": (553, 68, 135),
        "vgg19": (575, 82, 165),
    }
)
# The share of each of eight groups of layers in the gradients. VGG's and AlexNet's lie in the first dense layer.
_EVEN = (0.125,) * 8
_DENSE = (0.005, 0.015, 0.03, 0.06, 0.06, 0.7, 0.1, 0.03)
MIXES = ("mixed", "equal", "models")
_LAYERS = 8
# Coefficients of variation of a step's time over the workers of real jobs, by percentile (Alibaba's PAI trace, 2020).
_PAI_PLACES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
_PAI_SPREADS = (0.01, 0.024, 0.051, 0.093, 0.55, 1.07, 1.43, 3.0, 3.0)
# Submissions of the Philly trace (2017): jobs' lengths are about lognormal.
_PHILLY_SIGMA = 1.78

SpreadLaw = Callable[[FloatArray], FloatArray]


@dataclass(frozen=True, slots=True)
class Workload:
    """Says what jobs there are.

    Attributes:
        jobs: how many.
        workers: of each.
        mix: `mixed`: every other job sends twice as long as it computes, the others half as long, with 0.5 to 2 times
            `megabytes`; `equal`: all send twice as long, the same; `models`: those of `MODELS` in turn, shrunk.
        skew: coefficient of variation of a worker's computing time; `pai`: drawn for each job as in that trace.
        arrivals: `together`: within the first step; `poisson`: one after the other, with lengths as in Philly.
        steps: of each job, or their median under `poisson`.
        megabytes: of gradients in a step.
        rate_bps: of the links, at which sending times are meant for `mixed` and `equal`.
        shrink: by which models' gradients and times are divided, which leaves their ratio.
        seed: of all that is drawn.
    """

    jobs: int = 8
    workers: int = 8
    mix: str = "mixed"
    skew: str = "0.1"
    arrivals: str = "together"
    steps: int = 6
    megabytes: float = 16.0
    rate_bps: float = 100e9
    shrink: float = 16.0
    seed: int = 1


def make_jobs(workload: Workload, spread: SpreadLaw | None = None, trace: Path | None = None) -> list[TrainingJob]:
    """Makes the jobs of a workload.

    Args:
        workload: which.
        spread: gives a coefficient of variation for numbers drawn from 0 to 1; None: what `skew` says.
        trace: Parquet file with `timestamp` and `duration` of jobs; their gaps and lengths then are used, scaled to the
            workload's.

    Raises:
        ConfigurationError: a mix, skew or kind of arrivals that is not known, or a trace that cannot be read.
    """
    if workload.mix not in MIXES:
        raise unknown("mix", workload.mix, list(MIXES))
    if workload.arrivals not in ("together", "poisson"):
        raise unknown("arrivals", workload.arrivals, ["together", "poisson"])
    if min(workload.jobs, workload.workers, workload.steps) < 1 or workload.megabytes <= 0:
        raise ConfigurationError("a workload has at least one job, worker and step, and sends something")
    draw = np.random.default_rng(workload.seed)
    spread = spread or _spread_of(workload.skew)
    layers = [_layers_of(workload, job, draw) for job in range(workload.jobs)]
    step_s = [_step_s(each, workload.rate_bps) for each in layers]
    if trace is None and workload.arrivals == "together":
        arrivals = [0.0 if workload.mix == "equal" else float(draw.uniform()) * length for length in step_s]
        steps = [workload.steps] * workload.jobs
    else:
        if trace is not None:
            gaps, lengths = _recorded(trace, workload.jobs, draw)
        else:
            gaps = draw.exponential(size=workload.jobs)
            lengths = np.exp(_PHILLY_SIGMA * draw.standard_normal(workload.jobs))
        # So close that half of the jobs run at a time; lengths within a factor of four, or the longest is all there is.
        steps = [max(1, round(workload.steps * float(np.clip(each, 0.25, 4)))) for each in lengths]
        mean_s = float(np.mean([count * length for count, length in zip(steps, step_s, strict=True)]))
        arrivals = list(np.cumsum(gaps) * mean_s / max(1.0, workload.jobs / 2))
    made = []
    for job in range(workload.jobs):
        sigma = np.sqrt(np.log1p(float(spread(draw.uniform(size=1))[0]) ** 2))
        normal = draw.standard_normal((steps[job], workload.workers))
        made.append(TrainingJob(arrivals[job], layers[job], np.exp(sigma * normal - sigma**2 / 2)))
    return made


def recorded_spread(path: Path) -> SpreadLaw:
    """Reads coefficients of variation from an npz file's array `cov`; they are then drawn by their percentiles.

    Raises:
        ConfigurationError: the file cannot be read, or holds none.
    """
    try:
        values = np.asarray(read_arrays(path)["cov"], np.float64)
    except (OSError, KeyError, ValueError) as error:
        raise ConfigurationError(f"skew: {path} has no readable array 'cov': {error}") from error
    values = np.sort(values[np.isfinite(values) & (values >= 0)])
    if not values.size:
        raise ConfigurationError(f"skew: {path} holds no coefficients of variation")
    return lambda drawn: np.quantile(values, drawn)


def _spread_of(text: str) -> SpreadLaw:
    if text == "pai":
        return lambda drawn: np.exp(np.interp(drawn, _PAI_PLACES, np.log(_PAI_SPREADS)))
    value = read_number(text, "skew")
    if not 0 <= value <= 5:
        raise ConfigurationError(f"skew: must be from 0 to 5, or pai, found {text}")
    return lambda drawn: np.full(drawn.shape, value)


def _layers_of(workload: Workload, job: int, draw: np.random.Generator) -> tuple[LayerLoad, ...]:
    shares = _EVEN
    if workload.mix == "models":
        name = list(MODELS)[job % len(MODELS)]
        megabytes, forward_ms, backward_ms = MODELS[name]
        sent = megabytes * 1e6 / workload.shrink
        forward_s, backward_s = forward_ms / 1e3 / workload.shrink, backward_ms / 1e3 / workload.shrink
        shares = _DENSE if name.startswith(("vgg", "alexnet")) else _EVEN
    else:
        equal = workload.mix == "equal"
        sent = workload.megabytes * 1e6 * (1.0 if equal else 2 ** float(draw.uniform(-1, 1)))
        computing_s = sent * 8 / workload.rate_bps / (2.0 if equal or job % 2 == 0 else 0.5)
        forward_s, backward_s = computing_s / 3, computing_s * 2 / 3
    return tuple(LayerLoad(max(1, round(sent * share)), forward_s / _LAYERS, backward_s / _LAYERS) for share in shares)


def _step_s(layers: tuple[LayerLoad, ...], rate_bps: float) -> float:
    return sum(layer.gradient_bytes * 8 / rate_bps + layer.forward_s + layer.backward_s for layer in layers)


def _recorded(trace: Path, jobs: int, draw: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Gives gaps, of mean 1, and lengths, of median 1, of jobs that followed each other in a trace."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "train") from error
    try:
        table = parquet.read_table(trace, columns=["timestamp", "duration"]).sort_by("timestamp")
    except (OSError, ArrowException) as error:
        raise ConfigurationError(f"arrivals: {trace} has no readable timestamp and duration: {error}") from error
    if len(table) <= jobs:
        raise ConfigurationError(f"arrivals: {trace} holds {len(table)} jobs; {jobs + 1} are needed")
    first = int(draw.integers(len(table) - jobs))
    times = table["timestamp"].to_numpy().astype(np.float64)[first : first + jobs + 1]
    lengths = table["duration"].to_numpy().astype(np.float64)[first : first + jobs]
    gaps = np.diff(times)
    return gaps / max(float(gaps.mean()), 1e-9), lengths / max(float(np.median(lengths)), 1e-9)
