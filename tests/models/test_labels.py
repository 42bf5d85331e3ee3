"""Labels become class numbers by name or by proof, and never by their place."""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest

from evenkeel.errors import ConfigurationError
from evenkeel.models.labels import (
    Numbering,
    number_alike,
    number_by_asking,
    number_labels,
    read_class_names,
    sample_by_label,
)

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def answered(
    names: Sequence[str] | None,
    truth: Sequence[int],
    *,
    class_names: Sequence[str] | None = None,
    classes: int | None = None,
    each: int = 40,
    right: float = 0.9,
    seed: int = 0,
) -> Numbering:
    """The numbering of `each` images a label, of which the class is `truth[label]` and the classifier mostly right."""
    random = np.random.default_rng(seed)
    classes = len(class_names or truth) if classes is None else classes
    labels = np.repeat(np.arange(len(truth)), each)
    wrong = random.integers(0, classes, len(labels))
    answers = np.where(random.random(len(labels)) < right, np.array(truth)[labels], wrong)
    return number_labels(labels, names, class_names, classes, answers)


@pytest.mark.parametrize(
    ("names", "class_names", "numbers"),
    [
        (("cat", "dog", "ship"), CIFAR, (3, 5, 8)),
        (("Cat", "DOG", "Ship "), CIFAR, (3, 5, 8)),
        (("polar_bear", "sea-lion"), ("ant", "sea lion", "Polar Bear"), (2, 1)),
        (("cafe\u0301", "tee"), ("tee", "caf\u00e9"), (1, 0)),
        (("n01440764", "n01443537"), ("n01443537 goldfish", "n01440764 tench"), (1, 0)),
        (("goldfish", "tench"), ("tench, Tinca tinca", "goldfish, Carassius auratus"), (1, 0)),
        (("0", "1", "10", "11", "2"), None, (0, 1, 10, 11, 2)),
        (("00", "07", "11"), None, (0, 7, 11)),
        (("3", "5"), CIFAR, (3, 5)),
        (("2", "1"), ("1", "2", "0"), (1, 0)),
        (None, CIFAR, tuple(range(10))),
        (("crane", "dog", "crane"), ("crane", "dog", "crane"), (0, 1, 2)),
    ],
)
def test_labels_are_matched_by_name(
    names: tuple[str, ...] | None, class_names: tuple[str, ...] | None, numbers: tuple[int, ...]
) -> None:
    found = answered(names, numbers, class_names=class_names, classes=None if class_names else 12)
    assert found.numbers == numbers
    assert found.trusted
    assert found.class_names == (class_names or tuple(map(str, range(12))))
    labels = np.arange(len(numbers))
    assert found.numbered(labels).tolist() == list(numbers)  # type: ignore[union-attr]


def test_a_name_that_stands_for_two_classes_is_not_guessed() -> None:
    class_names = ("crane", "dog", "crane", "ship")
    assert answered(("crane", "dog"), (2, 1), class_names=class_names).numbers == (2, 1)  # by the answers
    with pytest.raises(ConfigurationError, match="classes crane are none of the classifier's"):
        answered(("crane", "dog"), (2, 1), class_names=class_names, right=0.3)


def test_folders_in_another_order_get_the_names_of_their_own_classes() -> None:
    """Sorted folders blue, green, red; scores red, green, blue."""
    found = answered(("blue", "green", "red"), (2, 1, 0))
    assert found.numbers == (2, 1, 0)
    assert found.class_names == ("red", "green", "blue")
    assert found.trusted


def test_an_order_that_the_answers_confirm_is_taken() -> None:
    found = answered(CIFAR, range(10), right=0.4)
    assert found.numbers == tuple(range(10))
    assert found.class_names == CIFAR
    assert "order" in found.how


def test_folders_sorted_as_text_are_taken_in_the_order_of_their_numbers() -> None:
    names = tuple(sorted(f"class{number}" for number in range(12)))
    truth = [int(name.removeprefix("class")) for name in names]
    found = answered(names, truth, right=0.45)
    assert found.numbers == tuple(truth)
    assert found.class_names == tuple(f"class{number}" for number in range(12))
    from_one = tuple(sorted(str(number) for number in range(1, 13)))
    found = answered(from_one, [int(name) - 1 for name in from_one], right=0.45)
    assert found.class_names == tuple(map(str, range(1, 13)))


