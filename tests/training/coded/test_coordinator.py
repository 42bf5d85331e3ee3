"""Gradients over devices are exact whatever happens to them, or there is a clear error."""

import dataclasses
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from coded_helpers import CodedData, code_named, coded_data, local_coordinator
from evenkeel.errors import ConfigurationError, EvenkeelError, UndecodableError
from evenkeel.training.coded.coordinator import CodedSettings, Coordinator
from evenkeel.training.coded.device import Device
from evenkeel.training.coded.links import LocalDevices
from evenkeel.training.coded.losses import LOSSES, Logistic
from evenkeel.training.coded.messages import DeviceMessage

CODES = ["balanced:copies=2", "mds:own=3", "rlnc:own=6", "replication:copies=2"]


def check(found, data: CodedData, weights, loss, rows=None, tolerance: float = 1e-9) -> None:
    value, gradient = data.sums(weights, loss, rows)
    assert np.abs(found.gradient - gradient).max() <= tolerance * np.abs(gradient).max()
    assert found.value == pytest.approx(value, rel=tolerance)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
@pytest.mark.parametrize("optimistic", [True, False])
def test_the_gradient_is_exact_for_every_loss_that_the_code_survives(code, dtype, tolerance, optimistic) -> None:
    data = coded_data(6)
    link, coordinator = local_coordinator(data, code, CodedSettings(dtype, optimistic=optimistic, wait_s=1.0))
    random = np.random.default_rng(1)
    decoded = 0
    for size in range(3):
        for away in combinations(range(6), size):
            names = {f"dev{place}" for place in away}
            there = [block for block in coordinator.layout.blocks if coordinator.layout.holders[block] not in names]
            loss = LOSSES[["logistic", "hinge", "squared_hinge", "squared_error"][sum(away) % 4]]
            weights = random.normal(size=5)
            for name in names:
                link.take_away(name)
            if coordinator.layout.untold(there):
                with pytest.raises(UndecodableError, match="Away are dev"):
                    coordinator.evaluate(weights, loss, (0.0, 1.0) if loss.classes else None)
            else:
                decoded += bool(away)
                found = coordinator.evaluate(weights, loss, (0.0, 1.0) if loss.classes else None)
                check(found, data, weights, loss, tolerance=tolerance)
                if optimistic:
                    assert set(found.decoded) == {f"d{place}" for place in away}
                rows = random.choice(28, 9, replace=False)
                found = coordinator.evaluate(weights, loss, (0.0, 1.0) if loss.classes else None, rows)
                check(found, data, weights, loss, rows, tolerance)
            for name in names:
                link.bring_back(name)
            coordinator.maintain()
    assert decoded >= 6
    assert not coordinator.excluded


def test_too_few_devices_is_an_error_that_names_what_is_missing_and_the_run_goes_on_when_they_are_back() -> None:
    data = coded_data(4)
    link, coordinator = local_coordinator(data, "balanced:copies=1")
    weights = np.ones(5)
    for name in ("dev0", "dev1", "dev2"):
        link.take_away(name)
    with pytest.raises(
        UndecodableError, match=r"partitions d.* cannot be computed.*dev0, dev1, dev2.*bring some"
    ) as raised:
        coordinator.evaluate(weights, Logistic(), (0.0, 1.0))
    assert raised.value.missing
    for name in ("dev0", "dev1", "dev2"):
        link.bring_back(name)
    check(coordinator.evaluate(weights, Logistic(), (0.0, 1.0)), data, weights, Logistic())


class Liar(Device):
    """A device whose replies go wrong."""

    wrong_kind = ""
    wrong_array = ""
    change = staticmethod(lambda values: values * 1.01)

    def answer(self, request: DeviceMessage) -> DeviceMessage:
        reply = super().answer(request)
        names = [name for name in reply.arrays if name.startswith(self.wrong_array)] if self.wrong_array else []
        if request.kind != self.wrong_kind or not names or not request.fields.get("round"):
            return reply
        changed = {**reply.arrays, **{name: type(self).change(reply.arrays[name]) for name in names}}
        return dataclasses.replace(reply, arrays=changed)


