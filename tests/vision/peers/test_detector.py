"""The paper's detector: its loss, its boxes, and what its file gives to the paper's decoder."""

import math
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from evenkeel.coding.answers.boxes import BoxCollage, cell_boxes
from evenkeel.coding.answers.collage import Collage
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.coding.answers.tiles import Pixels
from evenkeel.models.cards import load_card
from evenkeel.vision.networks.architecture import count_macs
from evenkeel.vision.networks.data import LabelledImages, collage
from evenkeel.vision.networks.train_classifier import normalise
from evenkeel.vision.peers.detector import Boxes, Detector, detector_loss, widest_detector
from evenkeel.vision.peers.detector_training import DetectorRecipe, boxed_classes, train_detector
from evenkeel.vision.peers.export import export_detector

CLASSES = tuple("abcdefghij")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Says(torch.nn.Module):
    """A detector that always says the same."""

    def __init__(self, raw: "torch.Tensor") -> None:
        super().__init__()
        self.raw = raw

    def forward(self, canvases: "torch.Tensor") -> "torch.Tensor":
        return self.raw


def ideal(labels: "torch.Tensor", blank: "torch.Tensor", grid: int) -> "torch.Tensor":
    """Raw predictions that leave nothing to wish for: the middle anchor at the middle of every tile that is there."""
    side = 4 * grid + 1
    raw = torch.zeros(len(labels), 3, side, side, 15)
    raw[..., 4] = -30.0
    for canvas in range(len(labels)):
        for cell in range(grid * grid):
            if not blank[canvas, cell]:
                at = raw[canvas, 1, 2 + 4 * (cell // grid), 2 + 4 * (cell % grid)]
                at[4] = 30.0
                at[5 + labels[canvas, cell]] = 30.0
    return raw


def some_cells(grid: int, count: int = 3) -> tuple["torch.Tensor", "torch.Tensor"]:
    generator = torch.Generator().manual_seed(grid)
    labels = torch.randint(0, 10, (count, grid * grid), generator=generator)
    blank = torch.rand(count, grid * grid, generator=generator) < 0.3
    blank[:, 0] = False
    return labels, blank


@pytest.mark.parametrize("grid", [2, 3, 4])
def test_what_the_loss_wants_is_what_the_decoder_reads(grid: int) -> None:
    labels, blank = some_cells(grid)
    raw = ideal(labels, blank, grid)
    assert float(detector_loss(raw, labels, blank, grid, 32)) == pytest.approx(0.0, abs=1e-5)

    boxes = Boxes(Says(raw), 32)(torch.zeros(1))
    assert boxes.shape == (3, 3 * (4 * grid + 1) ** 2, 15)
    for canvas in range(3):
        sure = boxes[canvas][boxes[canvas, :, 4] > 0.5]
        found = {tuple(box) for box in sure[:, :4].tolist()}
        there = ~blank[canvas].numpy()
        assert found == {tuple(box) for box in cell_boxes(grid, 32)[there].tolist()}  # to the pixel
    decoded = boxed_classes(boxes, grid, 32)
    assert torch.equal(decoded[~blank], labels[~blank])


def test_the_parts_of_the_loss_have_the_weights_of_the_public_code() -> None:
    labels, blank = some_cells(3, count=1)
    there = int((~blank).sum())

    def loss(change: "torch.Tensor", onto: slice | int) -> float:
        raw = ideal(labels, blank, 3)
        raw[:, 1, 2, 2, onto] = change
        return float(detector_loss(raw, labels, blank, 3, 32))

    # One tile is off in one respect; each mean is over the tiles that are there, or over all 507 anchors.
    assert loss(torch.tensor(math.log(9.0)), 0) == pytest.approx(0.4**2 / there, rel=1e-4)  # x: .9 in place of .5
    assert loss(torch.tensor(0.7), 3) == pytest.approx(0.7**2 / there, rel=1e-4)  # height
    assert loss(torch.tensor(0.0), 4) == pytest.approx(64 * math.log(2) / 507, rel=1e-4)  # objectness: undecided
    assert loss(torch.zeros(10), slice(5, 15)) == pytest.approx(math.log(10) / there / 4, rel=1e-4)  # class: undecided


def test_a_blank_cell_is_no_object_and_has_no_class() -> None:
    labels, blank = some_cells(3, count=1)
    blank[0, 4] = True
    raw = ideal(labels, torch.zeros_like(blank), 3).requires_grad_()
    gradient = torch.autograd.grad(detector_loss(raw, labels, blank, 3, 32), raw)[0][0, 1, 6, 6]
    assert gradient[4] > 0
    assert not gradient[5:].any()


@pytest.mark.parametrize("grid", [2, 3, 4])
def test_the_network_has_four_places_to_a_tile_for_any_grid(grid: int) -> None:
    raw = Detector(10, 4).eval()(torch.zeros(2, 3, 32 * grid, 32 * grid))
    assert raw.shape == (2, 3, 4 * grid + 1, 4 * grid + 1, 15)


def test_the_widest_detector_stays_within_its_cost() -> None:
    shape = (3, 96, 96)
    widest = widest_detector(2e7, 10, 3, 32)
    width = widest.features[0][0].out_channels
    assert count_macs(widest, shape) <= 2e7 < count_macs(Detector(10, width + 1), shape)


def test_boxes_of_wild_predictions_stay_finite() -> None:
    raw = torch.full((1, 3, 13, 13, 15), 1e6)
    boxes = Boxes(Says(raw), 32)(torch.zeros(1))
    assert torch.isfinite(boxes).all()
    assert float(boxes[..., 4].max()) <= 1.0


class Misnamed:
    """Flat colours under noise; the classifier gives every class the next one's name."""

    views = 2

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, 10, (count,), generator=generator)
        colours = torch.randint(0, 256, (10, 3, 1, 1), generator=torch.Generator().manual_seed(9))
        noise = torch.randint(-9, 10, (count, 3, 32, 32), generator=generator)
        self.stored = (colours[self.labels] + noise).clamp(0, 255).to(torch.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, images: "torch.Tensor", views: "torch.Tensor") -> "torch.Tensor":
        assert views.max() < 2
        return self.stored[images]

    def scores(self, images: "torch.Tensor", views: "torch.Tensor") -> "torch.Tensor":
        return torch.nn.functional.one_hot((self.labels[images] + 1) % 10, 10).float()


@pytest.fixture(scope="module")
def trained() -> Detector:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    train, held = Misnamed(400, 1), Misnamed(40, 2)
    recipe = DetectorRecipe(grid=2, epochs=9, collages=4)
    lines: list[str] = []
    network, notes = train_detector(
        Detector(10, 4), train, LabelledImages(held.stored, (held.labels + 1) % 10), recipe, report=lines.append
    )
    assert notes["epochs"] == pytest.approx(9, abs=0.1)
    assert "held-out accuracy" in lines[-1]
    return network


def test_training_finds_tiles_and_gives_them_the_classifiers_names(trained: Detector) -> None:
    test = Misnamed(80, 3)
    with torch.no_grad():
        boxes = Boxes(trained, 32)(normalise(collage(test.stored, 2)))
    found = boxed_classes(boxes, 2, 32).flatten()
    assert float((found == (test.labels + 1) % 10).float().mean()) > 0.5
    objectness = trained(normalise(collage(test.stored, 2)))[:, 1, :, :, 4]
    middles = objectness[:, [2, 2, 6, 6], [2, 6, 2, 6]]
    assert float(middles.detach().median()) > float(objectness.detach().median()) + 2


def test_the_exported_file_speaks_to_the_papers_decoder(trained: Detector, tmp_path: Path) -> None:
    card = export_detector(trained, 2, 32, "detector", CLASSES, {}, tmp_path)
    assert load_card(tmp_path / "detector.json") == card
    assert (card.kind, card.grid, card.tile_side, card.height) == ("detector", 2, 32, 64)
    code = BoxCollage(
        Collage(card.grid, card.tile_side, ScoreForm.from_card(card), pixels=Pixels.from_card(card), model=card.name)
    )
    test = Misnamed(4, 4)
    items = list(test.stored.permute(0, 2, 3, 1).contiguous().numpy())
    (task,) = code.spares([code.prepare(item) for item in items])
    session = onnxruntime.InferenceSession(str(tmp_path / card.file), providers=["CPUExecutionProvider"])
    (reply,) = session.run(["scores"], {"images": task.inputs})
    assert reply.shape == (1, 9 * 9 * 3, 15)
    answers = code.decode(4, {4: reply})
    with torch.no_grad():
        wanted = boxed_classes(Boxes(trained, 32)(normalise(collage(test.stored, 2))), 2, 32)[0]
    for cell, answer in answers.items():
        assert int(np.argmax(answer.value)) == int(wanted[cell])
        assert 0 < answer.confidence <= 1
    assert set(answers) == {cell for cell in range(4) if wanted[cell] >= 0}
    assert answers
