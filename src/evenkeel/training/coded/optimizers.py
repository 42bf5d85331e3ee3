"""Moves weights downhill: gradient descent with momentum, plain or Nesterov's, and L-BFGS.

An optimizer names the point at which it wants value and gradient, and takes them; it knows nothing of devices. Its
state is arrays, so that a training that was stopped goes on bit for bit.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np

from evenkeel.arrays import Array, FloatArray
from evenkeel.errors import ConfigurationError

__all__ = ["LBFGS", "GradientDescent", "Optimizer"]

_ARMIJO, _WOLFE = 1e-4, 0.9
_MAX_HALVINGS = 40


class Optimizer(ABC):
    """Finds weights with a small value.

    Law: an optimizer that is given another's `state` names the same points from then on.
    """

    @property
    @abstractmethod
    def weights(self) -> FloatArray:
        """Gives the weights so far."""

    @property
    @abstractmethod
    def point(self) -> FloatArray:
        """Gives where value and gradient are wanted next."""

    @abstractmethod
    def take(self, value: float, gradient: FloatArray) -> None:
        """Takes what was found at `point`."""

    @abstractmethod
    def state(self) -> dict[str, Array]:
        """Gives all that it remembers."""

    @abstractmethod
    def restore(self, state: Mapping[str, Array]) -> None:
        """Takes on what another one remembered."""

    def done(self, tolerance: float) -> bool:
        """Tells whether no part of the last gradient at the weights was above `tolerance`."""
        return False


class GradientDescent(Optimizer):
    """Takes a step against the gradient, plus a share of the step before.

    Args:
        start: first weights.
        learning_rate: length of a step, in gradients.
        momentum: share of the step before, 0 to below 1.
        nesterov: the gradient is taken where the step before would lead.

    Raises:
        ConfigurationError: a rate or share out of bounds.
    """

    def __init__(self, start: FloatArray, learning_rate: float, momentum: float = 0.0, nesterov: bool = False) -> None:
        if not 0 < learning_rate < np.inf:
            raise ConfigurationError(f"learning_rate must be above 0, found {learning_rate}")
        if not 0 <= momentum < 1:
            raise ConfigurationError(f"momentum must be from 0 to below 1, found {momentum}")
        if nesterov and not momentum:
            raise ConfigurationError("nesterov needs a momentum above 0")
        self._rate, self._momentum, self._nesterov = learning_rate, momentum, nesterov
        self._weights, self._step = start.copy(), np.zeros(len(start))
        self._steepest = np.inf

    @property
    def weights(self) -> FloatArray:
        """Gives the weights so far."""
        return self._weights

    @property
    def point(self) -> FloatArray:
        """Gives the weights, or where momentum alone would take them."""
        return self._weights + self._momentum * self._step if self._nesterov else self._weights

    def take(self, value: float, gradient: FloatArray) -> None:
        """Takes a step."""
        self._step = self._momentum * self._step - self._rate * gradient
        self._weights = self._weights + self._step
        self._steepest = float(np.abs(gradient).max(initial=0.0))

    def state(self) -> dict[str, Array]:
        """Gives weights and the last step."""
        return {"weights": self._weights, "step": self._step, "steepest": np.array([self._steepest])}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Takes on weights and the last step."""
        self._weights, self._step = state["weights"].copy(), state["step"].copy()
        self._steepest = float(state["steepest"][0])

    def done(self, tolerance: float) -> bool:
        """Tells whether no part of the last gradient was above `tolerance`."""
        return self._steepest <= tolerance


