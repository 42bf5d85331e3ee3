"""Collects a backup's answers through the code that serves: encode, run its model, decode.

Nothing here knows how a code works. What the seam tells of it (`systematic`, `uses_primaries`) says which
replies a fill is made of, so that every code is measured as it would be used:

- a spare that answers by itself (collage, cheap, detector): its reply alone, for all items of the group;
- a spare that needs primaries (parity): each primary is lost in turn, all others are in;
- a code that is not systematic (Berrut): each task of the group is lost in turn, primary or spare, and every item is
  answered from the rest; what it answers with nothing lost is kept beside it, since that is approximate too.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evenkeel.arrays import Array, IntegerArray
from evenkeel.coding.answers.backup_code import BackupCode
from evenkeel.coding.answers.cheap import Cheap
from evenkeel.coding.code import Answer, Task
from evenkeel.errors import ConfigurationError
from evenkeel.models.measure import interleaved_times_ms, shuffled_groups

__all__ = [
    "NO_ANSWER",
    "Fills",
    "Grouping",
    "MeasuredAnswers",
    "MeasuredBackup",
    "answers_of",
    "collect",
    "from_scores",
    "pass_times_ms",
    "same_class_groups",
    "scores_of",
    "spare_tasks",
]

GroupsDone = Callable[[int], object]  # called with the number of groups that are done since the last call

NO_ANSWER = -1  # in place of a class
_BATCH = 100  # images of one pass of the classifier
_MAX_ROWS = 64  # in one pass; fewer where they are large
_MAX_BYTES = 8 << 20


@dataclass(frozen=True)
class MeasuredBackup:
    """Holds a code with the model that runs its spare tasks.

    Attributes:
        method: what it is called in tables.
        code: how items become tasks, and replies answers.
        model: name of the spares' model.
        run: that model, `[rows, ...]` -> `[rows, ...]`. Where the code is not systematic it runs the primaries too.
        macs: multiply-accumulates of all spare tasks of a full group; None where unknown.
        parameters: of that model; None where unknown.
        learned: sketch of the images that the model learned from, as its card has it; None where it has none.
    """

    method: str
    code: BackupCode
    model: str
    run: Callable[[Array], Array]
    macs: int | None
    parameters: int | None
    learned: object = None


@dataclass(frozen=True)
class Fills:
    """Holds answers, one for each item that was sent: `[fills]` each.

    Attributes:
        images: which image it was.
        answers: the class, or NO_ANSWER.
        confidences: 0..1; 0 where there is no answer.
    """

    images: IntegerArray
    answers: IntegerArray
    confidences: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def join(cls, parts: Sequence["Fills"]) -> "Fills":
        """Joins all of them."""
        return cls(
            np.concatenate([part.images for part in parts]),
            np.concatenate([part.answers for part in parts]),
            np.concatenate([part.confidences for part in parts]),
        )


@dataclass(frozen=True)
class Grouping:
    """Says how images are put together in groups.

    Attributes:
        shuffles: random permutations of the images that are cut into full groups.
        seed: of the shuffles.
        partly: whether there are also groups of one item, of two, and so on.
        same_class: whether there are also groups of one class.
    """

    shuffles: int = 1
    seed: int = 1
    partly: bool = False
    same_class: bool = False


@dataclass(frozen=True)
class MeasuredAnswers:
    """Holds what one backup answered.

    Attributes:
        fills: of full groups, one task lost each.
        unhurt: with nothing lost, where that is approximate too.
        by_items: of groups of so many items, full ones last; empty unless `partly`.
        same_class: of groups of one class, or None.
    """

    fills: Fills
    unhurt: Fills | None
    by_items: Sequence[tuple[int, Fills]] = ()
    same_class: Fills | None = None


def scores_of(run: Callable[[Array], Array], images: Array, progress: GroupsDone = lambda done: None) -> Array:
    """Gives the classifier's scores for every image, `[images, classes]`."""
    parts = []
    for first in range(0, len(images), _BATCH):
        parts.append(run(images[first : first + _BATCH]))
        progress(len(parts[-1]))
    return np.concatenate(parts)


def answers_of(
    backup: MeasuredBackup,
    images: Array,
    scores: Array,
    labels: IntegerArray | None,
    grouping: Grouping,
    begin: Callable[[str, int], GroupsDone],
) -> MeasuredAnswers:
    """Gives what a backup answers for every group of `grouping`.

    Args:
        backup: who answers.
        images: uint8 `[images, height, width, 3]`, of the classifier's size.
        scores: the classifier's, `[images, classes]`.
        labels: `[images]`; without them there are no groups of one class.
        grouping: which groups.
        begin: takes the name and size of the work, and gives a function that takes its progress.
    """
    full_size, seed = backup.code.max_items, grouping.seed
    full = [shuffled_groups(len(images), full_size, seed + shuffle) for shuffle in range(grouping.shuffles)]
    # A cheap model answers each item by itself, so it is the same in any group.
    sizes = range(1, full_size) if grouping.partly and not isinstance(backup.code, Cheap) else ()
    some = [shuffled_groups(len(images), items, seed) for items in sizes]
    same = [same_class_groups(labels, full_size, seed)] if grouping.same_class and labels is not None else []
    progress = begin(backup.method, sum(map(len, [*full, *some, *same])))
    found = [collect(backup, images, scores, groups, progress) for groups in full]
    fills = Fills.join([each for each, _ in found])
    unhurt = [each for _, each in found if each is not None]
    by_items = [(groups.shape[1], collect(backup, images, scores, groups, progress)[0]) for groups in some]
    return MeasuredAnswers(
        fills,
        Fills.join(unhurt) if unhurt else None,
        [*by_items, (full_size, fills)] if some else (),
        collect(backup, images, scores, same[0], progress)[0] if same else None,
    )


