"""Gives scikit-learn's interface to linear models that are trained on coded devices.

`fit(X, y)` spreads the data over devices in this process, to try it out; `fit_devices(link, devices)` trains where
the data is. Where scikit-learn is installed these are its estimators, for its pipelines and searches; they work
without it, too.
"""

import inspect
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from evenkeel.arrays import Array, FloatArray
from evenkeel.coding.answers.linear import LinearCode, PartitionCode
from evenkeel.coding.answers.linear_codes import linear_code
from evenkeel.errors import ConfigurationError
from evenkeel.training.coded.coordinator import CodedSettings, CodeMaker, Coordinator
from evenkeel.training.coded.device import Device
from evenkeel.training.coded.links import DeviceLink, LocalDevices
from evenkeel.training.coded.losses import PredictorLoss, loss_named
from evenkeel.training.coded.matrix import as_matrix
from evenkeel.training.coded.training import CodedModel, TrainingPlan, train

__all__ = ["CodedLinearSVC", "CodedLogisticRegression", "CodedRidge", "code_maker"]


_FLOATS = [np.float64, np.float32]


class _PlainEstimator:
    """Does what scikit-learn's base class does, where that is not installed."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Gives the parameters that the estimator was made with."""
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        return {name: getattr(self, name) for name in names}

    def set_params(self, **parameters: Any) -> Self:
        """Changes parameters.

        Raises:
            ValueError: there is no such parameter.
        """
        for name, value in parameters.items():
            if name not in self.get_params():
                raise ValueError(f"Invalid parameter {name!r} for estimator {type(self).__name__}")
            setattr(self, name, value)
        return self


if TYPE_CHECKING:

    class BaseEstimator(_PlainEstimator):
        """Stands for scikit-learn's."""

        def __sklearn_tags__(self) -> Any: ...

    class ClassifierMixin:
        """Stands for scikit-learn's."""

    class RegressorMixin:
        """Stands for scikit-learn's."""

    _HAS_SKLEARN = False
else:
    try:
        from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin

        _HAS_SKLEARN = True
    except ModuleNotFoundError:
        BaseEstimator = _PlainEstimator
        ClassifierMixin, RegressorMixin = (type(name, (), {}) for name in ("ClassifierMixin", "RegressorMixin"))
        _HAS_SKLEARN = False


def code_maker(text: str) -> CodeMaker:
    """Gives what makes the code that a text names; so few partitions that it makes no sense for them have no parity."""

    def make(partitions: int, sizes: Any) -> LinearCode:
        if partitions < 4:
            try:
                return linear_code(text, partitions, sizes=sizes)
            except ConfigurationError:
                return PartitionCode(np.zeros((0, partitions)), [], name="uncoded")
        return linear_code(text, partitions, sizes=sizes)

    return make