def test_a_subset_is_matched_by_the_answers_and_else_left_aside() -> None:
    """Three folders and a bare classifier of ten classes: 0, 1, 2 would be wrong for sure."""
    found = answered(("cat", "dog", "ship"), (3, 5, 8), classes=10)
    assert found.numbers == (3, 5, 8)
    assert (found.class_names[3], found.class_names[4], found.class_names[8]) == ("cat", "4", "ship")
    unsure = answered(("cat", "dog", "ship"), (3, 5, 8), classes=10, right=0.3)
    assert unsure.numbers is None
    assert unsure.numbered(np.array([0, 1])) is None
    assert unsure.class_names == tuple(map(str, range(10)))
    assert not unsure.trusted
    assert "left aside" in unsure.lines()[0]


def test_other_images_of_the_same_names_are_matched_alike() -> None:
    """Also where a class is too rare among these to be known by them alone."""
    known = answered(("blue", "green", "red", "grey"), (2, 1, 0, 3))
    labels, answers = np.array([0] * 30 + [2]), np.array([1] * 31)
    found = number_alike(known, ("blue", "green", "red", "grey"), labels, ("red", "violet", "blue"), answers)
    assert found is not None
    assert found.numbered(labels).tolist() == [0] * 30 + [2]  # type: ignore[union-attr]
    assert not found.trusted
    other = np.array([1])
    assert number_alike(known, ("blue", "green", "red", "grey"), other, ("red", "violet", "blue"), answers[:1]) is None
    assert number_alike(known, None, labels, ("red",), answers) is None


def test_names_of_other_things_than_classes_are_left_aside() -> None:
    random = np.random.default_rng(0)
    months, answers = random.integers(0, 3, 600), random.integers(0, 10, 600)
    for class_names in (None, CIFAR):
        found = number_labels(months, ("2020-01", "2020-02", "2020-03"), class_names, 10, answers)
        assert found.numbers is None


def test_two_classes_in_each_others_place_are_noticed() -> None:
    names, truth = CIFAR, [0, 1, 2, 5, 4, 3, 6, 7, 8, 9]
    bare = answered(names, truth)
    assert bare.class_names == (*CIFAR[:3], "dog", "deer", "cat", *CIFAR[6:])
    weak = answered(names, truth, right=0.4)  # too weak to prove where each belongs
    assert weak.numbers is None
    assert weak.class_names == tuple(map(str, range(10)))
    carded = answered(names, truth, class_names=CIFAR)
    assert carded.numbers == tuple(range(10))
    assert "'cat' are answered 'dog'" in carded.misplaced
    assert not carded.trusted


def test_too_few_images_of_a_class_give_it_no_name() -> None:
    labels = np.array([*np.repeat(np.arange(8), 50), 8, 8, 9, 9])
    answers = np.array([*np.repeat(np.arange(8), 50), 9, 9, 8, 8])  # the last two are in each other's place
    found = number_labels(labels, CIFAR, None, 10, answers)
    assert found.class_names == (*CIFAR[:8], "8", "9")
    unseen = number_labels(labels[:400], CIFAR, None, 10, answers[:400])
    assert unseen.class_names == (*CIFAR[:8], "8", "9")


def test_mistakes_of_the_classifier_are_not_taken_for_another_order() -> None:
    labels = np.repeat(np.arange(10), 50)
    answers = np.where(labels == 3, 5, labels)  # every cat is called a dog
    found = number_labels(labels, CIFAR, None, 10, answers)
    assert found.numbers == tuple(range(10))
    assert not found.misplaced


def test_a_name_beside_its_classes_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="classes lorry are none of the classifier's, while cat are"):
        answered(("cat", "lorry"), (3, 9), class_names=CIFAR, right=0.2)
    assert answered(("cat", "lorry"), (3, 9), class_names=CIFAR).numbers == (3, 9)


def test_a_classifier_at_chance_is_noticed() -> None:
    for right, near in ((0.0, True), (0.5, False)):
        found = answered(None, range(10), classes=10, right=right)
        assert found.skill is not None
        assert found.skill.near_chance is near
        assert found.trusted is not near
        assert any("near chance" in line for line in found.lines()) is near
    labels = np.array([0] * 390 + [1] * 10)  # 97.5 % right by always saying the same
    always = number_labels(labels, None, None, 2, np.zeros(400, np.int64))
    assert always.skill is not None
    assert always.skill.near_chance


