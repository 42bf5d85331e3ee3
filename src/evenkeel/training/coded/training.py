"""Trains a linear model with a coordinator's exact gradients, and goes on where a training was stopped."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from evenkeel.arrays import Array, FloatArray
from evenkeel.errors import ConfigurationError
from evenkeel.files import read_arrays
from evenkeel.training.coded.coordinator import Coordinator, replace_file
from evenkeel.training.coded.gradient_round import Evaluation
from evenkeel.training.coded.losses import PredictorLoss, SquaredError
from evenkeel.training.coded.optimizers import LBFGS, GradientDescent, Optimizer

__all__ = ["CodedModel", "RoundProgress", "TrainingPlan", "train"]

_POWER_ROUNDS = 15
_MARGIN = 1.1  # power iterations come to the largest curvature from below


@dataclass(frozen=True)
class TrainingPlan:
    """Says what is minimized, and how: the mean over the examples of `loss(z, y)`, plus `l2 / 2 * |w|^2`.

    Attributes:
        loss: of an example.
        l2: weight of the squared length of the weights, over all examples; an intercept does not count in it.
        classes: the two labels, the second one counting as 1; None: real numbers.
        solver: `lbfgs` or `gd`.
        rounds: at most.
        tolerance: the training ends when no part of the gradient of the mean is above it.
        learning_rate: of `gd`; None: as long a step as the curvature allows, which takes a few rounds to measure.
        momentum: of `gd`.
        nesterov: of `gd`.
        batch: rows of each partition that take part in a round, drawn anew for each; None: all.
        seed: of these draws.
    """

    loss: PredictorLoss
    l2: float = 0.0
    classes: tuple[float, float] | None = None
    solver: str = "lbfgs"
    rounds: int = 100
    tolerance: float = 1e-4
    learning_rate: float | None = None
    momentum: float = 0.0
    nesterov: bool = False
    batch: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.solver not in ("lbfgs", "gd"):
            raise ConfigurationError(f"solver must be lbfgs or gd, found {self.solver!r}")
        if self.solver == "lbfgs" and not self.loss.smooth:
            raise ConfigurationError(f"the {self.loss.name} loss has a corner, which L-BFGS cannot do: use solver gd")
        if self.solver == "lbfgs" and self.batch is not None:
            raise ConfigurationError("L-BFGS needs exact gradients of all examples: leave batch out, or use solver gd")
        if not 0 <= self.l2 < np.inf:
            raise ConfigurationError(f"the penalty's weight must not be negative, found {self.l2}")
        if self.rounds < 1 or (self.batch is not None and self.batch < 1):
            raise ConfigurationError("rounds and batch must be at least 1")


@dataclass(frozen=True)
class CodedModel:
    """Holds what a training came to.

    Attributes:
        weights: of the columns, and of the intercept if there is one.
        rounds: that it took.
        converged: the gradient's tolerance was met.
        value: of what is minimized, at the last full round.
    """

    weights: FloatArray
    rounds: int
    converged: bool
    value: float


@dataclass(frozen=True)
class RoundProgress:
    """Says how a training stands after a round."""

    round: int
    value: float
    steepest: float
    evaluation: Evaluation
    weights: FloatArray


def train(
    coordinator: Coordinator, plan: TrainingPlan, on_round: Callable[[RoundProgress], object] = lambda progress: None
) -> CodedModel:
    """Runs rounds until the gradient is small or there were enough; a folder's unfinished training is gone on with.

    Raises:
        ConfigurationError: the coordinator's folder holds another training.
        UndecodableError: too few devices were there; the training can be gone on with.
    """
    file = None if coordinator.folder is None else coordinator.folder / "training.npz"
    start = np.zeros(coordinator.columns)
    objective = _Objective(coordinator, plan)
    saved = None if file is None or not file.exists() else _read(file, plan)
    done, value, examples = 0, np.inf, coordinator.examples
    if saved is None:
        rate = plan.learning_rate
        if plan.solver == "gd" and rate is None:
            rate = 1.0 / objective.curvature()
    else:
        rate = float(saved["rate"][0])
    optimizer: Optimizer = (
        LBFGS(start) if plan.solver == "lbfgs" else GradientDescent(start, rate or 1.0, plan.momentum, plan.nesterov)
    )
    if saved is not None:
        optimizer.restore({name.removeprefix("of_"): each for name, each in saved.items() if name.startswith("of_")})
        done, coordinator.rounds, examples = map(int, saved["rounds"])
        value = float(saved["value"][0])
    while done < plan.rounds and not (done and plan.batch is None and optimizer.done(plan.tolerance)):
        point = optimizer.point
        value, gradient, evaluation = objective(point, done)
        if isinstance(optimizer, LBFGS) and coordinator.examples != examples:
            # A device joined with new data: what was learned of the old function is of no use for the new one.
            optimizer = LBFGS(optimizer.weights)
        else:
            optimizer.take(value, gradient)
        examples = coordinator.examples
        done += 1
        if file is not None:
            numbers = {
                "rounds": np.array([done, coordinator.rounds, examples]),
                "rate": np.array([rate or 0.0]),
                "value": np.array([value]),
            }
            _write(file, plan, numbers | {f"of_{name}": each for name, each in optimizer.state().items()})
        on_round(RoundProgress(done, value, float(np.abs(gradient).max(initial=0.0)), evaluation, optimizer.weights))
    return CodedModel(optimizer.weights, done, plan.batch is None and optimizer.done(plan.tolerance), value)


class _Objective:
    """Turns sums over examples into what is minimized: their mean, and the penalty."""

    def __init__(self, coordinator: Coordinator, plan: TrainingPlan) -> None:
        self._coordinator, self._plan = coordinator, plan

    def __call__(self, weights: FloatArray, number: int) -> tuple[float, FloatArray, Evaluation]:
        plan, coordinator = self._plan, self._coordinator
        rows = None
        if plan.batch is not None:
            most = max(coordinator.layout.rows)
            random = np.random.default_rng([plan.seed, number])
            rows = np.sort(random.choice(most, min(plan.batch, most), replace=False)).astype(np.int64)
        found = coordinator.evaluate(weights, plan.loss, plan.classes, rows)
        count = max(found.examples, 1)
        # The penalty is one of all examples, whatever a batch holds.
        share = plan.l2 / coordinator.examples
        penalized = weights.copy()
        if coordinator.settings.intercept:
            penalized[-1] = 0.0
        value = found.value / count + share / 2 * float(penalized @ penalized)
        return value, found.gradient / count + share * penalized, found

    def curvature(self) -> float:
        """Gives about the largest curvature of what is minimized, by power iteration on the data: a few rounds."""
        coordinator, plan = self._coordinator, self._plan
        vector = np.random.default_rng(plan.seed).normal(size=coordinator.columns)
        largest = 1.0
        bent = SquaredError()
        offset = coordinator.evaluate(np.zeros(coordinator.columns), bent).gradient
        for _ in range(_POWER_ROUNDS):
            vector /= np.linalg.norm(vector)
            vector = (coordinator.evaluate(vector, bent).gradient - offset) / 2
            largest = float(np.linalg.norm(vector))
            if not largest:  # data of zeros alone
                break
        curvature = plan.loss.curvature if np.isfinite(plan.loss.curvature) else 1.0
        return (_MARGIN * curvature * largest + plan.l2) / coordinator.examples or 1.0


def _sign(plan: TrainingPlan) -> dict[str, object]:
    """Says what two runs of one training must share; more rounds or another tolerance are no other training."""
    return {
        "loss": plan.loss.name,
        "l2": plan.l2,
        "classes": None if plan.classes is None else list(plan.classes),
        "solver": plan.solver,
        "momentum": plan.momentum,
        "nesterov": plan.nesterov,
        "batch": plan.batch,
        "seed": plan.seed,
    }


def _write(file: Path, plan: TrainingPlan, arrays: dict[str, Array]) -> None:
    buffer = BytesIO()
    np.savez(buffer, said=np.frombuffer(json.dumps(_sign(plan)).encode(), np.uint8), **arrays)  # type: ignore[arg-type]
    replace_file(file, buffer.getvalue())


def _read(file: Path, plan: TrainingPlan) -> dict[str, Array]:
    try:
        arrays = read_arrays(file)
        said = json.loads(arrays.pop("said").tobytes())
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(f"{file} cannot be understood ({error}); use another folder") from error
    ours = _sign(plan)
    if said != ours:
        other = [f"{name} {said.get(name)}, not {ours[name]}" for name in ours if said.get(name) != ours[name]]
        raise ConfigurationError(
            f"{file} is of a training with {', '.join(other)}; say the same, or use another folder"
        )
    return arrays
