"""The size of a network is chosen by measured time."""

from collections.abc import Callable
from functools import cache

import pytest
import torch

from evenkeel.errors import ConfigurationError
from evenkeel.vision.fit import size as module
from evenkeel.vision.fit.size import Size, choose_own_side, choose_size, sizes, tile_sides
from evenkeel.vision.networks.architecture import count_macs


@cache
def macs(size: Size, grid: int = 1) -> int:
    return grid * grid * count_macs(size.fresh(10), (3, size.side, size.side))


@pytest.fixture
def by_macs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cost counted in place of measured: 20 million multiply-accumulates are one pass of the classifier."""
    monkeypatch.setattr(module, "_cost", lambda classifier, size, grid, *_: macs(size, grid) / 20e6)


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("coarse", [False, True])
def test_sizes_rise_in_cost(side: int, coarse: bool) -> None:
    costs = [macs(size) for size in sizes(side, coarse, widest=64)]
    assert costs == sorted(costs)
    assert len(set(costs)) == len(costs) > 10


@pytest.mark.usefixtures("by_macs")
@pytest.mark.parametrize("grid", [2, 3, 4])
@pytest.mark.parametrize("allowed", [4.0, 8.0, 30.0])
def test_the_largest_that_fits_is_taken(grid: int, allowed: float) -> None:
    chosen, cost = choose_size(lambda: None, grid, allowed, 10, 32, 32)
    assert cost <= allowed
    larger = [size for size in sizes(32, chosen.coarse) if macs(size) > macs(chosen)]
    assert macs(larger[0], grid) / 20e6 > allowed * module._MARGIN


@pytest.mark.usefixtures("by_macs")
def test_large_images_get_large_tiles_only_where_they_can_be_afforded() -> None:
    assert choose_size(lambda: None, 3, 200.0, 10, 224, 224)[0].side == 224
    assert 32 < choose_size(lambda: None, 3, 10.0, 10, 224, 224)[0].side < 224


@pytest.mark.usefixtures("by_macs")
def test_a_network_is_coarse_before_it_is_thin() -> None:
    chosen, _ = choose_size(lambda: None, 3, 5.0, 10, 32, 32)
    assert chosen.coarse
    assert chosen.widths >= (24, 88, 128)
    thin, _ = choose_size(lambda: None, 3, 1.0, 10, 32, 32)
    assert thin.coarse
    assert thin.widths < (24, 88, 128)
    assert not choose_size(lambda: None, 3, 20.0, 10, 32, 32)[0].coarse


@pytest.mark.usefixtures("by_macs")
@pytest.mark.parametrize("allowed", [8.0, 30.0, 300.0])
def test_large_tiles_are_coarse(allowed: float) -> None:
    chosen, _ = choose_size(lambda: None, 3, allowed, 100, 128, 128)
    assert chosen.coarse == (chosen.side >= 64)


@pytest.mark.usefixtures("by_macs")
def test_a_cost_that_nothing_meets_is_reported() -> None:
    with pytest.raises(ConfigurationError, match=r"smallest network costs .* 0.01 is allowed"):
        choose_size(lambda: None, 3, 0.01, 10, 32, 32)


def test_tiles_are_of_sixteens() -> None:
    assert tile_sides(32, 32) == [32]
    assert tile_sides(28, 28) == [32]
    assert tile_sides(100, 70) == [80, 64, 48, 32]
    assert tile_sides(48, 192) == [96, 80, 64, 48, 32]
    assert tile_sides(96, 32) == [48, 32]


def test_cost_is_measured_against_the_classifier() -> None:
    small, large = Size((8, 8, 16)), Size((16, 48, 96))
    burn = torch.randn(120, 120)

    def classifier() -> None:
        for _ in range(10):
            burn @ burn

    for precision in ("int8", "fp32"):
        assert module._cost(classifier, small, 2, 10, precision) < module._cost(classifier, large, 3, 10, precision)


def test_a_size_that_turns_out_to_cost_more_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine one measurement is too low; what is chosen must hold a second time."""
    seen: list[Size] = []

    def cost(classifier: object, size: Size, grid: int, *_: object) -> float:
        seen.append(size)
        again = seen.count(size) > 1
        return macs(size, grid) / 20e6 * (1.3 if again and len(set(seen)) < 12 else 1.0)

    monkeypatch.setattr(module, "_cost", cost)
    reported: list[int] = []
    chosen, found = choose_size(lambda: None, 3, 8.0, 10, 32, 32, "int8", reported.append)
    assert found <= 8.0
    assert seen.count(chosen) == 2
    assert len(reported) == len(seen)
    larger = [size for size in seen if seen.count(size) > 1 and size != chosen]
    assert larger


@pytest.mark.usefixtures("by_macs")
def test_progress_knows_how_many_sizes_are_measured() -> None:
    for side in (32, 64, 224):
        reported: list[int] = []
        choose_size(lambda: None, 3, 10.0, 10, side, side, "int8", reported.append)
        assert 0 < sum(reported) <= module.max_measured(side, side)


class Classifier:
    """A classifier of 224 pixels whose pass costs as much as its pixels."""

    height = width = 224
    classes = 10

    def one_pass(self) -> Callable[[], object]:
        return lambda: None


