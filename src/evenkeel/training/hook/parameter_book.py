"""Numbers parameters, and groups those that travel together into units that survive when DDP rebuilds.

DDP shows a hook only buckets, and changes them: all parameters lie in one bucket in the first step of a process, in
several after it. What is remembered between steps (error feedback, averages that are one step old) must survive that,
and a resume too, so it is kept for *units*, lists of parameter numbers, which follow the buckets of the running job.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from evenkeel.coding.saved_state import saved_fields, saved_list, saved_numbers, saved_tensor, saved_whole
from evenkeel.errors import CodeError, ConfigurationError

__all__ = ["ParameterBook", "Units"]


class ParameterBook:
    """Numbers the parameters in the order in which the first step shows them.

    That order follows from the model and the arguments of DDP alone, so it is the same on all ranks and after a resume.

    Attributes:
        sizes: elements of each parameter, by its number.
        parameters: each of them, by its number.
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []
        # Kept, so that the id of a parameter that is gone is not given to another one.
        self.parameters: list[Tensor] = []
        self._numbers: dict[int, int] = {}
        self._closed = False

    def numbers(self, parameters: Iterable[Tensor]) -> tuple[int, ...]:
        """Gives the numbers of `parameters`; new ones are entered until the book is closed.

        Raises:
            ConfigurationError: a parameter that the first step did not show.
        """
        return tuple(self._number(parameter) for parameter in parameters)

    def close(self) -> None:
        """Takes no new parameters from now on: the first step is over and showed all."""
        self._closed = True

    def _number(self, parameter: Tensor) -> int:
        number = self._numbers.get(id(parameter))
        if number is not None:
            return number
        if self._closed:
            raise ConfigurationError(
                f"a parameter of shape {tuple(parameter.shape)} appeared that the first step did not have: is this "
                "state registered with two models? Make one state for each DistributedDataParallel"
            )
        self._numbers[id(parameter)] = len(self.parameters)
        self.parameters.append(parameter)
        self.sizes.append(parameter.numel())
        return len(self.parameters) - 1


class Units:
    """Holds the units in use, by their number. A number is never given to another unit."""

    def __init__(self) -> None:
        self._units: dict[int, tuple[int, ...]] = {}
        self._next = 0

    def covering(self, members: Sequence[int]) -> tuple[dict[int, tuple[int, ...]], list[int]]:
        """Gives the units that make up a bucket, and the numbers of former units that had to be given up for them.

        Args:
            members: parameter numbers of the bucket.

        Returns:
            Unit number -> parameter numbers, in ascending order of unit numbers: the known units where they fill the
            bucket exactly, one new unit otherwise. The same on all ranks that see the same buckets.
        """
        wanted = set(members)
        touched = {number: unit for number, unit in self._units.items() if not wanted.isdisjoint(unit)}
        if touched and set().union(*touched.values()) == wanted:
            return touched, []
        for number in touched:
            del self._units[number]
        new, self._next = self._next, self._next + 1
        self._units[new] = tuple(members)
        return {new: tuple(members)}, list(touched)

    def check_sizes(self, sizes: Sequence[int], memories: Mapping[int, Tensor], first: int = 0) -> None:
        """Raises CodeError unless `memories`, by number of the unit plus `first`, fit parameters of `sizes`."""
        for number, unit in self._units.items():
            if any(member >= len(sizes) for member in unit):
                raise CodeError(f"sizes: the state has {len(sizes)} parameters, but unit {number} has {unit}")
            owed, length = memories.get(number + first), sum(sizes[member] for member in unit)
            if owed is not None:
                saved_tensor(f"memory[{number + first}]", owed, (length,))

    def state_dict(self) -> dict[str, Any]:
        """Gives the units in types that checkpoints take."""
        return {"next": self._next, "units": {number: list(unit) for number, unit in self._units.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Uses the units of a checkpoint.

        Raises:
            CodeError: they are malformed. Nothing has been loaded then.
        """
        saved_fields("units", state, ("next", "units"))
        following = saved_whole("units.next", state["next"])
        # Some checkpoints make texts of numbers, beside the numbers that they were to fill in.
        units = {
            number: tuple(saved_whole(f"units[{number}]", each) for each in saved_list(f"units[{number}]", unit))
            for number, unit in saved_numbers("units", state["units"]).items()
        }
        if any(number >= following for number in units):
            raise CodeError(f"units.next: the state has {following}, but a unit {max(units)}")
        self._next = following
        self._units = dict(sorted(units.items()))