class _CodedLinear(BaseEstimator, ABC):
    """Trains a linear predictor; what it costs is said by those below.

    Args:
        devices: over how many devices in this process `fit` spreads the data.
        code: which blocks they keep besides, as `evenkeel plan coding` writes it.
        fit_intercept: whether there is an intercept; it is not penalized.
        solver: `lbfgs`, `gd`, or `auto`: L-BFGS where it is exact.
        max_iter: rounds at most.
        tol: training ends when no part of the gradient of the mean is above it.
        learning_rate: of `gd`; None: as long a step as the curvature allows.
        momentum: of `gd`.
        nesterov: of `gd`.
        batch_size: rows of each device that take part in a round of `gd`; None: all.
        dtype: of the devices' numbers: `float32` or `float64`.
        slack: how many more blocks are asked for than are missing.
        folder: where the coordinator's memory is kept, so that a training that was stopped goes on; None: nowhere.
        random_state: seed of mini-batches and checks.
    """

    _classifier: ClassVar[bool] = True

    devices: int
    code: str
    fit_intercept: bool
    solver: str
    max_iter: int
    tol: float
    learning_rate: float | None
    momentum: float
    nesterov: bool
    batch_size: int | None
    dtype: str
    slack: int
    folder: str | Path | None
    random_state: int | None

    @abstractmethod
    def _objective(self) -> tuple[PredictorLoss, float]:
        """Gives the loss, and the weight of the penalty over all examples."""

    def fit(self, X: Any, y: Any) -> Self:
        """Trains on data in this process, spread over devices that are objects."""
        X, y = self._validated(X, y)
        labels = np.asarray(y, np.float64) if not self._classifier else self._encoded(y)
        rows = X.shape[0]
        count = max(1, min(int(self.devices), rows))
        parts = np.array_split(np.arange(rows), count)
        devices = [
            Device(f"device{place}", (as_matrix(X[part[0] : part[-1] + 1]), labels[part]))
            for place, part in enumerate(parts)
        ]
        link = LocalDevices(devices)
        coordinator = self._coordinator(link)
        coordinator.set_up(count)
        self._take(self._train(coordinator, (0.0, 1.0) if self._classifier else None))
        self.n_features_in_ = int(X.shape[1])
        return self

    def fit_devices(self, link: DeviceLink, devices: int, timeout_s: float = 60.0, *, dismiss: bool = False) -> Self:
        """Trains where the data is.

        Args:
            link: reaches the devices, such as `TcpDevices`.
            devices: how many take part from the beginning.
            timeout_s: how long to wait for them.
            dismiss: their processes are to end when the training has.

        Raises:
            ConfigurationError: their data does not fit together.
            UndecodableError: too few devices were there for too long.
        """
        coordinator = self._coordinator(link)
        coordinator.set_up(devices, timeout_s)
        classes = None
        if self._classifier:
            seen = {name: np.unique(labels) for name, labels in coordinator.labels.items()}
            every = np.unique(np.concatenate(list(seen.values())))
            if len(every) != 2:
                where = {name: coordinator.layout.holders[name] for name in seen}
                said = "; ".join(
                    f"{where[name]}: {', '.join(f'{each:g}' for each in some[:5])}" for name, some in seen.items()
                )
                raise ConfigurationError(f"expected two classes, found {len(every)} labels on the devices ({said})")
            self.classes_ = every
            classes = (float(every[0]), float(every[1]))
        self._take(self._train(coordinator, classes))
        if dismiss:
            coordinator.dismiss()
        self.n_features_in_ = coordinator.columns - int(self.fit_intercept)
        return self

    def _coordinator(self, link: DeviceLink) -> Coordinator:
        settings = CodedSettings(self.dtype, self.fit_intercept, slack=self.slack, seed=int(self.random_state or 0))
        return Coordinator(link, code_maker(self.code), settings, None if self.folder is None else Path(self.folder))

    def _train(self, coordinator: Coordinator, classes: tuple[float, float] | None) -> CodedModel:
        loss, l2 = self._objective()
        solver = self.solver
        if solver == "auto":
            solver = "lbfgs" if loss.smooth and self.batch_size is None else "gd"
        plan = TrainingPlan(
            loss,
            l2,
            classes,
            solver,
            self.max_iter,
            self.tol,
            self.learning_rate,
            self.momentum,
            self.nesterov,
            self.batch_size,
            int(self.random_state or 0),
        )
        return train(coordinator, plan)

    def _take(self, model: CodedModel) -> None:
        weights = model.weights
        intercept = weights[-1:] if self.fit_intercept else np.zeros(1)
        coefficients = weights[:-1] if self.fit_intercept else weights
        self.coef_: FloatArray = coefficients[None].copy() if self._classifier else coefficients.copy()
        self.intercept_: Any = intercept.copy() if self._classifier else float(intercept[0])
        self.n_iter_ = model.rounds
        self.converged_ = model.converged

    def _encoded(self, y: Array) -> FloatArray:
        self.classes_, numbers = np.unique(y, return_inverse=True)
        if len(self.classes_) > 2:
            raise ValueError(
                "Only binary classification is supported. The type of the target is multiclass; "
                "wrap the estimator in sklearn.multiclass.OneVsRestClassifier."
            )
        if len(self.classes_) < 2:
            raise ValueError("Classifier can't train when only one class is present.")
        encoded: FloatArray = numbers.astype(np.float64)
        return encoded

    def _validated(self, X: Any, y: Any) -> tuple[Any, Any]:
        """Checks data to be learned from: as scikit-learn does, where that is installed."""
        if _HAS_SKLEARN:
            from sklearn.utils.multiclass import check_classification_targets
            from sklearn.utils.validation import validate_data

            numeric = not self._classifier
            X, y = validate_data(self, X, y, accept_sparse="csr", dtype=_FLOATS, y_numeric=numeric)
            if self._classifier:
                check_classification_targets(y)
            return X, y
        table, labels = _table(X), np.asarray(y)
        if labels.shape != table.shape[:1]:
            raise ValueError(f"X has {table.shape[0]} rows, y has shape {labels.shape}")
        return table, labels

    def _predicted(self, X: Any) -> FloatArray:
        if _HAS_SKLEARN:
            from sklearn.utils.validation import check_is_fitted, validate_data

            check_is_fitted(self)
            table = validate_data(self, X, accept_sparse="csr", dtype=_FLOATS, reset=False)
        elif not hasattr(self, "coef_"):
            raise ValueError(f"this {type(self).__name__} is not fitted yet; call fit or fit_devices first")
        else:
            table = _table(X)
            if table.shape[1] != self.n_features_in_:
                raise ValueError(f"X has {table.shape[1]} features, but {self.n_features_in_} were fitted")
        predicted: FloatArray = np.asarray(table @ self.coef_.ravel() + self.intercept_, np.float64).ravel()
        return predicted

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


