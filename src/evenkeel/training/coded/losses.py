"""Defines the losses of a linear predictor: what each example costs, and the slope that its gradient needs.

A device's part of the gradient is `X' slope(X w, labels)`, so a loss is all that the coordinator must know of a model.
Labels are -1 and 1 for classes, real numbers for least squares.
"""

from abc import ABC, abstractmethod

import numpy as np

from evenkeel.arrays import FloatArray
from evenkeel.errors import ConfigurationError

__all__ = ["LOSSES", "Hinge", "Logistic", "PredictorLoss", "SquaredError", "SquaredHinge", "loss_named"]


class PredictorLoss(ABC):
    """Gives what predictions cost; both methods work element by element, in float64.

    Law: `slope` is the derivative of `cost` by the prediction; where there is none (hinge at its corner), a
    subgradient. `slope_and_cost` gives what the two give, to rounding.

    Attributes:
        name: as messages and options say it.
        smooth: the slope is continuous, so that line searches may rely on it.
        classes: labels are -1 and 1.
        curvature: largest second derivative; infinite where there is none.
    """

    name: str
    smooth: bool = True
    classes: bool = True
    curvature: float

    @abstractmethod
    def cost(self, predicted: FloatArray, labels: FloatArray) -> FloatArray:
        """Gives the cost of each prediction."""

    @abstractmethod
    def slope(self, predicted: FloatArray, labels: FloatArray) -> FloatArray:
        """Gives the derivative of each cost by its prediction."""

    def slope_and_cost(self, predicted: FloatArray, labels: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Gives both, which may be quicker than one after the other."""
        return self.slope(predicted, labels), self.cost(predicted, labels)


class Logistic(PredictorLoss):
    """Costs log(1 + exp(-y z))."""

    name = "logistic"
    curvature = 0.25

    def cost(self, predicted: FloatArray, labels: FloatArray) -> FloatArray:
        """Gives the cost of each prediction; large margins neither overflow nor lose digits."""
        margin = labels * predicted
        cost: FloatArray = np.maximum(-margin, 0.0) + np.log1p(np.exp(-np.abs(margin)))
        return cost

    def slope(self, predicted: FloatArray, labels: FloatArray) -> FloatArray:
        """Gives -y / (1 + exp(y z))."""
        slope: FloatArray = -labels / (1.0 + np.exp(np.minimum(labels * predicted, 700.0)))  # exp(710) overflows
        return slope

    def slope_and_cost(self, predicted: FloatArray, labels: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Gives both from one exponential, since that takes longest, and in few passes over the numbers."""
        negative = -labels
        work: FloatArray = negative * predicted
        slope: FloatArray = np.minimum(work, 700.0)  # exp(710) overflows
        np.exp(slope, out=slope)
        cost: FloatArray = np.log1p(slope)
        np.maximum(cost, work, out=cost)  # where the exponent was cut, the cost is the margin that is lacking
        np.add(slope, 1.0, out=work)
        slope /= work
        slope *= negative
        return slope, cost


class Hinge(PredictorLoss):
    """Costs max(0, 1 - y z)."""

    name = "hinge"
    smooth = False
    curvature = np.inf

    def cost(self, predicted: FloatArray, labels: FloatArray) -> FloatArray:
        """Gives the cost of each prediction."""
        cost: FloatArray = np.maximum(0.0, 1.0 - labels * predicted)
        return cost

    def slope(self, predicted: FloatArray, labels: FloatArray) -> FloatArray:
        """Gives -y where y z < 1, else 0."""
        slope: FloatArray = np.where(labels * predicted < 1.0, -labels, 0.0)
        return slope


class SquaredHinge(PredictorLoss):
    """Costs max(0, 1 - y z) squared."""

    name = "squared_hinge"
    curvature = 2.0

    def cost(self, predicted: FloatArray, labels: FloatArray) -> FloatArray:
        """Gives the cost of each prediction."""
        cost: FloatArray = np.maximum(0.0, 1.0 - labels * predicted) ** 2
        return cost

    def slope(self, predicted: FloatArray, labels: FloatArray) -> FloatArray:
        """Gives -2 y max(0, 1 - y z)."""
        slope: FloatArray = -2.0 * labels * np.maximum(0.0, 1.0 - labels * predicted)
        return slope


class SquaredError(PredictorLoss):
    """Costs (z - y) squared."""

    name = "squared_error"
    classes = False
    curvature = 2.0

    def cost(self, predicted: FloatArray, labels: FloatArray) -> FloatArray:
        """Gives the cost of each prediction."""
        cost: FloatArray = (predicted - labels) ** 2
        return cost

    def slope(self, predicted: FloatArray, labels: FloatArray) -> FloatArray:
        """Gives 2 (z - y)."""
        slope: FloatArray = 2.0 * (predicted - labels)
        return slope


LOSSES: dict[str, PredictorLoss] = {loss.name: loss for loss in (Logistic(), Hinge(), SquaredHinge(), SquaredError())}


def loss_named(name: object) -> PredictorLoss:
    """Gives the loss of that name.

    Raises:
        ConfigurationError: there is none.
    """
    found = LOSSES.get(name) if isinstance(name, str) else None
    if found is None:
        raise ConfigurationError(f"loss {name!r} is unknown; use one of {', '.join(LOSSES)}")
    return found
