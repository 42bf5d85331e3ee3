"""Decodes collages as the paper does: from predicted boxes in place of scores for each cell.

Source: Narra et al., Collage Inference, section 2 and Figure 3. A predicted box gives its class to the ground-truth
box (cell) with which its Jaccard similarity, intersection / union of the areas, is largest. Said here because the
paper leaves it open:

- a box as similar to several cells goes to the one with the lowest number;
- among the boxes of a cell the highest confidence wins, among equals the earliest box;
- a box that meets no cell, or has no area, or holds a value that is not finite, is no box;
- a cell without a box is *no answer*: it has no entry in what is returned, so it can never be read as a class.
"""

from collections.abc import Hashable, Mapping, Sequence, Set

import numpy as np

from evenkeel.arrays import Array
from evenkeel.coding.answers.backup_code import BackupCode
from evenkeel.coding.answers.collage import Collage
from evenkeel.coding.checks import check_count, check_numbers
from evenkeel.coding.code import Answer, Task
from evenkeel.errors import CodeError

__all__ = ["BoxCollage", "assign_boxes", "cell_boxes", "decode_boxes", "similarities"]

_CORNERS = 4  # x0, y0, x1, y1
_CONFIDENCE = 4  # the column behind them
_FIRST_CLASS = 5


def cell_boxes(grid: int, side: int) -> Array:
    """Gives the ground-truth boxes `[grid * grid, 4]` (x0, y0, x1, y1) in pixels, row by row."""
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    return np.stack([columns, rows, columns + 1, rows + 1], axis=1) * float(side)


def similarities(boxes: Array, cells: Array) -> Array:
    """Gives the Jaccard similarity `[boxes, cells]` of boxes `[boxes, 4]` with cells `[cells, 4]`: x0, y0, x1, y1."""
    first, last = boxes[:, None, :2], boxes[:, None, 2:]
    shared = np.minimum(last, cells[None, :, 2:]) - np.maximum(first, cells[None, :, :2])
    intersection = shared.clip(min=0).prod(axis=2)
    predicted = (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(axis=1)
    truth = (cells[:, 2:] - cells[:, :2]).prod(axis=1)
    similarity: Array = intersection / (truth[None] + predicted[:, None] - intersection)
    return similarity


def assign_boxes(similarity: Array, confidence: Array) -> dict[int, int]:
    """Finds the box that names each cell's class, by similarities `[boxes, cells]` and confidences `[boxes]`."""
    if len(similarity) == 0:
        return {}
    cells = similarity.argmax(axis=1)
    order = np.argsort(-confidence, kind="stable")
    order = order[similarity.max(axis=1)[order] > 0]
    taken, first = np.unique(cells[order], return_index=True)
    return dict(zip(taken.tolist(), order[first].tolist(), strict=True))


def decode_boxes(boxes: Array, grid: int, side: int, count: int) -> dict[int, int]:
    """Finds the box that names each cell's class, for the first `count` cells: cell -> row of the box.

    A box that is most similar to an unused cell is not given to another one.

    Args:
        boxes: `[boxes, 5 or more]`: x0, y0, x1, y1 in pixels of the canvas, confidence; further columns are not read.
        grid: cells along one side.
        side: pixels along one side of a cell.
        count: how many cells are in use.
    """
    boxes = boxes[:, :_FIRST_CLASS].astype(np.float64)
    real = np.flatnonzero(np.isfinite(boxes).all(axis=1))
    similarity = similarities(boxes[real, :_CORNERS], cell_boxes(grid, side))
    winners = assign_boxes(similarity, boxes[real, _CONFIDENCE])
    return {cell: int(real[box]) for cell, box in winners.items() if cell < count}


class BoxCollage(BackupCode):
    """Is a collage whose model predicts boxes, as in the paper.

    The reply holds boxes `[1, boxes, 5 + classes]`, any number of them, also none: x0, y0, x1, y1 in pixels of the
    canvas, confidence 0..1 (that something is there), class scores. An answer carries the scores and the confidence of
    the box that won its cell. A detector may overlook an item, so no loss of a primary is claimed to be survived.

    Args:
        collage: how the canvas is made.
    """

    def __init__(self, collage: Collage) -> None:
        self._collage = collage
        self.name = f"box_{collage.name}"
        self.max_items = collage.max_items
        self.model = collage.model

    def prepare(self, item: Array) -> Array:
        """Makes the item's tile, as the collage does."""
        return self._collage.prepare(item)

    @property
    def form(self) -> Hashable:
        """Gives the collage's form: they share tiles."""
        return self._collage.form

    def is_prepared(self, item: Array) -> bool:
        """Tells whether the item is a tile already."""
        return self._collage.is_prepared(item)

    def spares(self, prepared: Sequence[Array]) -> list[Task]:
        """Makes the collage's canvas."""
        return self._collage.spares(prepared)

    def decode(self, count: int, replies: Mapping[int, Array]) -> dict[int, Answer]:
        """Gives exact answers where a primary is in, those of the winning boxes elsewhere."""
        check_count(count, self.max_items)
        check_numbers(replies, count + 1)
        known = {}
        spare = replies.get(count)
        if spare is not None:
            boxes = self._boxes(count, spare)
            for cell, box in decode_boxes(boxes, self._collage.grid, self._collage.tile_side, count).items():
                sure = min(max(float(boxes[box, _CONFIDENCE]), 0.0), 1.0)
                known[cell] = Answer(boxes[box, _FIRST_CLASS:], "collage", sure)
        known.update(self._collage.scores.exact_answers(count, replies))
        return known

    def survives(self, count: int, lost: Set[int]) -> bool:
        """Survives only losses of no primary: a detector may overlook an item."""
        return not any(number in lost for number in range(count))

    def _boxes(self, number: int, reply: Array) -> Array:
        columns = _FIRST_CLASS + self._collage.scores.classes
        boxes: Array = np.asarray(reply)
        if boxes.ndim != 3 or boxes.shape[0] != 1 or boxes.shape[2] != columns:
            raise CodeError(
                f"reply to task {number}: expected boxes of shape [1, boxes, {columns}] (4 corners, confidence, "
                f"{self._collage.scores.classes} scores), found {list(boxes.shape)}"
            )
        if boxes.dtype.kind != "f":
            raise CodeError(f"reply to task {number}: expected floating-point boxes, found datatype {boxes.dtype}")
        boxes = boxes[0][np.isfinite(boxes[0]).all(axis=1)]
        sure = boxes[:, _CONFIDENCE]
        # A little room for rounding; anything more is a logit where a probability was agreed.
        if len(boxes) and not (sure.min() >= -1e-3 and sure.max() <= 1.001):
            raise CodeError(
                f"reply to task {number}: box confidences must lie in 0..1, found {sure.min():g} to {sure.max():g}"
            )
        return boxes