class _CodedClassifier(ClassifierMixin, _CodedLinear):
    """Predicts one of two classes."""

    def decision_function(self, X: Any) -> FloatArray:
        """Gives how far each row is on the second class's side."""
        return self._predicted(X)

    def predict(self, X: Any) -> Array:
        """Gives a class for each row."""
        second = (self._predicted(X) > 0).astype(int)
        chosen: Array = self.classes_[second]
        return chosen

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    if TYPE_CHECKING or not _HAS_SKLEARN:

        def score(self, X: Any, y: Any) -> float:
            """Gives the share of rows whose class is right."""
            return float(np.mean(self.predict(X) == np.asarray(y)))


class CodedLogisticRegression(_CodedClassifier):
    """Is logistic regression on coded devices: the sum of log losses times `C`, plus half the squared weights.

    Args:
        C: higher penalizes less. The others are those of all coded estimators.
    """

    def __init__(
        self,
        *,
        C: float = 1.0,
        devices: int = 10,
        code: str = "balanced:copies=2",
        fit_intercept: bool = True,
        solver: str = "auto",
        max_iter: int = 1000,
        tol: float = 1e-4,
        learning_rate: float | None = None,
        momentum: float = 0.0,
        nesterov: bool = False,
        batch_size: int | None = None,
        dtype: str = "float64",
        slack: int = 1,
        folder: str | Path | None = None,
        random_state: int | None = None,
    ) -> None:
        self.C = C
        self.devices, self.code, self.fit_intercept, self.solver = devices, code, fit_intercept, solver
        self.max_iter, self.tol, self.learning_rate, self.momentum = max_iter, tol, learning_rate, momentum
        self.nesterov, self.batch_size, self.dtype, self.slack = nesterov, batch_size, dtype, slack
        self.folder, self.random_state = folder, random_state

    def _objective(self) -> tuple[PredictorLoss, float]:
        return loss_named("logistic"), _inverse(self.C)

    def predict_proba(self, X: Any) -> FloatArray:
        """Gives the probabilities of the two classes for each row."""
        sure = np.exp(-np.logaddexp(0.0, -self._predicted(X)))
        return np.stack([1.0 - sure, sure], axis=1)


