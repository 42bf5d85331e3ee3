"""A set of images is known again by a few kilobytes."""

import numpy as np
import pytest

from evenkeel.images.sketch import again, hashes, sketch


def some(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)


def test_images_are_known_again_and_others_are_not() -> None:
    learned = hashes(some(5000, 0))
    text = sketch(learned)
    assert len(text) < 12_000
    assert again(text, hashes(some(5000, 1))) == (0, pytest.approx(1024, rel=0.2))
    hits, judged = again(text, learned)
    assert hits == judged == 1024
    hits, judged = again(text, hashes(np.concatenate([some(400, 0), some(400, 2)])))
    assert hits / judged == pytest.approx(0.5, abs=0.15)
    assert hits > 50


def test_a_small_set_is_known_whole() -> None:
    images = some(100, 0)
    text = sketch(hashes(images))
    assert again(text, hashes(images[:7])) == (7, 7)
    assert again(text, hashes(images[:, :, ::-1])) == (0, 100)


@pytest.mark.parametrize("text", [None, 3, "", "no base64 at all", "AAAA"])
def test_what_is_no_sketch_knows_nothing(text: object) -> None:
    assert again(text, hashes(some(3, 0))) == (0, 0)