@pytest.mark.parametrize(("grid", "cost"), [(2, 0.6), (3, 0.6), (3, 1.5), (4, 1.0)])
def test_the_classifier_itself_reads_tiles_as_large_as_the_cost_allows(
    monkeypatch: pytest.MonkeyPatch, grid: int, cost: float
) -> None:
    monkeypatch.setattr(module, "_cost_of", lambda run, network, side, grid, *_: 1.1 * (grid * side / 224) ** 2)
    monkeypatch.setattr(Size, "network", lambda self, classifier: torch.nn.Identity())
    reported: list[int] = []
    size, measured = choose_own_side(Classifier(), grid, cost, "fp32", reported.append)  # type: ignore[arg-type]
    assert size.own
    assert measured <= 0.98 * cost < 1.1 * (grid * (size.side + 8) / 224) ** 2
    assert len(reported) <= module.max_own_measured(224, 224)


def test_what_blocks_cost_that_are_left_out_goes_into_the_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of four blocks is a fifth of the cost; without them a side may be found that is larger, or none."""
    measured: list[Size] = []

    def network(self: Size, classifier: object) -> torch.nn.Module:
        measured.append(self)
        return torch.nn.Identity()

    def cost(run: object, network: object, side: int, grid: int, *_: object) -> float:
        return (1 - measured[-1].left_out / 5) * (grid * side / 224) ** 2

    monkeypatch.setattr(module, "_cost_of", cost)
    monkeypatch.setattr(Size, "network", network)
    whole, _ = choose_own_side(Classifier(), 3, 0.6)  # type: ignore[arg-type]
    less, _ = choose_own_side(Classifier(), 3, 0.6, left_out=2, above=whole.side)  # type: ignore[arg-type]
    assert (whole.left_out, less.left_out) == (0, 2)
    assert whole.side < less.side <= whole.side * (5 / 3) ** 0.5 + 4
    with pytest.raises(ConfigurationError, match=f"at {less.side + 4} pixels a tile its pass costs"):
        choose_own_side(Classifier(), 3, 0.6, left_out=2, above=less.side)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="tiles below 228 say too little"):
        choose_own_side(Classifier(), 3, 0.6, above=224)  # type: ignore[arg-type]


def test_tiles_that_would_be_too_small_are_not_given_to_the_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_cost_of", lambda run, network, side, grid, *_: (grid * side / 224) ** 2)
    monkeypatch.setattr(Size, "network", lambda self, classifier: torch.nn.Identity())
    with pytest.raises(ConfigurationError, match=r"8x8 tiles itself at cost 0\.6: at 32 pixels a tile .* costs 1\.31"):
        choose_own_side(Classifier(), 8, 0.6)  # type: ignore[arg-type]


def refusing_below(least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a graph whose maps are too small for it with tiles below `least` pixels."""

    def network(self: Size, classifier: object) -> torch.nn.Module:
        if self.side < least:
            raise ConfigurationError(f"the operator MaxPool cannot take images of 3x{self.side}x{self.side}")
        return torch.nn.Identity()

    monkeypatch.setattr(module, "_cost_of", lambda run, network, side, grid, *_: (grid * side / 224) ** 2)
    monkeypatch.setattr(Size, "network", network)


@pytest.mark.parametrize("least", [33, 48, 84])
def test_sides_that_the_graph_cannot_take_are_passed_over(least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing_below(least, monkeypatch)
    size, measured = choose_own_side(Classifier(), 2, 0.6)  # type: ignore[arg-type]
    assert size.side >= least
    assert 0.5 < measured <= 0.6


@pytest.mark.parametrize(("grid", "cost", "wanted"), [(2, 0.6, 64), (2, 1.0, 96), (3, 0.6, 32), (1, 1.0, 224)])
def test_sides_that_halvings_divide_are_found_where_no_others_are_taken(
    grid: int, cost: float, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def network(self: Size, classifier: object) -> torch.nn.Module:
        if self.side % 32:
            raise ConfigurationError("the operator Add cannot take maps of 3x3 and 4x4")
        return torch.nn.Identity()

    monkeypatch.setattr(module, "_cost_of", lambda run, network, side, grid, *_: (grid * side / 224) ** 2)
    monkeypatch.setattr(Size, "network", network)
    assert choose_own_side(Classifier(), grid, cost / module._MARGIN)[0].side == wanted  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="cannot take maps"):
        choose_own_side(Classifier(), 8, 0.6)  # type: ignore[arg-type]


def test_a_graph_that_no_affordable_side_suits_is_told_with_both_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing_below(88, monkeypatch)
    with pytest.raises(
        ConfigurationError, match=r"MaxPool cannot take .*; and at 88 pixels a tile its pass costs 1\.39"
    ):
        choose_own_side(Classifier(), 3, 0.6)  # type: ignore[arg-type]
    refusing_below(1000, monkeypatch)
    with pytest.raises(ConfigurationError, match=r"MaxPool cannot take images of 3x\d+x\d+$"):
        choose_own_side(Classifier(), 3, 0.6)  # type: ignore[arg-type]


def test_an_error_of_the_exporter_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object) -> float:
        raise RuntimeError("Exporting the operator is not supported\nand here is the whole graph")

    monkeypatch.setattr(module, "_cost_of", fails)
    monkeypatch.setattr(Size, "network", lambda self, classifier: torch.nn.Identity())
    with pytest.raises(ConfigurationError, match=r"written again for tiles of \d+ pixels: .* is not supported$"):
        choose_own_side(Classifier(), 3, 0.6)  # type: ignore[arg-type]
