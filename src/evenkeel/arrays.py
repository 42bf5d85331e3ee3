"""Names the types of arrays that cross rooms, and the smallest probability that is used."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEAST_PROBABILITY", "Array", "FloatArray", "IntegerArray", "PixelArray", "ScoreArray"]

Array = NDArray[Any]
FloatArray = NDArray[np.float64]
IntegerArray = NDArray[np.int64]
PixelArray = NDArray[np.uint8]
ScoreArray = NDArray[np.float32]

# A smaller probability is taken as this one: its logarithm stays finite, and no larger class changes places.
LEAST_PROBABILITY = 1e-30
