"""Slopes are derivatives, optimizers find minima, and a training that was stopped goes on bit for bit."""

from pathlib import Path

import numpy as np
import pytest

from coded_helpers import coded_data, local_coordinator
from evenkeel.errors import ConfigurationError
from evenkeel.training.coded.coordinator import CodedSettings, Coordinator
from evenkeel.training.coded.links import LocalDevices
from evenkeel.training.coded.losses import LOSSES, Hinge, Logistic, SquaredHinge, loss_named
from evenkeel.training.coded.optimizers import LBFGS, GradientDescent, Optimizer
from evenkeel.training.coded.training import TrainingPlan, train


@pytest.mark.parametrize("name", LOSSES)
def test_a_slope_is_the_derivative_of_the_cost(name) -> None:
    loss = LOSSES[name]
    predicted = np.linspace(-3, 3, 60) + 0.013
    for label in (-1.0, 1.0):
        labels = np.full(60, label)
        step = 1e-6
        numeric = (loss.cost(predicted + step, labels) - loss.cost(predicted - step, labels)) / (2 * step)
        assert loss.slope(predicted, labels) == pytest.approx(numeric, abs=1e-6)
        slope, cost = loss.slope_and_cost(predicted, labels)
        assert slope == pytest.approx(loss.slope(predicted, labels), rel=1e-14)
        assert cost == pytest.approx(loss.cost(predicted, labels), rel=1e-14)
        if loss.smooth:
            bend = (loss.slope(predicted + step, labels) - loss.slope(predicted - step, labels)) / (2 * step)
            assert bend.max() <= loss.curvature + 1e-3


def test_large_margins_neither_overflow_nor_vanish() -> None:
    margins = np.array([-800.0, 800.0])
    assert Logistic().cost(margins, np.ones(2)) == pytest.approx([800.0, 0.0])
    assert Logistic().slope(margins, np.ones(2)) == pytest.approx([-1.0, 0.0])
    slope, cost = Logistic().slope_and_cost(margins, np.ones(2))
    assert (slope == pytest.approx([-1.0, 0.0])) & (cost == pytest.approx([800.0, 0.0]))
    with pytest.raises(ConfigurationError, match="'log' is unknown; use one of logistic"):
        loss_named("log")


def makers(start):
    return [
        lambda: GradientDescent(start, 0.02),
        lambda: GradientDescent(start, 0.02, 0.8),
        lambda: GradientDescent(start, 0.02, 0.8, nesterov=True),
        lambda: LBFGS(start),
    ]


@pytest.mark.parametrize("which", range(4))
def test_an_optimizer_finds_the_minimum_and_another_one_goes_on_from_its_state(which) -> None:
    random = np.random.default_rng(0)
    table = random.normal(size=(30, 4))
    matrix, target = table.T @ table, random.normal(size=4)
    best = np.linalg.solve(matrix, target)
    make = makers(np.zeros(4))[which]
    first: Optimizer = make()
    for number in range(600):
        if first.done(1e-12):
            break
        if number in (3, 4, 5, 17):
            second = make()
            second.restore(first.state())
            assert (second.point == first.point).all()
            first = second
        point = first.point
        first.take(float(point @ matrix @ point / 2 - target @ point), matrix @ point - target)
    assert first.weights == pytest.approx(best, abs=1e-8)


def test_wrong_rates_are_refused() -> None:
    for arguments, says in (
        ((0.0,), "learning_rate"),
        ((1.0, 1.0), "momentum must be"),
        ((1.0, 0.0, True), "nesterov needs"),
    ):
        with pytest.raises(ConfigurationError, match=says):
            GradientDescent(np.zeros(2), *arguments)
    for options, says in (
        ({"loss": Hinge()}, "corner"),
        ({"loss": Logistic(), "batch": 5}, "exact gradients"),
        ({"loss": Logistic(), "solver": "newton"}, "lbfgs or gd"),
    ):
        with pytest.raises(ConfigurationError, match=says):
            TrainingPlan(**options)


@pytest.mark.parametrize(
    "plan",
    [
        TrainingPlan(Logistic(), 1.0, (0.0, 1.0), rounds=14, tolerance=0),
        TrainingPlan(Logistic(), 1.0, (0.0, 1.0), "gd", 9, 0, None, 0.9, True),
        TrainingPlan(SquaredHinge(), 1.0, (0.0, 1.0), "gd", 9, 0, 0.05, batch=7),
    ],
    ids=["lbfgs", "nesterov", "batch"],
)
def test_a_training_that_was_stopped_goes_on_bit_for_bit(plan, tmp_path: Path) -> None:
    data = coded_data(5)

    def coordinator(folder: Path | None) -> Coordinator:
        made = Coordinator(
            LocalDevices(data.devices()),
            lambda partitions, sizes: local_coordinator(data)[1].layout.code,
            CodedSettings(intercept=True),
            folder,
        )
        made.set_up(5)
        return made

    whole = train(coordinator(None), plan)
    stopped = coordinator(tmp_path)

    class Killed(Exception):
        pass

    def kill(progress) -> None:
        if progress.round == 5:
            raise Killed

    with pytest.raises(Killed):
        train(stopped, plan, kill)
    resumed = train(coordinator(tmp_path), plan)
    assert resumed.rounds == whole.rounds
    assert (resumed.weights == whole.weights).all()
    with pytest.raises(ConfigurationError, match=r"l2 1\.0, not 2"):
        train(
            coordinator(tmp_path),
            TrainingPlan(
                plan.loss,
                2.0,
                plan.classes,
                plan.solver,
                batch=plan.batch,
                momentum=plan.momentum,
                nesterov=plan.nesterov,
            ),
        )