class CodedLinearSVC(_CodedClassifier):
    """Is a linear support vector machine on coded devices: the sum of hinges times `C`, plus half the squared weights.

    Args:
        C: higher penalizes less.
        loss: `squared_hinge` or `hinge`; the latter has a corner, so that `gd` alone can do it. The others are those of
            all coded estimators.
    """

    def __init__(
        self,
        *,
        C: float = 1.0,
        loss: str = "squared_hinge",
        devices: int = 10,
        code: str = "balanced:copies=2",
        fit_intercept: bool = True,
        solver: str = "auto",
        max_iter: int = 1000,
        tol: float = 1e-4,
        learning_rate: float | None = None,
        momentum: float = 0.0,
        nesterov: bool = False,
        batch_size: int | None = None,
        dtype: str = "float64",
        slack: int = 1,
        folder: str | Path | None = None,
        random_state: int | None = None,
    ) -> None:
        self.C, self.loss = C, loss
        self.devices, self.code, self.fit_intercept, self.solver = devices, code, fit_intercept, solver
        self.max_iter, self.tol, self.learning_rate, self.momentum = max_iter, tol, learning_rate, momentum
        self.nesterov, self.batch_size, self.dtype, self.slack = nesterov, batch_size, dtype, slack
        self.folder, self.random_state = folder, random_state

    def _objective(self) -> tuple[PredictorLoss, float]:
        if self.loss not in ("hinge", "squared_hinge"):
            raise ConfigurationError(f"loss must be hinge or squared_hinge, found {self.loss!r}")
        return loss_named(self.loss), _inverse(self.C)


class CodedRidge(RegressorMixin, _CodedLinear):
    """Is ridge regression on coded devices: the sum of squared errors, plus `alpha` times the squared weights.

    Args:
        alpha: higher penalizes more. The others are those of all coded estimators.
    """

    _classifier = False

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        devices: int = 10,
        code: str = "balanced:copies=2",
        fit_intercept: bool = True,
        solver: str = "auto",
        max_iter: int = 1000,
        tol: float = 1e-4,
        learning_rate: float | None = None,
        momentum: float = 0.0,
        nesterov: bool = False,
        batch_size: int | None = None,
        dtype: str = "float64",
        slack: int = 1,
        folder: str | Path | None = None,
        random_state: int | None = None,
    ) -> None:
        self.alpha = alpha
        self.devices, self.code, self.fit_intercept, self.solver = devices, code, fit_intercept, solver
        self.max_iter, self.tol, self.learning_rate, self.momentum = max_iter, tol, learning_rate, momentum
        self.nesterov, self.batch_size, self.dtype, self.slack = nesterov, batch_size, dtype, slack
        self.folder, self.random_state = folder, random_state

    def _objective(self) -> tuple[PredictorLoss, float]:
        return loss_named("squared_error"), 2.0 * self.alpha

    def predict(self, X: Any) -> FloatArray:
        """Gives a number for each row."""
        return self._predicted(X)

    if TYPE_CHECKING or not _HAS_SKLEARN:

        def score(self, X: Any, y: Any) -> float:
            """Gives the share of the variance that is explained."""
            y = np.asarray(y, np.float64)
            return float(1 - np.sum((self.predict(X) - y) ** 2) / np.sum((y - y.mean()) ** 2))


def _table(data: Any) -> Any:
    """Gives a table of finite numbers, or a scipy matrix of them.

    Raises:
        ValueError: it is none.
    """
    table = data.tocsr() if hasattr(data, "tocsr") else np.asarray(data)
    if len(table.shape) != 2:
        raise ValueError(f"Expected 2D array, got an array of shape {table.shape}. Reshape your data.")
    as_matrix(table, "X")
    return table


def _inverse(value: float) -> float:
    if not 0 < value < np.inf:
        raise ConfigurationError(f"C must be above 0, found {value}")
    return 1.0 / value
