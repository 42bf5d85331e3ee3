"""Names the array type that crosses rooms: a numpy array of any datatype."""

from typing import Any

from numpy.typing import NDArray

__all__ = ["Array"]

Array = NDArray[Any]