class LBFGS(Optimizer):
    """Is the limited-memory BFGS method, with a line search by bisection for the weak Wolfe conditions.

    Each point that the line search tries is one evaluation. It needs exact values and gradients of a smooth function:
    neither mini-batches nor the hinge.

    Args:
        start: first weights.
        memory: how many steps it remembers.
    """

    def __init__(self, start: FloatArray, memory: int = 10) -> None:
        if memory < 1:
            raise ConfigurationError(f"memory must be at least 1, found {memory}")
        self._memory = memory
        count = len(start)
        self._weights, self._gradient, self._direction = start.copy(), np.zeros(count), np.zeros(count)
        self._value = np.inf
        self._low, self._high, self._length, self._tries = 0.0, np.inf, 1.0, 0
        self._started = self._stuck = False
        self._steps, self._changes = np.zeros((0, count)), np.zeros((0, count))

    @property
    def weights(self) -> FloatArray:
        """Gives the best weights so far."""
        return self._weights

    @property
    def point(self) -> FloatArray:
        """Gives the point on the line that is tried."""
        return self._weights + self._length * self._direction if self._started else self._weights

    def take(self, value: float, gradient: FloatArray) -> None:
        """Accepts the point, or says another one on the line."""
        if not self._started:
            self._started = True
            self._value, self._gradient = value, gradient.copy()
            self._aim()
            return
        slope = float(self._gradient @ self._direction)
        self._tries += 1
        # Near the end values differ by rounding alone, while gradients still tell.
        noise = 4 * np.finfo(np.float64).eps * abs(self._value)
        if not value <= self._value + _ARMIJO * self._length * slope + noise:
            self._high = self._length
        elif float(gradient @ self._direction) < _WOLFE * slope:
            self._low = self._length
        else:
            self._accept(value, gradient)
            return
        if self._tries >= _MAX_HALVINGS:
            self._stuck = True
            return
        self._length = 2 * self._low if np.isinf(self._high) else (self._low + self._high) / 2

    def done(self, tolerance: float) -> bool:
        """Tells whether no part of the gradient is above `tolerance`, or no point on a line is lower."""
        return self._started and (self._stuck or float(np.abs(self._gradient).max(initial=0.0)) <= tolerance)

    def state(self) -> dict[str, Array]:
        """Gives the weights, the steps remembered and where on the line the search is."""
        numbers = [self._value, self._low, self._high, self._length, self._tries, self._started, self._stuck]
        return {
            "weights": self._weights,
            "gradient": self._gradient,
            "direction": self._direction,
            "steps": self._steps,
            "changes": self._changes,
            "numbers": np.array(numbers, np.float64),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Takes on another one's state."""
        self._weights, self._gradient = state["weights"].copy(), state["gradient"].copy()
        self._direction, self._steps, self._changes = state["direction"].copy(), state["steps"], state["changes"]
        self._value, self._low, self._high, self._length, tries, started, stuck = map(float, state["numbers"])
        self._tries, self._started, self._stuck = int(tries), bool(started), bool(stuck)

    def _accept(self, value: float, gradient: FloatArray) -> None:
        step, change = self._length * self._direction, gradient - self._gradient
        if float(step @ change) > 1e-12 * float(np.linalg.norm(step) * np.linalg.norm(change)):
            self._steps = np.concatenate([self._steps, step[None]])[-self._memory :]
            self._changes = np.concatenate([self._changes, change[None]])[-self._memory :]
        self._weights = self._weights + step
        self._value, self._gradient = value, gradient.copy()
        self._aim()

    def _aim(self) -> None:
        """Chooses the next line, by the two-loop recursion."""
        direction = -self._gradient
        inner = []
        for step, change in zip(self._steps[::-1], self._changes[::-1], strict=True):
            share = float(step @ direction) / float(step @ change)
            inner.append(share)
            direction = direction - share * change
        if len(self._steps):
            direction = (
                direction * float(self._steps[-1] @ self._changes[-1]) / float(self._changes[-1] @ self._changes[-1])
            )
        for step, change, share in zip(self._steps, self._changes, reversed(inner), strict=True):
            direction = direction + (share - float(change @ direction) / float(step @ change)) * step
        self._direction = direction
        first = 1.0 / max(1.0, float(np.linalg.norm(direction)))
        self._low, self._high, self._length, self._tries = 0.0, np.inf, 1.0 if len(self._steps) else first, 0
