"""The simulator keeps the closed forms, gives every sum exactly once, and does not depend on the fragments' size."""

from dataclasses import replace

import numpy as np
import pytest

from evenkeel.errors import ConfigurationError
from evenkeel.switch.jobs import Workload, make_jobs
from evenkeel.switch.simulator import (
    POLICIES,
    LayerLoad,
    NodeRestart,
    SimulatedNetwork,
    TrainingJob,
    simulate,
    window_of,
)

NETWORK = SimulatedNetwork(rate_bps=10e9, fragment_bytes=2048)
SWITCHING = [name for name in POLICIES if name not in ("ring",)]
SMALL = Workload(jobs=4, workers=4, steps=2, megabytes=1.0, rate_bps=10e9)


def one_job(megabytes: float, workers: int = 4) -> list[TrainingJob]:
    """A single job that computes nothing, with one layer."""
    return [TrainingJob(0.0, (LayerLoad(round(megabytes * 1e6), 0.0, 0.0),), np.ones((1, workers)))]


def test_a_job_alone_takes_what_its_bytes_take_and_a_round_trip() -> None:
    expected = 8e6 * 8 / NETWORK.rate_bps + 2 * NETWORK.worker_delay_s
    for policy in ("unlimited", "assoc", "esa", "atp-free"):
        taken = simulate(policy, one_job(8.0), NETWORK, 4096).times_s[0]
        assert taken == pytest.approx(expected, rel=0.01), policy


def test_a_small_window_limits_the_rate() -> None:
    network = replace(NETWORK, window_round_trips=0.5, worker_delay_s=50e-6, server_delay_s=50e-6)
    round_trip_s = 2 * network.worker_delay_s + 2 * network.fragment_s
    expected = (
        8e6 / (window_of(network) * network.fragment_bytes) * max(round_trip_s, window_of(network) * network.fragment_s)
    )
    taken = simulate("unlimited", one_job(8.0), replace(network, rate_bps=10e9), 1).times_s[0]
    assert taken == pytest.approx(expected, rel=0.05)


def test_a_server_alone_takes_every_workers_bytes() -> None:
    taken = simulate("ps", one_job(2.0, workers=8), NETWORK, 1).times_s[0]
    assert taken == pytest.approx(8 * 2e6 * 8 / NETWORK.rate_bps, rel=0.03)


def test_a_ring_sends_each_byte_nearly_twice() -> None:
    taken = simulate("ring", one_job(8.0, workers=8), NETWORK, 1).times_s[0]
    assert taken == pytest.approx(2 * 7 / 8 * 8e6 * 8 / NETWORK.rate_bps, rel=0.05)


def test_atp_holds_a_slot_for_the_servers_round_trip() -> None:
    """So few slots that they, and not the links, limit what is added in the switch."""
    network = replace(NETWORK, server_delay_s=100e-6, window_round_trips=0.2)
    atp, freed = (simulate(policy, one_job(4.0), network, 16).in_switch for policy in ("atp", "atp-free"))
    assert atp < 0.5 * freed


@pytest.mark.parametrize("policy", SWITCHING)
def test_every_sum_is_right_under_loss_duplicates_and_reordering(policy: str) -> None:
    network = replace(NETWORK, loss=0.01, duplicate=0.01, reorder=0.05)
    result = simulate(policy, make_jobs(SMALL), network, 64, seed=3)
    assert result.lost > 0
    assert result.wrong == 0


@pytest.mark.parametrize("policy", SWITCHING)
def test_every_sum_is_right_when_workers_and_servers_restart(policy: str) -> None:
    network = replace(NETWORK, loss=0.002)
    faults = [
        NodeRestart(1.0e-3, 0.2e-3, job=0, number=1),
        NodeRestart(1.5e-3, 0.3e-3, job=-1, number=1),
        NodeRestart(2.0e-3, 0.1e-3, job=2, number=3),
    ]
    result = simulate(policy, make_jobs(SMALL), network, 64, faults=faults, seed=4)
    assert result.wrong == 0


@pytest.mark.parametrize("policy", [name for name in SWITCHING if name != "ps"])
def test_a_tree_of_switches_gives_the_same_sums(policy: str) -> None:
    result = simulate(policy, make_jobs(SMALL), replace(NETWORK, racks=2), 64)
    assert result.wrong == 0
    lossy = simulate(policy, make_jobs(SMALL), replace(NETWORK, racks=2, loss=0.005), 64)
    assert lossy.wrong == 0


def test_a_thousand_workers() -> None:
    jobs = make_jobs(Workload(jobs=64, workers=16, steps=1, megabytes=0.25, rate_bps=10e9))
    result = simulate("assoc", jobs, replace(NETWORK, racks=4), 1024)
    assert result.wrong == 0
    assert (result.times_s > 0).all()


def test_the_same_arguments_give_the_same_figures() -> None:
    network = replace(NETWORK, loss=0.01)
    first, second = (simulate("esa", make_jobs(SMALL), network, 64, seed=7) for _ in range(2))
    assert (first.times_s == second.times_s).all()
    assert first.events == second.events


@pytest.mark.parametrize("policy", ["unlimited", "atp-free", "esa", "assoc"])
def test_half_the_fragment_changes_little(policy: str) -> None:
    """Slots are doubled with it, so that memory is the same in relation to what is on its way."""
    jobs = make_jobs(replace(SMALL, megabytes=4.0, steps=3))
    whole = simulate(policy, jobs, NETWORK, 32).times_s.mean()
    half = simulate(policy, jobs, replace(NETWORK, fragment_bytes=1024), 64).times_s.mean()
    assert half == pytest.approx(whole, rel=0.03)


def test_more_memory_never_makes_a_job_alone_slower() -> None:
    times = [simulate("assoc", one_job(4.0), NETWORK, slots).times_s[0] for slots in (8, 64, 512)]
    assert times[0] >= times[1] >= times[2]


def test_sets_with_time_out_of_progress_come_close_to_infinite_memory() -> None:
    jobs = make_jobs(Workload(jobs=8, workers=8, steps=3, megabytes=4.0))
    network = SimulatedNetwork()
    infinite = simulate("unlimited", jobs, network, 1).times_s.mean()
    assert simulate("assoc", jobs, network, 256).times_s.mean() <= 1.03 * infinite
    assert (
        simulate("atp", jobs, network, 256).times_s.mean() >= 1.35 * simulate("esa", jobs, network, 256).times_s.mean()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "nothing"}, "policy"),
        ({"slots": 100}, "power of two"),
        ({"faults": [NodeRestart(0.0, 0.0, job=0, number=99)]}, "no worker"),
    ],
)
def test_refuses_what_cannot_be_simulated(changes: dict[str, object], message: str) -> None:
    arguments = {"policy": "esa", "jobs": one_job(0.1), "network": NETWORK, "slots": 16, **changes}
    with pytest.raises(ConfigurationError, match=message):
        simulate(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [33])
def test_refuses_more_workers_than_a_bitmap_holds(workers: int) -> None:
    with pytest.raises(ConfigurationError, match="32 workers"):
        simulate("esa", one_job(0.1, workers), NETWORK, 16)