def test_numbers_that_count_from_one_are_not_taken_for_the_classes_beside_them() -> None:
    shifted = answered(None, [0, *range(9)], classes=10)  # labels 1..9 of classes 0..8
    assert not shifted.trusted
    with pytest.raises(ConfigurationError, match="from 0 to 12, but the classifier has 10 classes"):
        number_labels(np.array([0, 12]), None, None, 10, np.array([0, 1]))


def test_names_hardly_ever_stand_for_another_class() -> None:
    """Whatever the order of the folders, a name that is served is that of the images which get this answer.

    Two folders in each other's place are the hardest to see. Few and bad answers show too little, so it is a rate:
    at most one order in five hundred, where taking the order that fits would be wrong in one of forty.
    """
    wrong = 0
    for seed in range(2000):
        random = Random(seed)
        classes = random.choice([2, 3, 4, 6, 10, 30])
        truth = list(range(classes))
        if seed % 2:
            random.shuffle(truth)
        else:
            one, other = random.sample(range(classes), 2)
            truth[one], truth[other] = truth[other], truth[one]
        names = [f"kind {number}" for number in range(classes)]
        right, each = random.choice([0.1, 0.3, 0.6, 0.95]), random.choice([3, 15, 60])
        found = answered(names, truth, right=right, each=each, seed=seed)
        wrong += any(found.class_names[number] not in (names[label], str(number)) for label, number in enumerate(truth))
    assert wrong <= 4


def test_an_order_that_fits_names_the_classes_of_few_images() -> None:
    for classes, each, right, share in ((10, 15, 0.6, 0.95), (30, 3, 0.95, 0.9), (100, 5, 0.8, 0.8)):
        names = [f"kind {number}" for number in range(classes)]
        found = answered(names, range(classes), right=right, each=each)
        assert sum(name.startswith("kind") for name in found.class_names) >= share * classes


def test_rare_labels_are_asked_about_too() -> None:
    labels = np.array([0] * 5000 + [1] * 4 + [2] * 30)
    chosen = sample_by_label(labels, np.arange(1000))
    assert np.bincount(labels[chosen]).tolist() == [1000, 4, 10]
    assert len(set(chosen.tolist())) == len(chosen)
    large = np.array([0, 10**12, 0, 10**12])
    assert sample_by_label(large, np.array([0]), least=2).tolist() == [0, 2, 1, 3]
    asked = []

    def scores(pixels: np.ndarray) -> np.ndarray:
        asked.append(len(pixels))
        return np.eye(3)[pixels[:, 0, 0, 0]]

    pixels = labels.astype(np.uint8)[:, None, None, None]
    found = number_by_asking(scores, pixels, labels, ("c", "a", "b"), None, 3)
    assert found.class_names[0] == "c"
    assert sum(asked) < 1100


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.txt", b"ant\nbee\nwasp\n\n"),
        ("labels.txt", b"\xef\xbb\xbf0: ant\r\n1: bee\r\n2: wasp"),
        ("labels.csv", b"0,ant\n1,bee\n2,wasp\n"),
        ("labels.json", b'["ant", "bee", "wasp"]'),
        ("labels.json", b'{"1": "bee", "0": "ant", "2": "wasp"}'),
        ("labels.json", b'{"bee": 1, "ant": 0, "wasp": 2}'),
    ],
)
def test_class_names_are_read_from_usual_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_class_names(tmp_path / name, 3) == ("ant", "bee", "wasp")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("labels.txt", b"ant\nbee\n", "lists 2 names, but the classifier has 3"),
        ("labels.txt", b"ant\n\nbee\n", "'' is no name"),
        ("labels.txt", b"caf\xe9\nbee\nant\n", "not UTF-8"),
        ("labels.json", b"{", "not JSON"),
        ("labels.json", b'{"a": 5, "b": 5, "c": 5}', "must hold a list of names"),
        ("labels.json", json.dumps(["\ud800", "b", "c"]).encode(), "is no name"),
    ],
)
def test_files_that_name_no_classes_are_refused(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=why):
        read_class_names(tmp_path / name, 3)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_class_names(tmp_path / "none.txt", 3)
