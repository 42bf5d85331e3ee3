"""Jobs are what the workload says, and the same for the same seed."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from evenkeel.errors import ConfigurationError
from evenkeel.switch.jobs import MODELS, Workload, make_jobs, recorded_spread

SHARED = Path(__file__).parents[3] / "shared" / "data"


def test_mixed_jobs_send_twice_or_half_as_long_as_they_compute() -> None:
    workload = Workload(jobs=2)
    for job, ratio in zip(make_jobs(workload), (2.0, 0.5), strict=True):
        sending = sum(layer.gradient_bytes for layer in job.layers) * 8 / workload.rate_bps
        computing = sum(layer.forward_s + layer.backward_s for layer in job.layers)
        assert sending / computing == pytest.approx(ratio, rel=0.01)


def test_models_keep_the_size_that_they_are_known_to_have() -> None:
    workload = Workload(jobs=len(MODELS), mix="models", shrink=4)
    for job, (megabytes, _, _) in zip(make_jobs(workload), MODELS.values(), strict=True):
        assert sum(layer.gradient_bytes for layer in job.layers) * 4 == pytest.approx(megabytes * 1e6, rel=0.01)


def test_skew_is_the_coefficient_of_variation() -> None:
    factors = make_jobs(Workload(jobs=1, workers=32, steps=2000, skew="0.5"))[0].factors
    assert factors.std() / factors.mean() == pytest.approx(0.5, rel=0.05)
    assert factors.mean() == pytest.approx(1.0, rel=0.02)


def test_one_seed_gives_the_same_jobs_and_another_gives_others() -> None:
    first, again, other = (make_jobs(Workload(arrivals="poisson", seed=seed)) for seed in (1, 1, 2))
    assert all((a.factors == b.factors).all() and a.arrival_s == b.arrival_s for a, b in zip(first, again, strict=True))
    assert first[1].arrival_s != other[1].arrival_s


def test_recorded_spreads_are_drawn_by_percentile(tmp_path: Path) -> None:
    np.savez(tmp_path / "cov.npz", cov=np.array([0.1, np.nan, 0.3]))
    spread = recorded_spread(tmp_path / "cov.npz")
    assert spread(np.array([0.0, 1.0])).tolist() == [0.1, 0.3]
    np.savez(tmp_path / "none.npz", cov=np.array([np.nan]))
    with pytest.raises(ConfigurationError, match="no coefficients"):
        recorded_spread(tmp_path / "none.npz")


@pytest.mark.parametrize("changes", [{"mix": "x"}, {"skew": "x"}, {"skew": "9"}, {"arrivals": "x"}, {"jobs": 0}])
def test_refuses_workloads_that_there_are_not(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        make_jobs(replace(Workload(), **changes))  # type: ignore[arg-type]


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data folder beside the checkout")
def test_reads_a_recorded_trace_and_recorded_stragglers() -> None:
    spread = recorded_spread(SHARED / "stragglers_alibaba_cov.npz")
    jobs = make_jobs(Workload(jobs=16), spread, SHARED / "jobs_philly.parquet")
    assert len({job.steps for job in jobs}) > 1
    assert all(later.arrival_s >= job.arrival_s for job, later in pairwise(jobs))
