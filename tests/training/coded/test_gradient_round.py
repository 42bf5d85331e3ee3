"""Rounds in virtual time: whatever the order of replies, losses and returns, the gradient is exact."""

import numpy as np
import pytest

from coded_helpers import code_named, coded_data
from evenkeel.delays.laws import PersistentSlow, ShiftedExponential, TwoMode
from evenkeel.training.coded.coordinator import CodedSettings, Coordinator
from evenkeel.training.coded.device import Device
from evenkeel.training.coded.links import DeviceEvent, LocalDevices
from evenkeel.training.coded.losses import Logistic

WEIGHTS = np.linspace(-1, 1, 5)


class Churning(LocalDevices):
    """Devices of which some leave and come back at any moment, two at a time at most."""

    def __init__(self, devices, delay, seed: int) -> None:
        self.random, self.gone, self.calm = np.random.default_rng(seed), [], True
        super().__init__(devices, delay)

    def poll(self, until_s: float) -> list[DeviceEvent]:
        if not self.calm and self.random.random() < 0.1:
            if len(self.gone) == 2 or (self.gone and self.random.random() < 0.5):
                self.bring_back(self.gone.pop(0))
            else:
                name = f"dev{self.random.integers(7)}"
                if name not in self.gone:
                    self.gone.append(name)
                    self.take_away(name)
        return super().poll(until_s)


@pytest.mark.parametrize("optimistic", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_is_exact_whatever_the_order_of_what_happens(seed, optimistic) -> None:
    data = coded_data(7, seed=seed)
    link = Churning(data.devices(), TwoMode(scale=1.0, slow_share=0.2, seed=seed), seed)
    settings = CodedSettings(optimistic=optimistic, wait_s=200.0, inspect_every=7, least_wait_s=0.01, patience=0.3)
    coordinator = Coordinator(link, code_named("mds:own=7"), settings)
    coordinator.set_up(7)
    link.calm = False
    decoded = 0
    for number in range(40):
        rows = np.random.default_rng(number).choice(28, 9, replace=False) if number % 3 == 2 else None
        found = coordinator.evaluate(WEIGHTS, Logistic(), (0.0, 1.0), rows)
        value, gradient = data.sums(WEIGHTS, Logistic(), rows)
        assert np.abs(found.gradient - gradient).max() <= 1e-9 * np.abs(gradient).max()
        assert found.value == pytest.approx(value, rel=1e-9)
        decoded += bool(found.decoded)
    assert not coordinator.excluded
    assert decoded > 5 or not optimistic


class SlowByChance:
    """Each task of a tenth of all takes five times as long, by chance."""

    def draw(self, key: int, worker: int, now_s: float) -> float:
        random = np.random.default_rng([7, key])
        return (5.0 if random.random() < 0.1 else 1.0) * (1 + 0.01 * random.exponential())


def mean_round_s(delay, patience: float, code: str, rounds: int = 30) -> float:
    """Mean seconds of a round of twenty devices; for ever so patient ones, of a round that waits for all."""
    data = coded_data(20, seed=1, least=240, most=241)
    extra = int(code.partition("extra=")[2] or 0)
    link = LocalDevices([*data.devices(), *(Device(f"helper{place}") for place in range(extra))], delay)
    settings = CodedSettings(patience=patience, least_wait_s=1e-3, wait_s=1e9, inspect_every=0)
    coordinator = Coordinator(link, code_named(code), settings)
    coordinator.set_up(20 + extra)
    took = []
    for _ in range(rounds):
        found = coordinator.evaluate(WEIGHTS, Logistic(), (0.0, 1.0))
        took.append(found.seconds)
        gradient = data.sums(WEIGHTS, Logistic())[1]
        assert np.abs(found.gradient - gradient).max() <= 1e-9 * np.abs(gradient).max()
    assert not coordinator.excluded  # what differs by rounding alone is no fault
    return float(np.mean(took[3:]))


@pytest.mark.parametrize(
    ("code", "times"), [("balanced:copies=3", 3.1), ("balanced:copies=4", 3.5), ("mds:own=8", 3.5)]
)
def test_rounds_do_not_wait_for_devices_that_stay_slow(code, times) -> None:
    took = []
    for patience in (0.3, 1e6):
        slow = PersistentSlow(ShiftedExponential(1.0, 100.0, seed=1), factor=5.0, slow_workers=(3, 11))
        took.append(mean_round_s(slow, patience, code, rounds=12))
    assert took[1] > 5.0
    assert took[0] < took[1] / times


@pytest.mark.parametrize("code", ["balanced:copies=4", "balanced:copies=3,extra=8"])
def test_rounds_are_shorter_although_each_task_is_slow_by_chance(code) -> None:
    coded_s = mean_round_s(SlowByChance(), 0.3, code, 60)
    waiting_s = mean_round_s(SlowByChance(), 1e6, code, 60)
    assert coded_s < waiting_s / 1.3


def test_a_device_that_is_quick_again_is_waited_for_again() -> None:
    data = coded_data(6)
    link = LocalDevices(data.devices())
    coordinator = Coordinator(link, code_named("balanced:copies=2"), CodedSettings(wait_s=10.0, least_wait_s=0.01))
    coordinator.set_up(6)

    class Late:
        factor = 5.0

        def draw(self, key: int, worker: int, now_s: float) -> float:
            return self.factor if worker == 2 else 1.0

    link._delay = Late()  # type: ignore[assignment]
    assert coordinator.evaluate(WEIGHTS, Logistic(), (0.0, 1.0)).decoded == ("d2",)
    assert coordinator.evaluate(WEIGHTS, Logistic(), (0.0, 1.0)).decoded == ("d2",)
    Late.factor = 1.0
    found = [coordinator.evaluate(WEIGHTS, Logistic(), (0.0, 1.0)).decoded for _ in range(4)]
    assert found[-1] == ()


def test_parity_alone_names_a_device_that_spoils_several_sums() -> None:
    from evenkeel.training.coded.checks import misfit, suspects

    data = coded_data(6)
    coordinator = Coordinator(
        LocalDevices([*data.devices(), *(Device(f"helper{place}") for place in range(3))]),
        code_named("mds:extra=3"),
        CodedSettings(wait_s=1.0),
    )
    coordinator.set_up(9)
    layout = coordinator.layout
    products = dict(coordinator._probed)
    assert misfit(layout, products) < 1e-13
    assert suspects(layout, products, 2.0**-52) is None
    for block, device in (("d4", "dev4"), ("p1", "helper1")):
        wrong = products | {block: products[block] + 1e-3}
        assert suspects(layout, wrong, 2.0**-52) == [device]
    one = {block: product for block, product in products.items() if block not in ("p0", "p1")}
    wrong = one | {"d4": one["d4"] + 1e-3}
    assert (
        len(suspects(layout, wrong, 2.0**-52) or []) > 1
    )  # it shows that something is wrong, and not whose fault it is
