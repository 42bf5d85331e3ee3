"""Gives the labels of images the classifier's class numbers: by name, or by what the classifier itself answers.

Labels are never taken by their place. Sorted folders need not be in the order of the classifier's scores, and a wrong
order is not seen afterwards: names would be served for other classes, and confidence fitted to nonsense. So a label is
matched by its name or its number; where that cannot be done, the classifier's own answers on the labelled images must
show which class it is.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evenkeel.arrays import IntegerArray, PixelArray
from evenkeel.errors import ConfigurationError
from evenkeel.figures.estimates import Estimate, share
from evenkeel.text_values import is_text, read_json

__all__ = [
    "Numbering",
    "Skill",
    "number_alike",
    "number_by_asking",
    "number_labels",
    "read_class_names",
    "sample_by_label",
]

_CLEAR = 3.1  # standard deviations; by chance once in a thousand
_NAMED = 1.4  # standard deviations against each single swap, once the order as a whole is clear
_LEAST_SKILL = 0.1  # of the way from chance to always right; below it the classifier is near chance
_ASKED = 500  # images that show which label is which class
_MAX_BYTES = 16 << 20  # of a file of class names
_SHOWN = 5


@dataclass(frozen=True)
class Skill:
    """Counts the labelled images, of `count`, that the classifier gets right, and says what chance would.

    Attributes:
        hits: images that are given the class of their label.
        count: of all.
        chance: the share of hits if answers and labels had nothing to do with each other.
    """

    hits: int
    count: int
    chance: float

    @property
    def right(self) -> Estimate:
        """Estimates the share of hits."""
        return share(self.hits, self.count)

    @property
    def near_chance(self) -> bool:
        """True if the answers have little to do with the labels."""
        above = self.hits / max(1, self.count) - self.chance
        spread = math.sqrt(self.chance * (1 - self.chance) / max(1, self.count))
        return above <= max(_CLEAR * spread, _LEAST_SKILL * (1 - self.chance))


@dataclass(frozen=True)
class Numbering:
    """Says how labels become class numbers, and what the classifier itself makes of them.

    Attributes:
        numbers: class of each label; None where labels cannot be used.
        class_names: of the classifier's classes as far as they are known, else their numbers.
        how: labels were matched, in a clause.
        skill: what the classifier makes of the labels; None where they cannot be used.
        misplaced: what speaks against the matching, in a clause; empty where nothing does.
    """

    numbers: tuple[int, ...] | None
    class_names: tuple[str, ...]
    how: str
    skill: "Skill | None" = None
    misplaced: str = ""

    @property
    def trusted(self) -> bool:
        """True if the labels are good enough to calibrate with."""
        return self.skill is not None and not self.skill.near_chance and not self.misplaced

    def lines(self) -> list[str]:
        """Says what a user should know of it, line by line."""
        if self.skill is None:
            return [
                f"labels are left aside: {self.how}; a model card, or fit --classes FILE, says what they are called"
            ]
        lines = [f"labels are matched with the classifier's classes {self.how}"]
        right, chance = self.skill.right, self.skill.chance
        lines.append(
            f"the classifier itself is right for {right.value:.1%} of {self.skill.count:,} labelled images "
            f"({right.low:.1%} to {right.high:.1%}; by chance {chance:.1%})"
        )
        if self.skill.near_chance:
            lines.append(
                "WARNING: that is near chance. Check how its input is made (--scale, --mean, --std, --bgr, --layout), "
                "and that the labels are those of its classes"
            )
        if self.misplaced:
            lines.append(
                f"WARNING: {self.misplaced}, clearly more often than right: the names or numbers of the classes seem "
                "to be in another order than the classifier's scores"
            )
        if not self.trusted:
            lines.append("confidence is not calibrated with these labels, but with the classifier's answers")
        return lines

    def numbered(self, labels: IntegerArray | None) -> IntegerArray | None:
        """Turns `labels` into class numbers; None where they cannot be used."""
        if labels is None or self.numbers is None:
            return None
        return np.array(self.numbers, np.int64)[labels]


def number_labels(
    labels: IntegerArray,
    names: Sequence[str] | None,
    class_names: Sequence[str] | None,
    classes: int,
    answers: IntegerArray,
) -> Numbering:
    """Turns the labels of images into class numbers.

    Args:
        labels: of some labelled images, as their source numbers them.
        names: of those labels; None where the labels are numbers of classes themselves.
        class_names: of the classifier; None where they are not known.
        classes: how many the classifier tells apart.
        answers: the classifier's answers to the same images, class numbers.

    Raises:
        ConfigurationError: numbers that the classifier cannot give; names of which only some are the classifier's.
    """
    if names is None:
        if labels.size and not 0 <= labels.min() <= labels.max() < classes:
            raise ConfigurationError(
                f"the images' labels go from {labels.min()} to {labels.max()}, but the classifier has {classes} "
                f"classes, numbered from 0 to {classes - 1}; read the images without labels (--labels none), or give "
                "the numbers of its classes"
            )
        found = tuple(range(classes))
        return _judged(found, class_names or _numbers(classes), "as numbers of classes", labels, answers, classes)
    counts = _counts(labels, answers, len(names), classes)
    there = np.flatnonzero(counts.any(axis=1)).tolist()
    by_name = _by_name(names, class_names)
    if by_name is None and class_names is None:
        by_name = _by_number(names, classes)
    if by_name is not None:
        missing = [label for label in there if by_name[label] < 0]
        if missing and len(missing) < len(there):
            proven = _proven(counts, missing, taken={number for number in by_name if number >= 0})
            if proven is None:
                raise ConfigurationError(
                    f"the images' classes {_listed([names[label] for label in missing])} are none of the classifier's, "
                    f"while {_listed([names[label] for label in there if label not in missing])} are; name them as "
                    "the classifier does, leave them out, or read the images without labels (--labels none)"
                )
            by_name = [proven.get(label, number) for label, number in enumerate(by_name)]
            how = f"by name, and {_listed([names[label] for label in missing])} by the classifier's own answers"
            return _judged(tuple(by_name), class_names or _numbers(classes), how, labels, answers, classes)
        if not missing:
            known = class_names or _numbers(classes)
            how = "by name" if class_names is not None else "by the numbers that they are named by"
            return _judged(tuple(by_name), known, how, labels, answers, classes)
    return _by_proof(names, class_names, counts, labels, answers, classes)


def number_alike(
    known: Numbering,
    known_names: Sequence[str] | None,
    labels: IntegerArray,
    names: Sequence[str] | None,
    answers: IntegerArray,
) -> Numbering | None:
    """Turns labels into class numbers as others of the same names were matched already; None where they are others.

    Args:
        known: how those were.
        known_names: of those labels.
        labels: of the images at hand.
        names: of these labels.
        answers: the classifier's, to these images.
    """
    if known.numbers is None or known_names is None or names is None:
        return None
    matched = dict(zip(known_names, known.numbers, strict=True))
    numbers = tuple(matched.get(name, -1) for name in names)
    if any(numbers[label] < 0 for label in np.unique(labels).tolist()):
        return None
    return _judged(numbers, known.class_names, known.how, labels, answers, len(known.class_names))


def number_by_asking(
    scores: Callable[[PixelArray], NDArray[Any]],
    pixels: PixelArray,
    labels: IntegerArray,
    names: Sequence[str] | None,
    class_names: Sequence[str] | None,
    classes: int,
) -> Numbering:
    """Turns `labels` of images into class numbers, by asking the classifier about some of them.

    Args:
        scores: of the classifier, for images uint8 [n, height, width, 3].
        pixels: of all images.
        labels: of all of them.
        names: as for `number_labels`, as are the rest and what is raised.
        class_names: the same.
        classes: the same.
    """
    some = np.sort(np.random.default_rng(0).permutation(len(labels))[:_ASKED])
    chosen = sample_by_label(labels, some)
    parts = [scores(pixels[chosen[first : first + 100]]).argmax(axis=1) for first in range(0, len(chosen), 100)]
    answers = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    return number_labels(labels[chosen], names, class_names, classes, answers)


def sample_by_label(labels: IntegerArray, chosen: IntegerArray, least: int = 10) -> IntegerArray:
    """Places of `chosen` images and, for every label that has fewer of them, of up to `least` in all."""
    labels = np.unique(labels, return_inverse=True)[1].reshape(-1)  # however large the numbers are
    places = [chosen]
    have = np.bincount(labels[chosen], minlength=int(labels.max(initial=0)) + 1)
    spare = np.setdiff1d(np.arange(len(labels)), chosen)
    order = spare[np.argsort(labels[spare], kind="stable")]
    begins = np.searchsorted(labels[order], np.arange(len(have)))
    for label in np.flatnonzero(have < least).tolist():
        own = order[begins[label] :][: least - have[label]]
        places.append(own[labels[own] == label])
    return np.concatenate(places)


def read_class_names(path: str | Path, classes: int) -> tuple[str, ...]:
    """Reads the names of a classifier's classes from a text file with one a line, or a JSON list or object by number.

    Raises:
        ConfigurationError: not readable, not UTF-8, or another number of names than `classes`.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"classes {path} cannot be read: {error.strerror or error}") from error
    if len(content) > _MAX_BYTES:
        raise ConfigurationError(f"classes {path} has more than {_MAX_BYTES:,} bytes; it is no list of class names")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"classes {path} is not UTF-8 text ({error}); save it as UTF-8") from error
    names = _names_of_json(text, path) if path.suffix.lower() == ".json" else _names_of_lines(text)
    if len(names) != classes:
        raise ConfigurationError(f"classes {path} lists {len(names):,} names, but the classifier has {classes} classes")
    for name in names:
        if not name or not is_text(name):
            raise ConfigurationError(f"classes {path}: {name!r} is no name; give each class one, as text")
    return tuple(names)


