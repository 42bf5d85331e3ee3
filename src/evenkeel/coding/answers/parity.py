"""Makes one parity item of a group for a parity model (ParM), and finds the missing answer by subtraction.

Source: Kosaian, Rashmi, Venkataraman, Parity Models, SOSP 2019. The parity model is trained so that its output for the
parity of a group is the sum of the base model's scores of the group's items; with all but one of those at hand, the
difference is the missing one. Where this departs from ParM: a group may hold fewer than k items (the parity then is of
those, and the sum is over those, so train with partial groups too), and concatenation also has a 3x3 form.

`Pixels` says which values are added or pasted: raw pixel values 0..255 where the parity model normalises
inside, otherwise each item is normalised by itself first, as in ParM. Only for full groups do the two differ by a mere
constant.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import numpy as np

from evenkeel.arrays import Array
from evenkeel.coding.answers.backup_code import BackupCode
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.coding.answers.tiles import Pixels, Tile
from evenkeel.coding.checks import at_least_one, check_count, check_group, check_numbers
from evenkeel.coding.code import Answer, Task
from evenkeel.errors import ConfigurationError

__all__ = ["ConcatEncoder", "Parity", "ParityEncoder", "SumEncoder"]

_CONCATENATIONS = {2: (1, 2), 4: (2, 2), 9: (3, 3)}  # items -> rows and columns of cells


class ParityEncoder(ABC):
    """Makes one parity item from a group.

    Attributes:
        name: short name for tables.
        max_items: ParM's k.
    """

    name: str
    max_items: int

    @abstractmethod
    def prepare(self, item: Array) -> Array:
        """Makes what is kept of an item."""

    @abstractmethod
    def combine(self, prepared: Sequence[Array]) -> Array:
        """Makes the parity item of 1..max_items prepared items, all of one shape."""


@dataclass(frozen=True)
class SumEncoder(ParityEncoder):
    """Adds the items, pixel by pixel, in float32 (sums leave the range of uint8)."""

    max_items: int
    pixels: Pixels = field(default_factory=lambda: Pixels(datatype="FP32"))
    name = "parity_sum"

    def __post_init__(self) -> None:
        """Refuses a datatype that cannot hold a sum."""
        at_least_one("max_items", self.max_items)
        if self.pixels.datatype != "FP32":
            raise ConfigurationError(
                "a sum parity needs a parity model of datatype FP32: sums leave the range of uint8"
            )

    def prepare(self, item: Array) -> Array:
        """Makes the item's pixels what the parity model takes, in float32."""
        return self.pixels.finish(self.pixels.upright(item))

    def combine(self, prepared: Sequence[Array]) -> Array:
        """Gives the sum."""
        return np.asarray(np.stack(prepared).sum(axis=0, dtype=np.float32))


@dataclass(frozen=True)
class ConcatEncoder(ParityEncoder):
    """Squeezes the items and pastes them into a picture of the original input size.

    Two items become halves side by side, four become quadrants, nine a 3x3 grid; item i is cell i, row by row. Cells
    are `height // rows` x `width // columns` pixels; a remainder at the right and bottom, and unused cells, stay blank.
    """

    max_items: int
    height: int  # of the parity model's input, pixels
    width: int
    pixels: Pixels = field(default_factory=Pixels)
    name = "parity_concat"

    def __post_init__(self) -> None:
        """Refuses numbers of items for which ParM has no picture, and pictures that are too small."""
        if self.max_items not in _CONCATENATIONS:
            raise ConfigurationError(f"concatenation takes 2, 4 or 9 items, found {self.max_items!r}")
        rows, columns = _CONCATENATIONS[self.max_items]
        if self.height < rows or self.width < columns:
            raise ConfigurationError(f"{self.max_items} items do not fit into {self.height} x {self.width} pixels")

    @property
    def _tile(self) -> Tile:
        rows, columns = _CONCATENATIONS[self.max_items]
        return Tile(self.height // rows, self.width // columns, self.pixels, crop=False)

    def prepare(self, item: Array) -> Array:
        """Squeezes the item to one cell."""
        return self._tile.make(item)

    def combine(self, prepared: Sequence[Array]) -> Array:
        """Makes the picture of all cells."""
        tile, columns = self._tile, _CONCATENATIONS[self.max_items][1]
        picture = np.zeros(self.pixels.shape(self.height, self.width), self.pixels.dtype)
        image = picture if self.pixels.layout == "NHWC" else picture.transpose(1, 2, 0)
        for number, item in enumerate(prepared):
            top, left = number // columns * tile.height, number % columns * tile.width
            cell = item if self.pixels.layout == "NHWC" else item.transpose(1, 2, 0)
            image[top : top + tile.height, left : left + tile.width] = cell
        return picture


class Parity(BackupCode):
    """Makes one spare task for a group: its parity item, `[1, ...]`.

    The reply holds the sum of the group's scores, `[1, classes]`. As soon as exactly one primary is missing, that item
    is answered with the difference, source "decoded".

    Args:
        encoder: how the parity item is made.
        scores: how scores are to be read, the parity model's and the replicas' alike.
        model: name of the parity model.
    """

    uses_primaries = True

    def __init__(self, encoder: ParityEncoder, scores: ScoreForm, *, model: str = "parity") -> None:
        self.encoder = encoder
        self.scores = scores
        self.model = model
        self.name = f"{encoder.name}{encoder.max_items}"
        self.max_items = encoder.max_items

    def prepare(self, item: Array) -> Array:
        """Makes what the encoder keeps of an item."""
        return self.encoder.prepare(item)

    def is_prepared(self, item: Array) -> bool:
        """Is false: encoders squeeze, normalise or widen."""
        return False

    def spares(self, prepared: Sequence[Array]) -> list[Task]:
        """Makes one task with the parity item."""
        check_group(prepared, self.max_items)
        return [Task(self.encoder.combine(prepared)[None], tuple(range(len(prepared))))]

    def decode(self, count: int, replies: Mapping[int, Array]) -> dict[int, Answer]:
        """Gives exact answers where a primary is in, and the last missing one by subtraction."""
        check_count(count, self.max_items)
        check_numbers(replies, count + 1)
        known = self.scores.exact_answers(count, replies)
        spare = replies.get(count)
        if spare is None:
            return known
        parity = self.scores.rows(count, spare, 1)
        if len(known) == count - 1:
            missing = next(item for item in range(count) if item not in known)
            # In float64 and in the items' order, so that the order of replies cannot show in the last digit.
            rest = parity.astype(np.float64)
            for item in sorted(known):
                rest -= known[item].value
            decoded = self.scores.answers(rest, "decoded")
            if decoded:
                known[missing] = decoded[0]
        return known

    def survives(self, count: int, lost: Set[int]) -> bool:
        """Survives the loss of one primary as long as the parity is in."""
        primaries = sum(number in lost for number in range(count))
        return primaries == 0 or (primaries == 1 and count not in lost)
