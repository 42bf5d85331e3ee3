"""The model's constants: found from figures that the model itself gives, and measured on a real group of two."""

import json
import os
import socket
import subprocess
import sys

import pytest
from hypothesis import given, strategies as st

from evenkeel.errors import ConfigurationError, EvenkeelError
from evenkeel.training.plan import measure
from evenkeel.training.plan.measure import fit_link, group_from_environment, measure_step
from evenkeel.training.plan.timing import CodeCost, NetworkLink, comm_s


@given(
    st.builds(NetworkLink, st.floats(1e-6, 1e-2), st.floats(1e-11, 1e-5), st.floats(0, 1e-9), st.floats(0, 1e-2)),
    st.integers(2, 64),
)
def test_a_link_is_told_from_what_it_does(link, workers):
    def all_reduce_s(size):
        return comm_s(link, workers, CodeCost("", size, size, size))

    points = [(size, all_reduce_s(size)) for size in (2**16, 2**20, 2**26)]
    found = fit_link(link.alpha_s, all_reduce_s(0), points, link.gamma_s_per_byte, workers)
    assert found.alpha_s == link.alpha_s
    assert found.beta_s_per_byte == pytest.approx(link.beta_s_per_byte, rel=1e-6)
    assert found.sync_s == pytest.approx(link.sync_s, rel=1e-6, abs=1e-12)


def test_noise_gives_no_negative_constants():
    found = fit_link(1e-3, 1e-4, [(1000, 2.0), (2000, 1.0)], 1e-9, 4)
    assert (found.beta_s_per_byte, found.sync_s) == (0, 0)


def test_one_size_is_not_enough():
    with pytest.raises(EvenkeelError, match="two sizes at least"):
        fit_link(1e-3, 1e-3, [(1000, 2.0), (1000, 1.0)], 0, 4)
    with pytest.raises(ConfigurationError, match=r"^workers: "):
        fit_link(1e-3, 1e-3, [(1000, 2.0), (2000, 1.0)], 0, 1)


class Clock:
    """Time that passes only when a test says so."""

    now_s = 0.0

    def perf_counter(self):
        return self.now_s


def test_a_step_is_timed_part_by_part(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    slow_first = iter([100.0, 1.0, 3.0, 2.0])  # the first run is not counted, the median of the others is 2
    losses = []

    def forward():
        clock.now_s += next(slow_first)
        return "loss"

    def backward(loss):
        losses.append(loss)
        clock.now_s += 5.0

    def update():
        clock.now_s += 0.25

    step = measure_step(forward, backward, update, parameters=10**7, repeats=3)
    assert (step.forward_s, step.backward_s, step.update_s) == (2.0, 5.0, 0.25)
    assert (step.parameters, step.segments) == (10**7, 3)
    assert losses == ["loss"] * 4


def test_what_a_device_still_does_counts(monkeypatch):
    clock, queue = Clock(), []
    monkeypatch.setattr(measure, "time", clock)

    def settle():
        clock.now_s += sum(queue)
        queue.clear()

    step = measure_step(
        lambda: queue.append(1.0),
        lambda loss: queue.append(2.0),
        lambda: queue.append(3.0),
        parameters=10,
        settle=settle,
    )
    assert (step.forward_s, step.backward_s, step.update_s) == (1.0, 2.0, 3.0)


def test_missing_variables_are_named(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ConfigurationError, match="RANK, MASTER_ADDR, MASTER_PORT must be set"),
        group_from_environment("gloo"),
    ):
        pass


def test_nccl_without_a_gpu_is_refused(monkeypatch):
    torch = pytest.importorskip("torch", reason="needs torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    with (
        pytest.raises(ConfigurationError, match=r"backend: nccl needs a GPU .*; choose --backend gloo"),
        group_from_environment("nccl"),
    ):
        pass


MEASURE = """
import dataclasses, json
from evenkeel.training.plan.measure import group_from_environment, measure_link
with group_from_environment("gloo"):
    print(json.dumps(dataclasses.asdict(measure_link(budget_s=0.1))))
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(rank, size, port, *command):
    own = {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_real_group_is_measured_alike_on_all_ranks():
    pytest.importorskip("torch", reason="needs torch")
    port = free_port()
    ranks = [start(rank, 2, port, "-c", MEASURE) for rank in range(2)]
    try:
        outputs = [process.communicate(timeout=90) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    found = json.loads(outputs[0][0])
    link = NetworkLink(**found["link"])
    assert found["workers"] == 2
    assert 0 < link.alpha_s < 0.1
    assert link.rate_bps > 1e6
    assert [size for size, _ in found["points"]][:3] == [2**16, 2**18, 2**20]
    assert all(seconds > 0 for _, seconds in found["points"])


def test_the_plan_of_one_rank_alone_is_refused():
    pytest.importorskip("torch", reason="needs torch")
    options = ["--parameters", "1M", "--forward", "1ms", "--backward", "2ms"]
    process = start(0, 1, free_port(), "-m", "evenkeel", "plan", "training", *options)
    _, stderr = process.communicate(timeout=90)
    assert process.returncode == 2
    assert "the process group has one rank only" in stderr