def _names_of_lines(text: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    # Lists that number their lines: `0 tench`, `0: tench`, `0<tab>tench`.
    numbered = [re.fullmatch(r"(\d+)\s*[:,\s]\s*(\S.*)", line) for line in lines]
    if lines and all(match and int(match[1]) == place for place, match in enumerate(numbered)):
        return [match[2] for match in numbered if match]
    return lines


def _names_of_json(text: str, path: Path) -> list[str]:
    try:
        found: Any = read_json(text)
    except ValueError as error:
        raise ConfigurationError(f"classes {path} is not JSON: {error}") from error
    if isinstance(found, dict):
        wanted = list(map(str, range(len(found))))
        if set(found) == set(wanted):
            found = [found[number] for number in wanted]
        elif sorted(map(repr, found.values())) == sorted(map(repr, range(len(found)))):  # name -> number
            found = sorted(found, key=lambda name: found[name])
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ConfigurationError(
            f"classes {path} must hold a list of names, or an object from numbers 0, 1, ... to names"
        )
    return found


def _by_name(names: Sequence[str], class_names: Sequence[str] | None) -> list[int] | None:
    """Finds the class of each name, -1 where it is none of the classifier's; None where no name is."""
    if class_names is None:
        return None
    if tuple(names) == tuple(class_names):  # a name may be there twice, as in ImageNet; then only the number tells
        return list(range(len(names)))
    numbers = [-1] * len(names)
    # The same spelling before a similar one, and the whole name before a part of it.
    for keys in (lambda name: {name}, lambda name: {_key(name)}, _parts):
        own = _unique([keys(name) for name in names])
        others = _unique([keys(name) for name in class_names])
        for key, label in own.items():
            number = others.get(key)
            if number is not None and numbers[label] < 0 and number not in numbers:
                numbers[label] = number
    return numbers if any(number >= 0 for number in numbers) else _by_number(names, len(class_names))


def _by_number(names: Sequence[str], classes: int) -> list[int] | None:
    """Gives the classes that names such as "0", "1", "10" number; None where they are no such names."""
    if not all(re.fullmatch(r"[0-9]{1,9}", name.strip()) for name in names):
        return None
    numbers = [int(name) for name in names]
    fitting = len(set(numbers)) == len(numbers) and max(numbers) < classes
    return numbers if fitting else None


def _key(name: str) -> str:
    """Drops from a name what people write differently: case, spaces, underscores, form of accents, leading zeros."""
    plain = re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()
    return str(int(plain)) if re.fullmatch(r"[0-9]{1,9}", plain) else plain


def _parts(name: str) -> set[str]:
    """Gives a name's synonyms, as in `tench, Tinca tinca`, and its WordNet number, as in `n01440764 tench`."""
    parts = {_key(part) for part in name.split(",")} | {_key(name)}
    number = re.match(r"(n\d{8})\b", name.strip())
    return parts | ({number[1]} if number else set())


def _unique(keys: Sequence[set[str]]) -> dict[str, int]:
    """Gives the place of each key that stands in one place only."""
    found: dict[str, int] = {}
    twice = set()
    for place, own in enumerate(keys):
        for key in own:
            if key in found:
                twice.add(key)
            found[key] = place
    return {key: place for key, place in found.items() if key not in twice}


def _by_proof(
    names: Sequence[str],
    class_names: Sequence[str] | None,
    counts: IntegerArray,
    labels: IntegerArray,
    answers: IntegerArray,
    classes: int,
) -> Numbering:
    """Numbers labels by the classifier's answers: in an order that people use, if one fits, or label by label."""
    there = np.flatnonzero(counts.any(axis=1)).tolist()
    if len(names) == classes:
        for order in _usual_orders(names):
            if _fits(counts, order):
                known = class_names or _names_in(order, names, counts, classes)
                how = "by their order, which the classifier's own answers confirm"
                return _judged(order, known, how, labels, answers, classes)
    proven = _proven(counts, there, taken=set())
    if proven is None:
        unknown = (
            "the classifier's names are not known" if class_names is None else "none is a name of the classifier's"
        )
        how = (
            f"names of labels ({_listed(names)}) cannot be matched with the classifier's {classes} classes: {unknown}, "
            "and its answers do not show which class is which"
        )
        return Numbering(None, tuple(class_names or _numbers(classes)), how)
    numbers = tuple(proven.get(label, -1) for label in range(len(names)))
    known = list(class_names or _numbers(classes))
    if class_names is None:
        for label, number in proven.items():
            known[number] = names[label]
    return _judged(numbers, _distinct(known), "by the classifier's own answers", labels, answers, classes)


def _usual_orders(names: Sequence[str]) -> list[tuple[int, ...]]:
    """Orders that classes are numbered in: as given, and sorted with numbers as numbers (2 before 10)."""

    def natural(label: int) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", names[label].casefold())
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]

    orders = []
    for labels in (range(len(names)), sorted(range(len(names)), key=natural)):
        order = [0] * len(names)
        for number, label in enumerate(labels):
            order[label] = number
        orders.append(tuple(order))
    return list(dict.fromkeys(orders))


