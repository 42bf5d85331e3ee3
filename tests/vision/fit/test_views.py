"""The bank of views: what a view is, and that every one is scored once and as it is shown."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from evenkeel.errors import ConfigurationError
from evenkeel.vision.fit.views import ViewBank

IMAGES = np.random.default_rng(0).integers(0, 256, (300, 12, 16, 3), dtype=np.uint8)


def first_pixels(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Scores that say exactly which view was shown: every pixel of the first two rows."""
    return images[:, :2].reshape(len(images), -1).astype(np.float32)


CLASSES = 2 * 16 * 3


def make(path: Path, **options: object) -> ViewBank:
    return ViewBank(IMAGES, CLASSES, path, **options)  # type: ignore[arg-type]


def test_each_view_is_scored_once_and_as_it_is_shown(tmp_path: Path) -> None:
    bank = make(tmp_path / "scores.npy", views=5, reach=3)
    assert bank.missing == 1500
    assert sum(bank.fill(first_pixels)) == 1500
    assert bank.missing == 0
    images, views = torch.randint(0, 300, (64,)), torch.randint(0, 5, (64,))
    shown = bank.pixels(images, views).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(first_pixels(shown), bank.scores(images, views).numpy())


def test_view_zero_is_the_image_and_odd_views_are_mirrored(tmp_path: Path) -> None:
    bank = make(tmp_path / "scores.npy", views=4, reach=0)
    every = torch.arange(300)
    for view in range(4):
        shown = bank.pixels(every, torch.full((300,), view)).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(shown, IMAGES[:, :, ::-1] if view % 2 else IMAGES)


def test_without_mirror_no_view_is_mirrored(tmp_path: Path) -> None:
    bank = make(tmp_path / "scores.npy", views=2, reach=0, mirror=False)
    shown = bank.pixels(torch.arange(300), torch.ones(300, dtype=torch.long))
    assert np.array_equal(shown.permute(0, 2, 3, 1).numpy(), IMAGES)


@given(reach=st.integers(0, 5), seed=st.integers(0, 2**31), view=st.integers(1, 6))
@settings(deadline=None, max_examples=25)
def test_a_view_is_the_image_moved_with_reflected_edges(
    tmp_path_factory: pytest.TempPathFactory, reach: int, seed: int, view: int
) -> None:
    path = tmp_path_factory.mktemp("views") / "scores.npy"
    bank = make(path, views=7, reach=reach, seed=seed)
    numbers = torch.tensor([3, 77, 250])
    shown = bank.pixels(numbers, torch.full((3,), view)).permute(0, 2, 3, 1).numpy()
    for number, found in zip(numbers.tolist(), shown, strict=True):
        image = IMAGES[number][:, ::-1] if view % 2 else IMAGES[number]
        padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
        moves = [padded[y : y + 12, x : x + 16] for y in range(2 * reach + 1) for x in range(2 * reach + 1)]
        assert any(np.array_equal(found, moved) for moved in moves)


def test_views_differ_between_images_and_seeds(tmp_path: Path) -> None:
    same = np.repeat(IMAGES[:1], 200, axis=0)
    banks = [ViewBank(same, CLASSES, tmp_path / f"{seed}.npy", views=3, reach=3, seed=seed) for seed in (0, 1)]
    views = torch.full((200,), 2)
    shown = [bank.pixels(torch.arange(200), views) for bank in banks]
    kinds = [len(torch.unique(each.flatten(1), dim=0)) for each in shown]
    assert min(kinds) > 40  # of 49 moves
    assert not torch.equal(*shown)


def test_what_was_scored_is_not_asked_again(tmp_path: Path) -> None:
    bank = make(tmp_path / "scores.npy", views=2)
    parts = bank.fill(first_pixels)
    next(parts)
    parts.close()
    again = make(tmp_path / "scores.npy", views=2)
    scored: list[int] = []

    def counting(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        scored.append(len(images))
        return first_pixels(images)

    assert sum(again.fill(counting)) == sum(scored) == 600 - 200
    assert again.missing == 0


def test_a_file_of_other_images_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "scores.npy", views=2)
    with pytest.raises(ConfigurationError, match="other images or views"):
        make(tmp_path / "scores.npy", views=3)


@pytest.mark.parametrize("damage", ["cut", "short", "header", "empty", "archive"])
def test_damaged_scores_are_told_with_what_to_do(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "scores.npy"
    make(path, views=2)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut": whole[:-1000],  # numpy alone would take the rest for zeros
            "short": whole[:50],
            "header": whole[:20] + b"{" + whole[21:],
            "empty": b"",
            "archive": b"PK" + whole[2:],
        }[damage]
    )
    with pytest.raises(ConfigurationError, match=r"scores\.npy cannot be read .*; remove it to have the images scored"):
        make(path, views=2)
    path.unlink()
    assert make(path, views=2).missing == 600


def test_scores_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    bank = make(tmp_path / "scores.npy", views=1)

    def broken(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        scores = first_pixels(images)
        scores[7] = np.inf
        return scores

    with pytest.raises(ConfigurationError, match="image 7 are not finite"):
        list(bank.fill(broken))


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be written"):
        make(tmp_path / "nowhere" / "scores.npy")


def test_a_row_that_is_half_written_is_scored_again(tmp_path: Path) -> None:
    bank = make(tmp_path / "scores.npy", views=2)
    list(bank.fill(first_pixels))
    stored = np.load(tmp_path / "scores.npy", mmap_mode="r+")
    stored[1, 7, 5:] = np.nan
    again = make(tmp_path / "scores.npy", views=2)
    assert again.missing == 1
    assert list(again.fill(first_pixels)) == [1]
    assert not np.isnan(np.load(tmp_path / "scores.npy")).any()


def test_a_stop_before_anything_is_scored_leaves_no_file_that_is_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "write_array_header_1_0", stopped)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "scores.npy")
    assert make(tmp_path / "scores.npy").missing == 1200


def test_a_pass_shows_all_images_and_of_those_to_learn_from_half_as_many(tmp_path: Path) -> None:
    images = np.zeros((100, 4, 4, 3), np.uint8)
    for more, shown in ((0, 100), (20, 100), (60, 60)):
        bank = ViewBank(
            images[: len(images) - more], 3, tmp_path / f"{more}.npy", views=1, others=images[len(images) - more :]
        )
        order = bank.order(torch.Generator().manual_seed(1))
        assert len(order) == len(set(order.tolist())) == bank.per_epoch == shown
        assert set(range(100 - more)) <= set(order.tolist())


def test_images_stay_where_they_are_and_are_seen_by_their_places(tmp_path: Path) -> None:
    """A copy of all images is what the memory of a large fit went into."""
    places, others = np.random.default_rng(1).permutation(300)[:120], IMAGES[:30].copy()
    bank = make(tmp_path / "scores.npy", reach=0, mirror=False, rows=places, others=others)
    assert np.shares_memory(bank._images.numpy(), IMAGES)
    assert np.shares_memory(bank._others.numpy(), others)
    assert (len(bank), bank.more) == (150, 30)
    chosen = torch.tensor([5, 149, 0, 120, 119])
    shown = bank.pixels(chosen, torch.tensor([0, 1, 2, 3, 0])).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(shown, np.concatenate([IMAGES[places], others])[chosen.numpy()])
