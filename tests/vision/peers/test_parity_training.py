"""Parity models: made by serving's encoders, decoded by serving's code."""

import copy
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from evenkeel.coding.answers.parity import ConcatEncoder, Parity, ParityEncoder, SumEncoder
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.coding.answers.tiles import Pixels
from evenkeel.errors import EvenkeelError
from evenkeel.models.cards import Encoder, load_card
from evenkeel.vision.networks.architecture import ClassifierNet
from evenkeel.vision.networks.data import CIFAR10_MEAN, CIFAR10_STD, LabelledImages
from evenkeel.vision.networks.train_classifier import normalise
from evenkeel.vision.peers.export import export_parity
from evenkeel.vision.peers.parity_training import (
    ParityRecipe,
    decoded_accuracy,
    encode_groups,
    parity_encoder,
    parity_network,
    train_parity,
)
from evenkeel.vision.peers.training import TrainingRun

CLASSES = tuple("abcdefghij")
SMALL = (8, 16, 16)
KINDS: list[tuple[Encoder, int]] = [("sum", 2), ("sum", 3), ("sum", 4), ("concat", 2), ("concat", 4)]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def some_images(count: int, seed: int = 0) -> LabelledImages:
    """Ten flat colours under noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (count,), generator=generator)
    colours = torch.randint(40, 216, (10, 3, 1, 1), generator=torch.Generator().manual_seed(9))
    noise = torch.randint(-20, 21, (count, 3, 32, 32), generator=generator)
    return LabelledImages((colours[labels] + noise).to(torch.uint8), labels)


def a_base(images: LabelledImages) -> ClassifierNet:
    """A classifier that has learned the colours."""
    torch.manual_seed(3)
    network = ClassifierNet(10, SMALL)
    inputs = normalise(images.pixels)
    network.set_whitening(inputs)
    optimiser = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 0.02)
    for _ in range(30):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(network(inputs), images.labels, label_smoothing=0.1).backward()
        optimiser.step()
    return network.eval()


class Mirrored:
    """Two views of each image, as it is and mirrored, scored by `base`; remembers what was taken."""

    views = 2

    def __init__(self, images: LabelledImages, base: ClassifierNet) -> None:
        self.images, self.base = images, base
        self.taken: list[list[tuple[int, int]]] = []

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, images: "torch.Tensor", views: "torch.Tensor") -> "torch.Tensor":
        self.taken.append(list(zip(images.tolist(), views.tolist(), strict=True)))
        plain = self.images.pixels[images]
        return torch.where(views[:, None, None, None] == 1, plain.flip(3), plain)

    def scores(self, images: "torch.Tensor", views: "torch.Tensor") -> "torch.Tensor":
        with torch.no_grad():
            return self.base(normalise(self.pixels(images, views)))


@pytest.fixture(scope="module")
def images() -> LabelledImages:
    return some_images(96)


@pytest.fixture(scope="module")
def base(images: LabelledImages) -> ClassifierNet:
    torch.set_num_threads(1)
    return a_base(images)


def nhwc(pixels: "torch.Tensor") -> "np.ndarray":
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def test_a_sum_parity_is_the_sum_of_normalised_items(images: LabelledImages) -> None:
    found = encode_groups(parity_encoder("sum", 3, 32), images.pixels[:6])
    wanted = normalise(images.pixels[:6]).unflatten(0, (2, 3)).sum(1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_concatenation_holds_squeezed_items_in_their_quadrants(images: LabelledImages) -> None:
    found = encode_groups(parity_encoder("concat", 4, 32), images.pixels[:8])
    assert found.shape == (2, 3, 32, 32)
    halves = torch.nn.functional.avg_pool2d(images.pixels[4:8].float(), 2)
    cells = [found[1, :, :16, :16], found[1, :, :16, 16:], found[1, :, 16:, :16], found[1, :, 16:, 16:]]
    scale = torch.tensor(CIFAR10_STD).reshape(3, 1, 1) * 255
    for cell, half in zip(cells, halves, strict=True):
        pixels = cell * scale + torch.tensor(CIFAR10_MEAN).reshape(3, 1, 1) * 255
        torch.testing.assert_close(pixels.mean((1, 2)), half.mean((1, 2)), rtol=0, atol=1.0)


@pytest.mark.parametrize(("kind", "group"), KINDS)
def test_what_is_exported_is_fed_and_decoded_by_the_shipped_code(
    kind: Encoder, group: int, images: LabelledImages, base: ClassifierNet, tmp_path: Path
) -> None:
    recipe = ParityRecipe(kind, group)
    network = parity_network(base, recipe, Mirrored(images, base), from_base=True)
    card = export_parity(network, kind, group, "parity", CLASSES, 32, {"a": 1}, tmp_path)
    assert load_card(tmp_path / "parity.json") == card
    assert (card.kind, card.encoder, card.group) == ("parity", kind, group)

    pixels = Pixels.from_card(card)
    encoder: ParityEncoder = SumEncoder(group, pixels) if kind == "sum" else ConcatEncoder(group, 32, 32, pixels)
    code = Parity(encoder, ScoreForm.from_card(card))
    items = images.pixels[:group]
    (task,) = code.spares([code.prepare(item) for item in nhwc(items)])
    session = onnxruntime.InferenceSession(str(tmp_path / card.file), providers=["CPUExecutionProvider"])
    (reply,) = session.run(["scores"], {"images": task.inputs})
    with torch.no_grad():
        primaries = base(normalise(items)).numpy()
        trained_on = network.eval()(encode_groups(parity_encoder(kind, group, 32), items))[0].numpy()

    # The file sees exactly what training showed, up to weights in half precision ...
    np.testing.assert_allclose(reply[0], trained_on, atol=0.01 * np.abs(trained_on).max())
    # ... and with one primary missing, the shipped decoder subtracts what is known from it.
    for missing in range(group):
        replies = {item: primaries[item : item + 1] for item in range(group) if item != missing}
        answer = code.decode(group, replies | {group: reply})[missing]
        known = primaries.sum(0) - primaries[missing]
        np.testing.assert_allclose(answer.value, reply[0] - known, atol=1e-4)
        assert answer.source == "decoded"


def test_decoded_accuracy_takes_each_item_of_a_group_away_in_turn() -> None:
    scores = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 3, 4, 4]), 10).float()
    labels = torch.tensor([0, 1, 2, 3, 4, 5])

    class Perfect(torch.nn.Module):
        def forward(self, inputs: "torch.Tensor") -> "torch.Tensor":
            return scores.unflatten(0, (-1, 3)).sum(1)

    accuracy, agreement = decoded_accuracy(Perfect(), torch.zeros(2, 3, 32, 32), scores, labels)
    assert agreement == 1.0
    assert accuracy == pytest.approx(5 / 6)


@pytest.mark.parametrize(("kind", "group", "from_base"), [("sum", 2, True), ("sum", 3, False), ("concat", 4, True)])
def test_training_brings_the_sum_of_scores_nearer(
    kind: Encoder, group: int, from_base: bool, images: LabelledImages, base: ClassifierNet
) -> None:
    views, held = Mirrored(some_images(384, seed=4), base), some_images(48, seed=5)
    inputs = encode_groups(parity_encoder(kind, group, 32), held.pixels)
    with torch.no_grad():
        targets = base(normalise(held.pixels)).unflatten(0, (-1, group)).sum(1)
    spread = float((targets - targets.mean(0)).square().mean())

    @torch.no_grad()
    def error(network: ClassifierNet) -> float:
        return float((network.eval()(inputs) - targets).square().mean())

    # So short a training ends anywhere: the middle one of three is what it comes to.
    found = []
    for seed in (1, 2, 3):
        recipe = ParityRecipe(kind, group, epochs=8, batch=8, rate=0.03, seed=seed)
        before = error(parity_network(base, recipe, views, from_base))
        network, notes = train_parity(base, views, held, recipe, from_base, report=lambda line: None)
        found.append((error(network), before))
    after, before = sorted(found)[1]
    assert after < before
    assert after < 0.9 * spread  # better than the best that can be said without a look at the parity
    assert notes["weights_from_base"] is from_base
    assert notes["epochs"] == pytest.approx(8, abs=0.3)


def test_targets_are_of_the_views_that_made_the_parity(images: LabelledImages, base: ClassifierNet) -> None:
    views = Mirrored(images, base)
    train_parity(base, views, images, ParityRecipe("sum", 2, epochs=0.2, batch=8), report=lambda line: None)
    shown = views.taken
    assert shown[0::2] == shown[1::2]  # pixels are taken, then scores: the very same views
    assert {view for step in shown for _, view in step} == {0, 1}


def test_a_training_that_is_broken_off_goes_on_with_other_items(
    images: LabelledImages, base: ClassifierNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = ParityRecipe("sum", 2, epochs=2, batch=8)
    checkpoint = tmp_path / "parity.checkpoint"

    class BreaksOff(Mirrored):
        def pixels(self, images: "torch.Tensor", views: "torch.Tensor") -> "torch.Tensor":
            if len(self.taken) == 6:
                raise KeyboardInterrupt
            return super().pixels(images, views)

    # Checkpoints come by the minute; here, at every step.
    monkeypatch.setattr("evenkeel.vision.peers.training._CHECKPOINT_EVERY_S", -1.0)
    first = BreaksOff(images, base)
    with pytest.raises(KeyboardInterrupt):
        train_parity(base, first, images, recipe, checkpoint=checkpoint, report=lambda line: None)
    second = Mirrored(images, base)
    _, notes = train_parity(base, second, images, recipe, checkpoint=checkpoint, report=lambda line: None)
    assert notes["steps"] == 3 + len(second.taken) // 2
    assert notes["epochs"] == pytest.approx(2, abs=0.2)
    assert second.taken[0] not in first.taken

    finished = Mirrored(images, base)
    network, _ = train_parity(base, finished, images, recipe, checkpoint=checkpoint, report=lambda line: None)
    assert finished.taken == []  # nothing is left to do
    assert not network.training


def test_rates_fall_to_zero_by_time_as_by_items(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("evenkeel.vision.peers.training.time.monotonic", lambda: now[0])
    layer = torch.nn.Linear(2, 2)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.5)
    run = TrainingRun(layer, [optimiser], minutes=2, items=100, seed=0, checkpoint=None)
    rates = []
    for _ in range(3):
        now[0] += 30
        assert run.advance(0.0, 10)
        rates.append(optimiser.param_groups[0]["lr"])
    assert rates == pytest.approx([0.375, 0.25, 0.125])
    now[0] += 1000
    assert not run.advance(0.0, 10)
    assert optimiser.param_groups[0]["lr"] == 0
    assert list(run.passes()) == []

    by_items = TrainingRun(
        layer, [torch.optim.SGD(layer.parameters(), lr=0.5)], minutes=2, items=20, seed=0, checkpoint=None
    )
    assert by_items.advance(0.0, 10)
    assert not by_items.advance(0.0, 10)


def test_rates_go_on_falling_in_a_training_that_is_taken_up_again(tmp_path: Path) -> None:
    def run() -> TrainingRun:
        layer = torch.nn.Linear(2, 2)
        optimiser = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9)
        return TrainingRun(layer, [optimiser], minutes=60, items=100, seed=0, checkpoint=tmp_path / "run")

    first = run()
    first.advance(0.0, 40)
    first.save()
    second = run()
    assert (second.step, second.shown) == (1, 40)
    second.advance(0.0, 30)
    assert second.optimisers[0].param_groups[0]["lr"] == pytest.approx(0.6, abs=0.01)


def test_divergence_and_a_foreign_checkpoint_are_said_plainly(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)

    def run(network: "torch.nn.Module", checkpoint: Path | None) -> TrainingRun:
        optimiser = torch.optim.SGD(network.parameters(), lr=0.5)
        return TrainingRun(network, [optimiser], minutes=1, items=10, seed=0, checkpoint=checkpoint)

    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(EvenkeelError, match="diverged; start it again with a lower rate"):
        run(layer, None).advance(float("nan"), 1)
    torch.testing.assert_close(layer.state_dict(), before)
    run(layer, tmp_path / "a").save()
    with pytest.raises(EvenkeelError, match=r"another training .*remove it"):
        run(torch.nn.Linear(3, 2), tmp_path / "a")
