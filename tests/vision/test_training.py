"""The networks and the loops, in seconds: what they promise at any size."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs evenkeel[train]")
pytest.importorskip("onnxruntime", reason="ONNX Runtime runs the models")
pytest.importorskip("onnx", reason="exporting needs evenkeel[train]")

from evenkeel.cards import load_card  # noqa: E402
from evenkeel.vision.architecture import Classifier, CollageNet, count_macs, count_parameters  # noqa: E402
from evenkeel.vision.data import Images  # noqa: E402
from evenkeel.vision.export import (  # noqa: E402
    Session,
    export_pair,
    fit_temperature,
    fold_norms,
    shuffled_collages,
    wilson,
    write_onnx,
)
from evenkeel.vision.train import (  # noqa: E402
    ClassifierRecipe,
    CollageRecipe,
    normalise,
    one_cycle,
    train_classifier,
    train_collage,
)

SMALL = (8, 16, 32)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def easy_images(count: int, seed: int) -> Images:
    """Ten flat colours under noise: learnable in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (count,), generator=generator)
    colours = torch.randint(40, 216, (10, 3, 1, 1), generator=torch.Generator().manual_seed(9))
    noise = torch.randint(-20, 21, (count, 3, 32, 32), generator=generator)
    return Images((colours[labels] + noise).to(torch.uint8), labels)