def _fits(counts: IntegerArray, order: Sequence[int]) -> bool:
    """True if the classifier's answers confirm that label i is class `order[i]`."""
    return not _skill(counts, order).near_chance and not _misplaced(counts, order)


def _misplaced(counts: IntegerArray, order: Sequence[int], clear: float = _CLEAR) -> list[tuple[int, int]]:
    """Finds labels, each with a class that its images are clearly given instead and that no other label claims.

    A label whose images go to a class that has images of its own is a mistake of the classifier's, not of the order.
    """
    best = counts.argmax(axis=1)
    at_home = {
        number for label, number in enumerate(order) if number >= 0 and counts[label, number] and best[label] == number
    }
    found = []
    for label in np.flatnonzero(counts.any(axis=1)).tolist():
        number, other = order[label], int(best[label])
        own = int(counts[label, number]) if number >= 0 else 0
        more = int(counts[label, other])
        if other != number and other not in at_home and more - own > clear * np.sqrt(more + own):
            found.append((label, other))
    return found


def _swappable(counts: IntegerArray, order: Sequence[int]) -> set[int]:
    """Finds the labels with images that may as well stand in the place of another such label."""
    seen = np.flatnonzero(counts.any(axis=1))
    given = counts[np.ix_(seen, np.array(order)[seen])]  # of label i, the class of label j
    own = np.diag(given)
    here, there = own[:, None] + own[None, :], given + given.T
    open_pairs = here - there < _NAMED * np.sqrt(here + there)
    np.fill_diagonal(open_pairs, False)
    return set(seen[open_pairs.any(axis=1)].tolist())