def pass_times_ms(
    one_pass: Callable[[], object], backups: Sequence[MeasuredBackup], images: Array, rounds: int
) -> Array:
    """Times the classifier's pass, then those of each backup for a full group, in turn: `[rounds, 1 + backups]`."""
    return interleaved_times_ms([one_pass, *(_full_group(backup, images) for backup in backups)], rounds)


def from_scores(scores: Array, confidences: Array) -> Fills:
    """Takes the classifier's own answers for every image from its scores `[images, classes]`."""
    return Fills(np.arange(len(scores)), scores.argmax(axis=1).astype(np.int64), np.asarray(confidences, np.float64))


def collect(
    backup: MeasuredBackup, images: Array, scores: Array, groups: IntegerArray, progress: GroupsDone = lambda done: None
) -> tuple[Fills, Fills | None]:
    """Gives a backup's fills for every group, and its answers with nothing lost where those are approximate too.

    Args:
        backup: who answers.
        images: uint8 `[images, height, width, 3]`, as items come.
        scores: the classifier's, `[images, classes]`: the replies of primaries, where those are the items themselves.
        groups: numbers of images `[groups, items]`; fewer items than the code may hold make partly filled groups.
        progress: called after some groups with their number.
    """
    code, count = backup.code, groups.shape[1]
    lost_one, lost_none = _Collector(), _Collector()
    for some in _blocks(groups, _encoded(code, images[groups[0]])):
        for group, tasks, outputs in _run(backup, images, some):
            if code.systematic:
                spares = {count + number: output for number, output in enumerate(outputs)}
                primaries = {place: scores[image][None] for place, image in enumerate(group.tolist())}
                if code.uses_primaries:
                    for place in range(count):
                        known = code.decode(count, _without(place, primaries) | spares)
                        lost_one.add(group, known, [place])
                else:
                    lost_one.add(group, code.decode(count, spares), range(count))
            else:
                replies = dict(enumerate(outputs))
                lost_none.add(group, code.decode(count, replies), range(count))
                for number in range(len(tasks)):
                    lost_one.add(group, code.decode(count, _without(number, replies)), range(count))
        progress(len(some))
    return lost_one.fills(), None if code.systematic else lost_none.fills()


def spare_tasks(code: BackupCode, items: Iterable[Array]) -> list[Task]:
    """Makes the spare tasks of a group of items."""
    return code.spares([code.prepare(item) for item in items])


def same_class_groups(labels: IntegerArray, size: int, seed: int) -> IntegerArray:
    """Makes groups `[groups, size]` of distinct images of one class; what does not fill a group is left out.

    Raises:
        ConfigurationError: no class has so many images.
    """
    random = np.random.default_rng(seed)
    parts = []
    for label in np.unique(labels):
        own = random.permutation(np.flatnonzero(labels == label))
        parts.append(own[: len(own) // size * size].reshape(-1, size))
    groups = np.concatenate(parts)
    if not len(groups):
        raise ConfigurationError(f"same-class: no class has {size} images; give more images")
    return groups


class _Collector:
    """Gathers answers, item by item."""

    def __init__(self) -> None:
        self._images: list[int] = []
        self._answers: list[int] = []
        self._confidences: list[float] = []

    def add(self, group: IntegerArray, known: Mapping[int, Answer], places: Iterable[int]) -> None:
        """Adds what is known of the items at these places of a group."""
        for place in places:
            answer = known.get(place)
            self._images.append(int(group[place]))
            self._answers.append(NO_ANSWER if answer is None else int(answer.value.argmax()))
            self._confidences.append(0.0 if answer is None else answer.confidence)

    def fills(self) -> Fills:
        return Fills(
            np.array(self._images, np.int64), np.array(self._answers, np.int64), np.array(self._confidences, np.float64)
        )


def _full_group(backup: MeasuredBackup, images: Array) -> Callable[[], object]:
    """Gives what runs all spare tasks of one full group."""
    inputs = [task.inputs for task in spare_tasks(backup.code, list(images[: backup.code.max_items]))]

    def run() -> None:
        for rows in inputs:
            backup.run(rows)

    return run


def _blocks(groups: IntegerArray, tasks: Sequence[Task]) -> Iterator[IntegerArray]:
    """Gives as many groups at a time as one pass may hold."""
    row = max(task.inputs[0].nbytes for task in tasks)
    rows = sum(len(task.inputs) for task in tasks)
    at_once = max(1, min(_MAX_ROWS, _MAX_BYTES // row) // rows)
    for first in range(0, len(groups), at_once):
        yield groups[first : first + at_once]


def _run(
    backup: MeasuredBackup, images: Array, groups: IntegerArray
) -> Iterator[tuple[IntegerArray, list[Task], list[Array]]]:
    """Gives for each group the tasks that the backup's model runs, and its outputs."""
    encoded = [_encoded(backup.code, images[group]) for group in groups]
    outputs = backup.run(np.concatenate([task.inputs for tasks in encoded for task in tasks]))
    at = 0
    for group, tasks in zip(groups, encoded, strict=True):
        own = []
        for task in tasks:
            own.append(outputs[at : at + len(task.inputs)])
            at += len(task.inputs)
        yield group, tasks, own


def _encoded(code: BackupCode, items: Array) -> list[Task]:
    """Makes the tasks that the backup's model runs."""
    return spare_tasks(code, items) if code.systematic else code.encode(list(items))


def _without(number: int, replies: Mapping[int, Array]) -> dict[int, Array]:
    return {other: reply for other, reply in replies.items() if other != number}
