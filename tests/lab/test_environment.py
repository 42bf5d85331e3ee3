"""The variables of each host's process, and its processors."""

import pytest
from hypothesis import given, strategies as st

from evenkeel.errors import ConfigurationError
from evenkeel.lab.environment import deal_cpus, environment, read_cpus
from evenkeel.lab.topology import Topology


def test_the_variables_of_torchrun():
    own = environment(Topology(4), 2, {"HOME": "home", "RANK": "7"}, threads=3, port=1234)
    assert own == {
        "HOME": "home",
        "RANK": "2",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "GROUP_RANK": "2",
        "MASTER_ADDR": "10.77.0.1",
        "MASTER_PORT": "1234",
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "3",
        "PYTHONUNBUFFERED": "1",
    }


def test_the_callers_own_threads_stay():
    assert environment(Topology(4), 0, {"OMP_NUM_THREADS": "8"}, threads=1)["OMP_NUM_THREADS"] == "8"


@pytest.mark.parametrize(("text", "cpus"), [("0", [0]), ("0-3,6", [0, 1, 2, 3, 6]), ("2,1,1", [1, 2])])
def test_cpu_lists(text, cpus):
    assert read_cpus(text, range(8)) == cpus


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3-2", "0,,1", "8", "0-8"])
def test_wrong_cpu_lists(text):
    with pytest.raises(ConfigurationError, match=r"^cpus"):
        read_cpus(text, range(8))


@given(st.lists(st.integers(0, 99), min_size=1, max_size=64, unique=True), st.integers(1, 40))
def test_cpus_are_dealt_out_evenly(cpus, hosts):
    dealt = deal_cpus(cpus, hosts)
    assert len(dealt) == hosts
    sizes = {len(own) for own in dealt}
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    given_out = [cpu for own in dealt for cpu in own]
    assert set(given_out) <= set(cpus)
    if len(cpus) >= hosts:
        assert sorted(given_out) == sorted(cpus)  # nobody shares