def _names_in(order: Sequence[int], names: Sequence[str], counts: IntegerArray, classes: int) -> tuple[str, ...]:
    """Gives the names in an order that fits; a number for each class that its own images do not bear out.

    Two labels in each other's place leave the order as a whole as clear as it was, so each pair must show that it is
    not swapped: more of its images are given their own class than the other's.
    """
    known = list(_numbers(classes))
    unseen = np.flatnonzero(~counts.any(axis=1)).tolist()
    unsure = {label for label, _ in _misplaced(counts, order, clear=0.0)} | _swappable(counts, order)
    unsure |= set(unseen) if len(unseen) > 1 else set()  # a single one is what is left
    for label, number in enumerate(order):
        if label not in unsure:
            known[number] = names[label]
    return _distinct(known)


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Gives names, of which those that stand in for a number of another class say that they are numbers."""
    taken = [name for place, name in enumerate(names) if name != str(place)]
    return tuple(f"class {name}" if name == str(place) and name in taken else name for place, name in enumerate(names))


def _proven(counts: IntegerArray, labels: Sequence[int], taken: set[int]) -> dict[int, int] | None:
    """Gives the class of each of `labels` if most of its images are given it, and no other label's are."""
    found: dict[int, int] = {}
    for label in labels:
        number = int(counts[label].argmax())
        if share(int(counts[label, number]), int(counts[label].sum())).low <= 0.5 or number in taken:
            return None
        taken = taken | {number}
        found[label] = number
    return found