@pytest.mark.parametrize("optimistic", [True, False])
@pytest.mark.parametrize(
    ("kind", "array", "change"),
    [
        ("step", "zd", lambda values: values * 1.01),
        ("step", "gradient", lambda values: values + 0.01),
        ("step", "zd", lambda values: values[:-1]),
        ("step", "zd", lambda values: np.where(np.arange(len(values)) == 3, np.nan, values)),
        ("step", "gradient", lambda values: np.append(values, 1.0)),
        ("step", "zp", lambda values: values + 0.1),
        ("pull", "gradient", lambda values: values * 1.001),
    ],
)
def test_a_device_whose_results_do_not_fit_is_named_and_the_gradient_exact_without_it(
    kind, array, change, optimistic
) -> None:
    data = coded_data(7)
    wrong = type("Wrong", (Liar,), {"wrong_kind": kind, "wrong_array": array, "change": staticmethod(change)})
    devices = data.devices()
    devices[2] = wrong("dev2", (data.tables[2], data.labels[2]))
    link = LocalDevices(devices)
    coordinator = Coordinator(
        link, code_named("balanced:copies=3"), CodedSettings(optimistic=optimistic, inspect_every=3, wait_s=1.0)
    )
    coordinator.set_up(7)
    link.take_away("dev5")
    random = np.random.default_rng(3)
    for _ in range(6):
        weights = random.normal(size=5)
        check(coordinator.evaluate(weights, Logistic(), (0.0, 1.0)), data, weights, Logistic())
        if coordinator.excluded:
            link.bring_back("dev5")  # a balanced code of weight 3 may not survive a third one
    if optimistic and array == "gradient" and kind == "step":
        assert coordinator.excluded
    if coordinator.excluded:
        assert list(coordinator.excluded) == ["dev2"]
        # Its partition was made again from the others' blocks.
        assert coordinator.layout.holders["d2"] not in ("", "dev2")
        assert coordinator.repair_bytes > 0
    elif not (optimistic and array == "gradient" and kind == "step"):
        assert kind == "step"
        assert array == "gradient"  # which is not asked for without labels


def test_a_wrong_block_is_found_before_training() -> None:
    data = coded_data(6)

    class WrongCopies(Device):
        def answer(self, request: DeviceMessage) -> DeviceMessage:
            reply = super().answer(request)
            if request.kind == "fetch" and reply.kind == "block":
                return dataclasses.replace(reply, arrays={"values": reply.arrays["values"] * 1.5})
            return reply

    devices = data.devices()
    devices[1] = WrongCopies("dev1", (data.tables[1], data.labels[1]))
    coordinator = Coordinator(LocalDevices(devices), code_named("balanced:copies=3"), CodedSettings(wait_s=1.0))
    coordinator.set_up(6)
    assert list(coordinator.excluded) == ["dev1"]


@pytest.mark.parametrize("kind", ["step", "pull"])
def test_losses_between_the_phases_are_survived(kind) -> None:
    data = coded_data(8)
    link = LocalDevices([*data.devices(), *(Device(f"helper{place}") for place in range(5))])
    coordinator = Coordinator(link, code_named("mds:extra=5"), CodedSettings(wait_s=1.0, inspect_every=0))
    coordinator.set_up(13)
    random = np.random.default_rng(0)
    send, left = link.send, []

    def leaving(device: str, message: DeviceMessage) -> None:
        """Another device leaves whenever the second phase begins, with its work undone."""
        send(device, message)
        if device == "dev0":
            link.take_away("dev0")
        second = message.kind == "pull" or not message.fields.get("loss")
        if second and message.kind == kind and message.fields.get("round") and len(left) < 3 and device not in left:
            left.append(device)
            link.take_away(device)

    link.send = leaving  # type: ignore[method-assign]
    weights = random.normal(size=5)
    found = coordinator.evaluate(weights, Logistic(), (0.0, 1.0))
    check(found, data, weights, Logistic())
    assert len(left) >= (1 if kind == "step" else 3)


def test_a_late_device_brings_new_data_and_the_code_covers_it() -> None:
    data = coded_data(7)
    first = CodedData(data.tables[:6], data.labels[:6])
    link, coordinator = local_coordinator(first, settings=CodedSettings(wait_s=1.0, copies=2))
    weights = np.linspace(-1, 1, 5)
    check(coordinator.evaluate(weights, Logistic(), (0.0, 1.0)), first, weights, Logistic())
    link.add(Device("late", (data.tables[6], data.labels[6])))
    check(coordinator.evaluate(weights, Logistic(), (0.0, 1.0)), data, weights, Logistic())
    assert coordinator.repair_bytes >= 2 * data.tables[6].nbytes
    link.take_away("late")
    found = coordinator.evaluate(weights, Logistic(), (0.0, 1.0))
    assert found.decoded == ("d6",)
    check(found, data, weights, Logistic())


@pytest.mark.parametrize(
    ("table", "labels", "says"),
    [
        (np.ones((9, 4)), np.ones(9), "4 columns, the others' 5"),
        (np.ones((9, 5)), np.full(9, 7.0), "labels 7 are none of the others'"),
    ],
)
def test_a_late_device_whose_data_does_not_fit_is_refused(table, labels, says, caplog) -> None:
    data = coded_data(5)
    link, coordinator = local_coordinator(data)
    link.add(Device("late", (table, labels)))
    weights = np.ones(5)
    check(coordinator.evaluate(weights, Logistic(), (0.0, 1.0)), data, weights, Logistic())
    assert says in caplog.text
    assert "late" not in coordinator.present


