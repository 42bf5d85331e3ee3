"""The same coordinator drives actors on a Ray cluster."""

import os

import numpy as np
import pytest

from coded_helpers import code_named, coded_data
from evenkeel.errors import MissingExtraError
from evenkeel.training.coded.coordinator import CodedSettings, Coordinator
from evenkeel.training.coded.losses import Logistic
from evenkeel.training.coded.ray_link import RayDevices


def test_without_ray_the_error_is_the_install_line(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'evenkeel\[ray\]'"):
        RayDevices({})


@pytest.mark.filterwarnings("ignore")
def test_actors_give_the_exact_gradient_and_one_may_be_lost() -> None:
    ray = pytest.importorskip("ray", reason="pip install 'evenkeel[ray]'")
    data = coded_data(4)
    paths = {"PYTHONPATH": os.pathsep.join(__import__("sys").path)}
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": paths})
    try:
        pairs = list(zip(data.tables, data.labels, strict=True))
        link = RayDevices(
            {f"dev{place}": lambda pair=pair: pair for place, pair in enumerate(pairs)}, {"num_cpus": 0.5}
        )
        coordinator = Coordinator(link, code_named("balanced:copies=2"), CodedSettings(least_wait_s=1.0))
        coordinator.set_up(4)
        weights = np.linspace(-1, 1, 5)
        for lost in ("", "dev2"):
            if lost:
                ray.kill(link._actors[lost])
            found = coordinator.evaluate(weights, Logistic(), (0.0, 1.0))
            value, gradient = data.sums(weights, Logistic())
            assert np.abs(found.gradient - gradient).max() <= 1e-9 * np.abs(gradient).max()
            assert found.value == pytest.approx(value)
            assert found.decoded == (("d2",) if lost else ())
        link.close()
    finally:
        ray.shutdown()
