"""Pastes up to grid x grid items into one canvas, which a Collage-CNN classifies in one pass.

Source: Narra et al., Collage Inference, section 2. Item i stands in box i of a square grid, row by row. Where this
departs from the paper: our Collage-CNN has one set of scores for each cell in place of predicted boxes, because the
cells are known in advance (the paper's decoder is in `boxes.py`); a group may hold fewer items than cells; and cells
that it leaves free may show its first items once more, mirrored, for a second opinion that costs nothing.
"""

from collections.abc import Hashable, Mapping, Sequence, Set

import numpy as np

from evenkeel.arrays import Array
from evenkeel.coding.answers.backup_code import BackupCode
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.coding.answers.tiles import Pixels, Tile
from evenkeel.coding.checks import at_least_one, check_count, check_numbers
from evenkeel.coding.code import Answer, Task
from evenkeel.errors import CodeError, ConfigurationError
from evenkeel.models.cards import Layout, ModelCard

__all__ = ["Collage"]


class Collage(BackupCode):
    """Makes one spare task for a group: a canvas `[1, side, side, 3]` (or `[1, 3, side, side]`) with item i in box i.

    The reply holds scores `[1, grid * grid, classes]`, cells row by row. An answer from it has source "collage" and
    confidence max softmax(logits / temperature). A cell whose scores are not finite answers nothing. An item in two
    cells is answered by the mean of their scores.

    Args:
        grid: boxes along one side (the paper's square root of N).
        tile_side: pixels along one side of a box.
        scores: how the model's scores are to be read.
        pixels: how the model takes pixels.
        squeezed: whether an item that is not square is squeezed into its box; else its middle square is cut out.
        mirrored: whether free boxes show items mirrored; else they are blank.
        min_confidence: of an answer that is good enough to be used.
        model: name of the Collage-CNN.
    """

    def __init__(
        self,
        grid: int,
        tile_side: int,
        scores: ScoreForm,
        *,
        pixels: Pixels | None = None,
        squeezed: bool = False,
        mirrored: bool = False,
        min_confidence: float = 0.0,
        model: str = "collage",
    ) -> None:
        self.grid = at_least_one("grid", grid)
        self.tile_side = at_least_one("tile_side", tile_side)
        self.scores = scores
        self.pixels = Pixels() if pixels is None else pixels
        self.mirrored = mirrored
        self.min_confidence = min_confidence
        self.model = model
        self.name = f"collage{grid}x{grid}"
        self.max_items = grid * grid
        self._tile = Tile(tile_side, tile_side, self.pixels, crop=not squeezed)
        # Kept, since they are looked at for every item that waits and in every pass.
        self._tile_shape, self._dtype = self._tile.shape, self.pixels.dtype
        side = grid * tile_side
        self._canvas_shape = (1, *self.pixels.shape(side, side))
        # Rows and columns of each box, so that encoding is slice copies and nothing else.
        self._boxes = [
            (
                slice(row * tile_side, (row + 1) * tile_side),
                slice(column * tile_side, (column + 1) * tile_side),
            )
            for row in range(grid)
            for column in range(grid)
        ]

    @classmethod
    def from_card(cls, card: ModelCard, item_layout: Layout | None = None) -> "Collage":
        """Makes the code of a Collage-CNN from its card; `item_layout` is that of the items, if it is another one."""
        if card.kind != "collage":
            raise ConfigurationError(f"model {card.name!r} is a {card.kind}; a collage needs a card of kind 'collage'")
        return cls(
            card.grid,
            card.tile_side,
            ScoreForm.from_card(card),
            pixels=Pixels.from_card(card, item_layout),
            squeezed=card.squeezed,
            mirrored=card.mirrored,
            min_confidence=card.min_confidence,
            model=card.name,
        )

    def prepare(self, item: Array) -> Array:
        """Makes the item's tile; gives the item itself, not a copy, if it already is one.

        An item that is not square is squeezed, or cropped to its central square first, as the authors' public code
        did with its central crop (which also cut a margin off square items; we keep it).

        Raises:
            CodeError: not a picture with three channels, or pixels that are not finite.
        """
        return self._tile.make(item)

    @property
    def form(self) -> Hashable:
        """Gives the tile's settings: grids whose tiles are alike share them."""
        return self._tile

    def is_prepared(self, item: Array) -> bool:
        """Tells whether the item is a tile already."""
        return item.shape == self._tile_shape and item.dtype == self._dtype

    def spares(self, prepared: Sequence[Array]) -> list[Task]:
        """Makes one task: the canvas; boxes that show nothing are blank (0)."""
        count = len(prepared)
        check_count(count, self.max_items)
        copies = self._copies(count)
        blank = np.empty if count + copies == self.max_items else np.zeros
        upright = self.pixels.layout == "NHWC"
        canvas = blank(self._canvas_shape, self._dtype)
        image = canvas[0] if upright else canvas[0].transpose(1, 2, 0)
        for number, tile in enumerate(prepared):
            if tile.shape != self._tile_shape or tile.dtype != self._dtype:
                raise CodeError(
                    f"item {number} is {tile.dtype} {list(tile.shape)}, expected a tile of {self._dtype} "
                    f"{list(self._tile_shape)}; prepare items before they are encoded"
                )
            seen = tile if upright else tile.transpose(1, 2, 0)
            image[self._boxes[number]] = seen
            if number < copies:
                image[self._boxes[count + number]] = seen[:, ::-1]
        return [Task(canvas, tuple(range(count)))]

    def decode(self, count: int, replies: Mapping[int, Array]) -> dict[int, Answer]:
        """Gives exact answers where a primary is in, those of the collage's cells elsewhere."""
        check_count(count, self.max_items)
        check_numbers(replies, count + 1)
        known: dict[int, Answer] = {}
        spare = replies.get(count)
        if spare is not None:
            cells = self.scores.rows(count, spare, 1, self.max_items)[0]
            known = self.scores.answers(self._opinions(cells, count), "collage")
        known.update(self.scores.exact_answers(count, replies))
        return known

    def survives(self, count: int, lost: Set[int]) -> bool:
        """Survives any loss of primaries as long as the collage is in."""
        return count not in lost or not any(number in lost for number in range(count))

    def _copies(self, count: int) -> int:
        """Counts the items, from the first on, that are shown in a second box: the first has waited longest."""
        return min(count, self.max_items - count) if self.mirrored else 0

    def _opinions(self, cells: Array, count: int) -> Array:
        """Gives the items' scores `[count, classes]`: the mean where two cells show an item and both are finite."""
        copies = self._copies(count)
        if not copies:
            return cells[:count]
        first, second = cells[:copies], cells[count : count + copies]
        there, copied = (np.isfinite(each).all(axis=-1, keepdims=True) for each in (first, second))
        with np.errstate(invalid="ignore"):  # infinities of cells that are not there
            mean = first / 2 + second / 2
        opinions = np.where(there & copied, mean, np.where(copied, second, first))
        return np.concatenate([opinions, cells[copies:count]])