def trained_a_little(network: "torch.nn.Module") -> "torch.nn.Module":
    """`network` with weights and statistics away from their start, so that folding a norm has something to lose."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            size = module.num_features
            module.running_mean.copy_(torch.randn(size, generator=generator))
            module.running_var.copy_(torch.rand(size, generator=generator) + 0.5)
            module.bias.data.copy_(torch.randn(size, generator=generator))
    if isinstance(network, Classifier):
        network.set_whitening(normalise(easy_images(50, 0).pixels))
    return network.eval()


@pytest.mark.parametrize("grid", [1, 2, 3, 4])
def test_a_collage_network_answers_every_cell_of_any_grid(grid: int) -> None:
    scores = CollageNet().eval()(torch.zeros(2, 3, grid * 32, grid * 32))
    assert scores.shape == (2, grid * grid, 10)


def test_cell_order_is_row_by_row() -> None:
    network = trained_a_little(CollageNet())
    canvas = torch.zeros(1, 3, 96, 96)
    blank = network(canvas)
    canvas[:, :, 32:64, 64:96] = 3.0  # row 1, column 2: cell 5
    change = (network(canvas) - blank).abs().sum(2)[0]
    assert int(change.argmax()) == 5


def test_neighbours_reach_over_the_border() -> None:
    network = trained_a_little(CollageNet())
    canvas = torch.zeros(1, 3, 96, 96)
    blank = network(canvas)
    canvas[:, :, :32, :32] = 3.0
    assert not torch.equal(network(canvas)[0, 1], blank[0, 1])


def test_costs_are_counted_by_hand() -> None:
    assert count_macs(torch.nn.Conv2d(3, 8, 3, padding=1), (3, 10, 10)) == 3 * 8 * 9 * 100
    assert count_parameters(torch.nn.Linear(5, 4)) == 24
    assert count_macs(CollageNet(), (3, 96, 96)) == 9 * count_macs(CollageNet(), (3, 32, 32))


@pytest.mark.parametrize("kind", [Classifier, CollageNet])
def test_folded_norms_compute_the_same(kind: type) -> None:
    torch.manual_seed(1)
    network = trained_a_little(kind())
    images = torch.randn(4, 3, 32, 32)
    folded = fold_norms(network)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        expected, found = network(images), folded(images)
    assert (expected - found).abs().max() < 5e-3 * expected.abs().max()  # half-precision weights


@pytest.mark.parametrize(("kind", "side"), [(Classifier, 32), (CollageNet, 64)])
def test_the_file_computes_what_torch_computes(kind: type, side: int, tmp_path: Path) -> None:
    torch.manual_seed(2)
    network = fold_norms(trained_a_little(kind()))
    assert write_onnx(network, tmp_path / "model.onnx", side) < 1e-3
    session = Session.open(tmp_path / "model.onnx")
    images = np.random.default_rng(0).integers(0, 256, (7, side, side, 3), dtype=np.uint8)
    together, alone = session(images), session(images, batch=1)
    assert np.abs(together - alone).max() < 1e-3  # the batch dimension is free


def test_both_loops_learn_and_a_pair_is_exported_with_cards(tmp_path: Path) -> None:
    train, held, test = easy_images(288, 0), easy_images(48, 1), easy_images(144, 2)
    lines: list[str] = []
    brief = ClassifierRecipe(epochs=3, batch=24, lookahead_every=2, widths=(16, 24, 32))
    base = train_classifier(train, held, brief, report=lines.append)
    net = train_collage(train, held, CollageRecipe(epochs=16, average=0.8, widths=SMALL), report=lines.append)
    assert base.notes["epochs"] >= 3
    assert net.notes["epochs"] >= 16
    assert lines
    notes = (base.notes, net.notes)
    cards = export_pair(base.network, net.network, notes, held, test, tmp_path, "colours", lines.append, rounds=5)
    assert [card.grid for card in cards] == [1, 2, 3, 4]
    for card in cards:
        assert load_card(tmp_path / f"{card.name}.json") == card
        assert card.accuracy is not None
        assert card.accuracy.value > 0.6
        assert card.notes["largest_difference_from_torch"] < 1e-3
        assert card.notes["data"] == "colours"
        assert card.temperature > 0
    assert list(cards[2].notes["accuracy_by_items_in_group"]) == [str(count) for count in range(1, 10)]


def test_a_stopped_training_goes_on_where_it_was(tmp_path: Path) -> None:
    train, held = easy_images(288, 0), easy_images(36, 1)
    path = tmp_path / "collage.checkpoint"
    first = train_collage(train, held, CollageRecipe(epochs=2, widths=SMALL), path, lambda line: None)
    second = train_collage(train, held, CollageRecipe(epochs=4, widths=SMALL), path, lambda line: None)
    assert second.notes["steps"] > first.notes["steps"]
    assert second.notes["training_seconds"] >= first.notes["training_seconds"]
    assert second.notes["epochs"] < 6  # not two and then four more


def test_a_teacher_is_heard() -> None:
    train, held = easy_images(288, 0), easy_images(36, 1)
    wrong = torch.nn.functional.one_hot((train.labels + 1) % 10, 10).float() * 12
    recipe = CollageRecipe(epochs=16, average=0.8, teaching=1.0, widths=SMALL)
    network = train_collage(train, held, recipe, None, lambda line: None, teacher_scores=wrong).network
    with torch.no_grad():
        found = network(normalise(train.pixels))[:, 0].argmax(1)
    assert (found == (train.labels + 1) % 10).float().mean() > 0.5


def test_the_learning_rate_rises_and_falls() -> None:
    assert one_cycle(0.0, 0.2, start=0.1) == pytest.approx(0.1)
    assert one_cycle(0.2, 0.2) == pytest.approx(1.0)
    assert one_cycle(0.6, 0.2) == pytest.approx(0.5)
    assert one_cycle(1.0, 0.2, end=0.03) == pytest.approx(0.03)


def test_a_wilson_interval_is_the_published_one() -> None:
    share = wilson(8, 10, "by hand")
    assert (share.low, share.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(0, 10, "").low == pytest.approx(0, abs=1e-9)


def test_the_fitted_temperature_is_the_one_the_scores_were_made_with() -> None:
    random = np.random.default_rng(0)
    true = random.normal(size=(20_000, 5)) * 2
    odds = np.exp(true) / np.exp(true).sum(axis=1, keepdims=True)
    labels = (odds.cumsum(axis=1) < random.random((20_000, 1))).sum(axis=1)
    assert fit_temperature((true * 3).astype(np.float32), labels) == pytest.approx(3, rel=0.05)


def test_measured_collages_use_each_image_at_most_once_and_mix_classes() -> None:
    cells = shuffled_collages(1000, 3, seed=3)
    assert cells.shape == (111, 9)
    assert len(np.unique(cells)) == cells.size
    assert np.abs(np.diff(cells.reshape(-1))).mean() > 200  # sorted by class it would be 1