def _judged(
    numbers: tuple[int, ...],
    class_names: Sequence[str],
    how: str,
    labels: IntegerArray,
    answers: IntegerArray,
    classes: int,
) -> Numbering:
    counts = _counts(labels, answers, len(numbers), classes)
    wrong = _misplaced(counts, numbers)
    said = [f"{class_names[numbers[label]]!r} are answered {class_names[other]!r}" for label, other in wrong[:_SHOWN]]
    misplaced = f"images of {', of '.join(said)}{', ...' if len(wrong) > _SHOWN else ''}" if wrong else ""
    return Numbering(numbers, tuple(class_names), how, _skill(counts, numbers), misplaced)


def _counts(labels: IntegerArray, answers: IntegerArray, named: int, classes: int) -> IntegerArray:
    """Counts the images of each label that got each answer `[labels, classes]`."""
    found = np.bincount(labels * classes + answers, minlength=named * classes)
    return found.reshape(named, classes)


def _skill(counts: IntegerArray, order: Sequence[int]) -> Skill:
    total = int(counts.sum())
    used = [(label, number) for label, number in enumerate(order) if number >= 0]
    hits = sum(int(counts[label, number]) for label, number in used)
    rows, columns = counts.sum(axis=1) / max(1, total), counts.sum(axis=0) / max(1, total)
    return Skill(hits, total, float(sum(rows[label] * columns[number] for label, number in used)))


def _numbers(classes: int) -> tuple[str, ...]:
    return tuple(map(str, range(classes)))


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(map(str, names[:_SHOWN]))}{', ...' if len(names) > _SHOWN else ''}"