def test_a_device_that_is_gone_for_good_is_made_again_elsewhere() -> None:
    data = coded_data(6)
    settings = CodedSettings(wait_s=1.0, gone_after_rounds=3)
    link, coordinator = local_coordinator(data, "balanced:copies=2", settings)
    link.add(Device("helper"))
    weights = np.linspace(-1, 1, 5)
    link.take_away("dev3")
    for _ in range(5):
        check(coordinator.evaluate(weights, Logistic(), (0.0, 1.0)), data, weights, Logistic())
    assert coordinator.layout.holders["d3"] == "helper"
    assert coordinator.repair_bytes > 0
    assert coordinator.evaluate(weights, Logistic(), (0.0, 1.0)).decoded == ()
    link.take_away("dev4")  # and the code is as good as before
    check(coordinator.evaluate(weights, Logistic(), (0.0, 1.0)), data, weights, Logistic())


def test_a_coordinator_that_was_killed_goes_on_with_its_devices(tmp_path: Path) -> None:
    data = coded_data(6)
    devices = data.devices()
    first = Coordinator(LocalDevices(devices), code_named("mds:own=2"), folder=tmp_path)
    first.set_up(6)
    weights = np.linspace(-1, 1, 5)
    before = first.evaluate(weights, Logistic(), (0.0, 1.0))
    second = Coordinator(LocalDevices(devices), code_named("mds:own=2"), folder=tmp_path)
    second.set_up(6)
    assert second.setup_bytes == first.setup_bytes
    after = second.evaluate(weights, Logistic(), (0.0, 1.0))
    assert (after.gradient == before.gradient).all()
    assert second.repair_bytes == 0
    with pytest.raises(ConfigurationError, match="dtype float64, not float32"):
        Coordinator(LocalDevices(devices), code_named("mds:own=2"), CodedSettings("float32"), tmp_path)


def test_devices_that_cannot_work_together_are_refused_by_name() -> None:
    data = coded_data(3)
    devices = [*data.devices(), Device("odd", (np.ones((4, 9)), np.ones(4)))]
    with pytest.raises(ConfigurationError, match=r"different numbers of columns .*odd: 9.*--columns"):
        Coordinator(LocalDevices(devices), code_named("mds:own=1")).set_up(4)
    with pytest.raises(ConfigurationError, match="needs 2 devices without data"):
        Coordinator(LocalDevices(data.devices()), code_named("mds:extra=2")).set_up(3)
    with pytest.raises(ConfigurationError, match="does not tell single partitions"):
        Coordinator(LocalDevices(data.devices()), code_named("gradient:losses=1")).set_up(3)
    with pytest.raises(EvenkeelError, match="3 of 4 devices came: dev0, dev1, dev2"):
        Coordinator(LocalDevices(data.devices()), code_named("mds:own=1")).set_up(4, timeout_s=1.0)
    for table, says in (
        (np.array([[1.0, np.nan]]), "device x: row 0, column 1 is not a finite number"),
        (np.ones((0, 3)), "0 rows"),
        (np.ones(3), "expected a table"),
    ):
        with pytest.raises(ConfigurationError, match=says):
            Device("x", (table, np.ones(len(table))))
    with pytest.raises(ConfigurationError, match="expected 2 numbers, one for each row"):
        Device("x", (np.ones((2, 2)), np.ones(3)))


def test_a_device_that_comes_back_with_other_data_is_refused() -> None:
    data = coded_data(5)
    link, coordinator = local_coordinator(data, "mds:own=2")
    link.take_away("dev1")
    link.add(Device("dev1", (data.tables[1] + 1, data.labels[1])))
    weights = np.ones(5)
    check(coordinator.evaluate(weights, Logistic(), (0.0, 1.0)), data, weights, Logistic())
    assert "dev1" not in coordinator.present


def test_a_device_that_lost_its_disk_is_given_its_blocks_again() -> None:
    data = coded_data(5)
    link, coordinator = local_coordinator(data, "balanced:copies=2")
    link.take_away("dev1")
    link.add(Device("dev1", (data.tables[1], data.labels[1])))
    weights = np.ones(5)
    found = coordinator.evaluate(weights, Logistic(), (0.0, 1.0))
    assert found.decoded == ()
    check(found, data, weights, Logistic())
    assert coordinator.repair_bytes > 0
    assert not [block for block, holder in coordinator.layout.holders.items() if not holder]


def test_what_has_come_counts_although_the_time_to_wait_is_over_already() -> None:
    data = coded_data(5)
    link, coordinator = local_coordinator(data, settings=CodedSettings(wait_s=1.0, least_wait_s=1e-12))
    weights = np.ones(5)
    for away in ("", "dev1"):
        if away:
            link.take_away(away)
        found = coordinator.evaluate(weights, Logistic(), (0.0, 1.0))
        check(found, data, weights, Logistic())
        assert len(found.decoded) == bool(away)
    with pytest.raises(ConfigurationError, match="least_wait_s must be above 0"):
        CodedSettings(least_wait_s=0)
