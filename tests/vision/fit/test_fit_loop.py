"""The fitting of a tile network: it learns from scores alone, and resumes bit for bit."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from evenkeel.backends.lossy.intervals import JpegForm
from evenkeel.coding.answers.tiles import Pixels, Tile
from evenkeel.errors import ConfigurationError
from evenkeel.vision.fit.loop import (
    FitRecipe,
    Held,
    blend,
    fit_tiles,
    shrink,
    soft_temperature,
    standardise,
    start_from,
    whiten,
)
from evenkeel.vision.fit.lossy_views import LossyViews
from evenkeel.vision.fit.views import ViewBank
from evenkeel.vision.networks.architecture import TileNet
from fit_helpers import easy_pixels

PIXELS, LABELS = easy_pixels(432, 0)
RECIPE = FitRecipe(epochs=4, tiles=36, average=0.9)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def bank(path: Path, turned: int = 0) -> ViewBank:
    made = ViewBank(PIXELS, 10, path, views=2, reach=1)
    scores = np.eye(10, dtype=np.float32)[(LABELS + turned) % 10] * 6
    place = 0

    def scorer(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        nonlocal place  # views are taken in order
        rows = scores[np.arange(place, place + len(images)) % len(scores)]
        place += len(images)
        return rows

    list(made.fill(scorer))
    return made


def network(views: ViewBank) -> TileNet:
    torch.manual_seed(0)
    made = TileNet(10, (16, 16, 32))
    whiten(made, views, 32)
    return made


@pytest.mark.parametrize("bfloat16", [False, True])
def test_it_learns_what_the_classifier_says_not_what_is_true(
    bfloat16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evenkeel.vision.fit.loop.bfloat16_is_fast", lambda device: bfloat16)
    views = bank(tmp_path / "s.npy", turned=1)
    fitted = network(views)
    losses = [step.loss for step in fit_tiles(fitted, views, RECIPE, tmp_path / "c")]
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        found = fitted(standardise(torch.from_numpy(PIXELS).permute(0, 3, 1, 2))).argmax(1).numpy()
    assert (found == (LABELS + 1) % 10).mean() > 0.8


def test_it_learns_what_is_left_of_an_image_by_a_link_that_loses_packets(tmp_path: Path) -> None:
    views = bank(tmp_path / "s.npy")
    lossy = LossyViews(0.9, 90)
    shown = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    remains = lossy(shown, torch.Generator().manual_seed(9))
    right = {}
    for name, recipe in (("whole", RECIPE), ("lossy", replace(RECIPE, lossy=0.9, quality=90, epochs=8))):
        fitted = network(views)
        list(fit_tiles(fitted, views, recipe, tmp_path / name))
        with torch.no_grad():
            right[name] = (fitted(standardise(remains)).argmax(1).numpy() == LABELS).mean()
    assert right["lossy"] > right["whole"] + 0.02
    with pytest.raises(ConfigurationError, match="is of"):  # a checkpoint of whole views does not go on with others
        next(fit_tiles(network(views), views, replace(RECIPE, lossy=0.9, quality=90), tmp_path / "whole"))


def test_lossy_views_are_the_transport_s_own_and_the_same_again() -> None:
    shown = torch.from_numpy(PIXELS[:40]).permute(0, 3, 1, 2)
    form = JpegForm(32, 32, 80)
    whole = torch.from_numpy(np.stack([form.decode(form.encode(one))[0] for one in PIXELS[:40]])).permute(0, 3, 1, 2)
    none, all_ = LossyViews(0.0, 80), LossyViews(0.95, 80)
    assert torch.equal(none(shown, torch.Generator().manual_seed(1)), whole)
    made = [all_(shown, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*made)
    changed = (made[0] != whole).flatten(1).any(1)
    assert 0.5 < changed.float().mean() < 0.95  # a quarter is whole
    blocks = (made[0] != whole).reshape(40, 3, 4, 8, 4, 8).any(5).any(3).any(1)
    assert 0.2 < blocks.float().mean() < 0.5  # three quarters of half of 0.95


@pytest.mark.parametrize("stopped", [1, 17, 47])
def test_a_stopped_fit_ends_with_the_same_weights_bit_for_bit(tmp_path: Path, stopped: int, monkeypatch) -> None:
    monkeypatch.setattr("evenkeel.vision.fit.loop._CHECKPOINT_EVERY_S", -1.0)  # at every step
    views = bank(tmp_path / "scores.npy")
    whole, parts = network(views), network(views)
    steps = [step.step for step in fit_tiles(whole, views, RECIPE, tmp_path / "whole")]
    assert steps == list(range(1, 49))
    for progress in fit_tiles(parts, views, RECIPE, tmp_path / "parts"):
        if progress.step == stopped:
            break
    resumed = network(views)
    rest = [step.step for step in fit_tiles(resumed, views, RECIPE, tmp_path / "parts")]
    assert rest == list(range(stopped + 1, 49))
    for name, expected in whole.state_dict().items():
        assert torch.equal(expected, resumed.state_dict()[name]), name


def test_a_fit_stops_where_it_agrees_enough_and_goes_on_where_more_is_wanted(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("evenkeel.vision.fit.loop._WATCHED_EVERY", 1)  # a look every eight steps
    views = bank(tmp_path / "scores.npy")
    whole, parts = network(views), network(views)
    held = Held(PIXELS[:300], LABELS[:300])
    seen = [(each.step, each.agreement) for each in fit_tiles(whole, views, RECIPE, tmp_path / "whole", held=held)]
    assert [step for step, _ in seen] == list(range(1, 49))  # looking on stops nothing
    assert seen[6][1] is None
    measured = [share for step, share in seen if step % 8 == 0]
    assert all(share is not None and 0 <= share <= 1 for share in measured)
    until = sorted(measured)[3]
    enough = next(step for step, share in seen if step % 8 == 0 and share >= until)
    assert enough < 48
    stopped = list(fit_tiles(parts, views, RECIPE, tmp_path / "parts", held=replace(held, until=until)))
    assert [each.step for each in stopped] == list(range(1, enough + 1))
    assert stopped[-1].agreement == seen[enough - 1][1]
    again = network(views)  # nothing is left to do, and the weights are the same
    told = list(fit_tiles(again, views, RECIPE, tmp_path / "parts", held=replace(held, until=until)))
    assert [(each.step, each.agreement) for each in told] == [(enough, stopped[-1].agreement)]
    further = network(views)
    rest = list(fit_tiles(further, views, RECIPE, tmp_path / "parts", held=held))
    assert [each.step for each in rest] == list(range(enough + 1, 49))
    for name, expected in whole.state_dict().items():
        assert torch.equal(expected, further.state_dict()[name]), name
    for name, expected in parts.state_dict().items():
        assert torch.equal(expected, again.state_dict()[name]), name


def test_a_fit_does_not_stop_for_the_first_few_images_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("evenkeel.vision.fit.loop._WATCHED", 30)
    monkeypatch.setattr("evenkeel.vision.fit.loop._WATCHED_EVERY", 1)
    views = bank(tmp_path / "scores.npy")
    wrong = np.concatenate([LABELS[:30], (LABELS[30:300] + 5) % 10])  # the others can never agree
    held = Held(PIXELS[:300], wrong, until=0.5)
    steps = list(fit_tiles(network(views), views, RECIPE, tmp_path / "c", held=held))
    assert steps[-1].step == 48
    assert steps[-1].agreement > 0.5


def test_the_checkpoint_of_another_fit_is_refused(tmp_path: Path) -> None:
    views = bank(tmp_path / "scores.npy")
    list(fit_tiles(network(views), views, replace(RECIPE, epochs=0.2), tmp_path / "c"))
    with pytest.raises(ConfigurationError, match="give the same arguments"):
        list(fit_tiles(network(views), views, replace(RECIPE, epochs=0.2, rate=0.01), tmp_path / "c"))


def test_a_checkpoint_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    views = bank(tmp_path / "scores.npy")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        list(fit_tiles(network(views), views, replace(RECIPE, epochs=0.1), tmp_path / "nowhere" / "c"))


def test_too_few_images_for_one_step_are_refused(tmp_path: Path) -> None:
    views = bank(tmp_path / "s.npy")
    steps = fit_tiles(network(views), views, replace(RECIPE, tiles=500), tmp_path / "c")
    with pytest.raises(ConfigurationError, match="too few"):
        next(steps)


def test_the_softening_temperature_is_found() -> None:
    logits = torch.randn(4000, 10, generator=torch.Generator().manual_seed(0)) * 9
    temperature = soft_temperature(logits, 0.6)
    assert (logits / temperature).softmax(1).amax(1).mean().item() == pytest.approx(0.6, abs=2e-3)


@pytest.mark.parametrize("side", [32, 48, 64])
def test_tiles_are_shrunk_in_training_as_they_are_in_serving(side: int) -> None:
    smooth = np.add.outer(np.arange(80), np.arange(96))[..., None] * np.ones(3)
    image = (smooth + np.random.default_rng(0).normal(0, 20, smooth.shape)).clip(0, 255).astype(np.uint8)
    trained = shrink(torch.from_numpy(image).permute(2, 0, 1)[None], side)[0].permute(1, 2, 0).numpy()
    served = Tile(side, side, Pixels(interpolation="bicubic"), crop=False).make(image)
    assert np.abs(trained.astype(int) - served.astype(int)).max() <= 2


def test_what_is_done_already_is_reported_once_with_its_time(tmp_path: Path) -> None:
    views, recipe = bank(tmp_path / "scores.npy"), replace(RECIPE, epochs=0.2)
    last = list(fit_tiles(network(views), views, recipe, tmp_path / "c"))[-1]
    again = network(views)
    reported = list(fit_tiles(again, views, recipe, tmp_path / "c"))
    assert [(each.step, each.steps, each.seconds) for each in reported] == [(last.step, last.steps, last.seconds)]


def test_weights_of_a_coarse_network_are_no_start_for_a_fine_one(tmp_path: Path) -> None:
    """They have the same shapes, but know maps of another scale."""
    views = bank(tmp_path / "s.npy")
    list(fit_tiles(network(views), views, replace(RECIPE, epochs=0.1), tmp_path / "3x3.checkpoint"))
    start_from(network(views), tmp_path)
    with pytest.raises(ConfigurationError, match="no checkpoint of a network of this size"):
        start_from(TileNet(10, (16, 16, 32), coarse=True), tmp_path)


def test_blends_are_taught_the_same_blend_of_probabilities() -> None:
    pixels = torch.zeros(40, 3, 2, 2, dtype=torch.uint8)
    pixels[20:] = 200
    taught = torch.tensor([[8.0, -8.0]] * 20 + [[-8.0, 8.0]] * 20)
    shown, said = blend(pixels, taught, torch.Generator().manual_seed(0))
    assert shown.dtype == torch.uint8
    share = shown.float().mean((1, 2, 3)) / 200
    torch.testing.assert_close(said.softmax(1)[:, 1], share, atol=0.01, rtol=0)
    assert ((share[20:] > 0.49).all(), (share[:20] < 0.51).all()) == (True, True)
    assert share.unique().numel() > 10
