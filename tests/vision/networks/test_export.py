"""ONNX files: they compute what torch computes, and a classifier's card tells what was measured."""

from pathlib import Path

import numpy as np
import pytest
import torch

from evenkeel.models.cards import load_card
from evenkeel.models.measure import ModelSession
from evenkeel.vision.networks.architecture import ClassifierNet, CollageNet, TileNet
from evenkeel.vision.networks.export import export_classifier, fold_norms, write_onnx
from evenkeel.vision.networks.train_classifier import ClassifierRecipe, normalise, train_classifier
from fit_helpers import easy_images, trained_a_little

BRIEF = ClassifierRecipe(epochs=12, batch=48, widths=(16, 24, 32), workers=2)


@pytest.mark.parametrize(("grid", "side", "coarse"), [(1, 32, False), (2, 32, False), (3, 48, False), (3, 32, True)])
def test_the_file_computes_what_torch_computes(grid: int, side: int, coarse: bool, tmp_path: Path) -> None:
    torch.manual_seed(2)
    network = CollageNet(fold_norms(trained_a_little(TileNet(10, (8, 16, 24), side, coarse))), grid, side)
    whole = grid * side
    assert write_onnx(network, tmp_path / "model.onnx", whole) < 1e-3
    session = ModelSession.open(tmp_path / "model.onnx")
    images = np.random.default_rng(0).integers(0, 256, (7, whole, whole, 3), dtype=np.uint8)
    together, alone = session(images), session(images, batch=1)
    assert together.shape == (7, grid * grid, 10)
    assert np.abs(together - alone).max() < 1e-3  # the batch dimension is free


def test_a_channel_that_is_the_same_for_all_images_does_no_harm(tmp_path: Path) -> None:
    """Few images of few classes leave such channels; their variance of zero once made weights that are infinite."""
    network = trained_a_little(TileNet(10, (8, 16, 24)))
    norm = next(module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d))
    norm.running_var[2] = 0.0  # type: ignore[index]
    folded = CollageNet(fold_norms(network), 2, 32)
    assert all(torch.isfinite(parameter).all() for parameter in folded.parameters())
    assert write_onnx(folded, tmp_path / "model.onnx", 64) < 1e-3


def test_a_classifier_learns_and_its_card_tells_what_was_measured(tmp_path: Path) -> None:
    train, held, test = easy_images(480, 0), easy_images(48, 1), easy_images(144, 2)
    lines: list[str] = []
    network, notes = train_classifier(train, held, BRIEF, report=lines.append)
    assert any("held-out accuracy" in line for line in lines)
    names = tuple("abcdefghij")
    card = export_classifier(network, notes, "colours", "flat colours", names, held, test, tmp_path, rounds=3)
    assert load_card(tmp_path / "colours.json") == card
    assert card.accuracy is not None
    assert card.accuracy.value > 0.9
    assert card.latency_ms > 0
    assert card.notes["data"] == "flat colours"
    assert card.notes["largest_difference_from_torch"] < 1e-3


def test_a_stopped_training_goes_on_where_it_was(tmp_path: Path) -> None:
    train, held = easy_images(480, 0), easy_images(36, 1)
    path = tmp_path / "base.checkpoint"
    lines: list[str] = []
    train_classifier(train, held, BRIEF, path, lines.append)
    again, _ = train_classifier(train, held, BRIEF, path, lines.append)
    steps = [line for line in lines if "step" in line]
    assert sum("step 1 of" in line for line in steps) == 1  # the second call finds everything done
    with torch.no_grad():
        found = again(normalise(train.pixels)).argmax(1)
    assert (found == train.labels).float().mean() > 0.9


def test_workers_share_the_gradient_of_the_whole_batch() -> None:
    """Two threads with parts of a batch give the gradient that one network gives for all of it."""
    from evenkeel.vision.networks import train_classifier as module

    torch.manual_seed(0)
    network = ClassifierNet(10, (8, 8, 8)).eval()  # with fixed statistics, so that parts do not differ from the whole
    images = easy_images(250, 3)
    workers = [module._Worker(network) for _ in range(2)]
    for worker in workers:
        worker.network.eval()
    loss = module._gradients(network, workers, images.pixels, images.labels, 0.1)
    shared = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
    network.zero_grad()
    whole = torch.nn.functional.cross_entropy(network(normalise(images.pixels)), images.labels, label_smoothing=0.1)
    whole.backward()
    assert loss == pytest.approx(whole.item(), rel=1e-4)
    own = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert len(own) == len(shared)
    for expected, found in zip(own, shared, strict=True):
        assert torch.allclose(expected, found, atol=1e-5)
