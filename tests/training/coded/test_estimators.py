"""Estimators find the optimum that one machine with all data finds, with and without scikit-learn."""

import importlib.util
import sys
from types import ModuleType

import numpy as np
import pytest

from coded_helpers import coded_data
from evenkeel.errors import ConfigurationError
from evenkeel.training.coded import estimators
from evenkeel.training.coded.device import Device
from evenkeel.training.coded.estimators import CodedLinearSVC, CodedLogisticRegression, CodedRidge
from evenkeel.training.coded.links import LocalDevices
from evenkeel.training.coded.losses import Hinge, Logistic, SquaredHinge


def problem() -> tuple[np.ndarray, np.ndarray]:
    data = coded_data(4, seed=3)
    return np.concatenate(data.tables), np.concatenate(data.labels)


def with_ones(table: np.ndarray) -> np.ndarray:
    return np.concatenate([table, np.ones((len(table), 1))], axis=1)


def test_ridge_is_the_solution_of_its_equations() -> None:
    table, _ = problem()
    target = table @ np.arange(5) + 3.0 + np.sin(np.arange(len(table)))
    found = CodedRidge(alpha=2.0, tol=1e-10).fit(table, target)
    wide = with_ones(table)
    penalty = 2.0 * np.diag([1, 1, 1, 1, 1, 0])
    wanted = np.linalg.solve(wide.T @ wide + penalty, wide.T @ target)
    assert np.append(found.coef_, found.intercept_) == pytest.approx(wanted, abs=1e-7)
    assert found.score(table, target) > 0.98


@pytest.mark.parametrize(
    ("estimator", "loss"),
    [
        (CodedLogisticRegression(C=0.5, tol=1e-9), Logistic()),
        (CodedLogisticRegression(C=0.5, tol=1e-9, solver="gd", momentum=0.9, nesterov=True, max_iter=3000), Logistic()),
        (CodedLinearSVC(C=0.5, tol=1e-9), SquaredHinge()),
    ],
)
def test_a_smooth_classifier_s_gradient_vanishes(estimator, loss) -> None:
    table, labels = problem()
    found = estimator.fit(table, labels)
    assert found.converged_
    weights = np.append(found.coef_, found.intercept_)
    slope = loss.slope(with_ones(table) @ weights, 2 * labels - 1)
    gradient = 0.5 * with_ones(table).T @ slope + np.append(found.coef_, 0.0)
    assert np.abs(gradient).max() < 1e-6
    assert found.score(table, labels) > 0.8


def test_the_hinge_comes_close_to_its_minimum_by_descent() -> None:
    table, labels = problem()
    found = CodedLinearSVC(loss="hinge", C=0.1, learning_rate=0.05, max_iter=2000).fit(table, labels)

    def value(weights: np.ndarray) -> float:
        return 0.1 * Hinge().cost(with_ones(table) @ weights, 2 * labels - 1).sum() + weights[:-1] @ weights[:-1] / 2

    best = np.append(found.coef_, found.intercept_)
    random = np.random.default_rng(0)
    assert all(value(best) < value(best + 0.1 * random.normal(size=6)) for _ in range(50))
    with pytest.raises(ConfigurationError, match="corner"):
        CodedLinearSVC(loss="hinge", solver="lbfgs").fit(table, labels)
    with pytest.raises(ConfigurationError, match="hinge or squared_hinge"):
        CodedLinearSVC(loss="huber").fit(table, labels)


def test_mini_batches_come_close() -> None:
    table, labels = problem()
    found = CodedLogisticRegression(batch_size=8, learning_rate=0.2, max_iter=400, random_state=1).fit(table, labels)
    exact = CodedLogisticRegression().fit(table, labels)
    assert found.coef_ == pytest.approx(exact.coef_, abs=0.35)
    assert found.n_iter_ == 400


def test_names_of_classes_and_probabilities() -> None:
    table, labels = problem()
    names = np.where(labels == 1, "yes", "no")
    found = CodedLogisticRegression(dtype="float32", fit_intercept=False).fit(table, names)
    assert found.classes_.tolist() == ["no", "yes"]
    assert set(found.predict(table)) == {"no", "yes"}
    chances = found.predict_proba(table)
    assert chances.sum(axis=1) == pytest.approx(1)
    assert ((chances[:, 1] > 0.5) == (found.predict(table) == "yes")).all()
    with pytest.raises(ValueError, match="Only binary"):
        CodedLogisticRegression().fit(table, np.arange(len(table)) % 3)
    with pytest.raises(ValueError, match="one class"):
        CodedLogisticRegression().fit(table, np.zeros(len(table)))


def test_training_where_the_data_is_gives_the_same_model() -> None:
    data = coded_data(5, seed=3)
    table, labels = np.concatenate(data.tables), np.concatenate(data.labels)
    link = LocalDevices(data.devices())
    send = link.send

    def leaving(device, message) -> None:
        send(device, message)
        if message.kind == "step" and message.fields.get("round") == 4 and device == "dev2":
            link.take_away("dev2")

    link.send = leaving  # type: ignore[method-assign]
    far = CodedLogisticRegression(tol=1e-9).fit_devices(link, 5)
    near = CodedLogisticRegression(tol=1e-9).fit(table, labels)
    assert far.coef_ == pytest.approx(near.coef_, abs=1e-7)
    assert (far.predict(table) == near.predict(table)).all()
    odd = [*data.devices(), Device("odd", (np.ones((3, 5)), np.array([0, 1, 2])))]
    with pytest.raises(ConfigurationError, match=r"found 3 labels .*odd: 0, 1, 2"):
        CodedLogisticRegression().fit_devices(LocalDevices(odd), 6)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The estimators as they are where scikit-learn is not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert estimators.__file__
    spec = importlib.util.spec_from_file_location("plain_estimators", estimators.__file__)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_scikit_learn_parameters_and_data_are_checked_too(plain: ModuleType) -> None:
    model = plain.CodedLogisticRegression(C=3.0)
    assert model.get_params()["C"] == 3.0
    assert model.set_params(C=1.0, devices=2).get_params()["devices"] == 2
    with pytest.raises(ValueError, match="Invalid parameter 'c'"):
        model.set_params(c=1.0)
    with pytest.raises(ValueError, match="not fitted"):
        model.predict(np.ones((1, 5)))
    table, labels = problem()
    with pytest.raises(ConfigurationError, match="not a finite number"):
        model.fit(np.where(table > 2, np.nan, table), labels)
    with pytest.raises(ValueError, match="y has shape"):
        model.fit(table, labels[1:])
    model.fit(table, labels)
    assert model.score(table, labels) > 0.8
    with pytest.raises(ValueError, match="X has 4 features, but 5"):
        model.predict(np.ones((1, 4)))
    assert plain.CodedRidge().fit(table, table[:, 0]).score(table, table[:, 0]) > 0.9


@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore")
def test_scikit_learn_s_own_checks() -> None:
    pytest.importorskip("sklearn", reason="pip install 'evenkeel[coded]'")
    from sklearn.utils.estimator_checks import check_estimator

    for estimator in (CodedLogisticRegression(), CodedLinearSVC(), CodedRidge()):
        results = check_estimator(estimator, on_fail=None, on_skip=None)
        assert [each for each in results if each["status"] == "failed"] == []


def test_sparse_data_is_taken() -> None:
    scipy_sparse = pytest.importorskip("scipy.sparse", reason="pip install 'evenkeel[coded]'")
    table, labels = problem()
    table = np.where(np.abs(table) > 1, table, 0.0)
    thin = CodedLogisticRegression(tol=1e-9).fit(scipy_sparse.csr_matrix(table), labels)
    thick = CodedLogisticRegression(tol=1e-9).fit(table, labels)
    assert thin.coef_ == pytest.approx(thick.coef_, abs=1e-7)
    assert (thin.predict(scipy_sparse.csr_matrix(table)) == thick.predict(table)).all()
