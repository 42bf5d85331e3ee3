"""A worker's configuration and its command line say the same."""

import pytest

from evenkeel.backends.worker.config import WorkerConfig, config_from, to_arguments
from evenkeel.errors import ConfigurationError


@pytest.mark.parametrize(
    "config",
    [
        WorkerConfig(models=("a.json",), listen="tcp://:0"),
        WorkerConfig(
            models=("base.json", "n=python:m:f"), listen="unix:/tmp/a b.sock", threads=2, max_queued=5,
            delay="two-mode:scale=0.3,seed=7", delay_cost=0.6, delay_epoch_s=-1.25e-3, worker_number=8, drain_s=0.5,
            parent_pid=77,
        ),
    ],
)  # fmt: skip
def test_a_configuration_comes_back_from_its_command_line(config):
    assert config_from(to_arguments(config), "worker") == config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"models": ()}, "at least one model"),
        ({"listen": "nowhere"}, "address 'nowhere'"),
        ({"delay": "nevermore"}, "nevermore"),
        ({"threads": 0}, "worker.threads: expected a whole number of at least 1, found 0"),
        ({"max_queued": 0}, "worker.max_queued: expected a whole number of at least 1"),
        ({"worker_number": -1}, "worker_number"),
        ({"delay_cost": 0.0}, "worker.delay_cost: expected a number of at least 1e-09, found 0.0"),
        ({"delay_cost": float("nan")}, "delay_cost"),
        ({"drain_s": -1.0}, "drain_s"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(changes, says):
    with pytest.raises(ConfigurationError, match=says):
        WorkerConfig(**{"models": ("a.json",), "listen": "tcp://:0", **changes})


def test_an_unknown_option_exits_with_2(capsys):
    with pytest.raises(SystemExit) as ending:
        config_from(["--model", "a.json", "--listen", "tcp://:0", "--speed", "9"], "worker")
    assert ending.value.code == 2
    assert "--speed" in capsys.readouterr().err


def test_help_is_of_the_command_and_hides_what_only_a_gateway_says(capsys):
    with pytest.raises(SystemExit) as ending:
        config_from(["--help"], "evenkeel worker")
    assert ending.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: evenkeel worker ")
    assert "\n    evenkeel worker --model cifar10-base --listen tcp://" in said
    for internal in ("--delay-epoch", "--delay-cost", "--worker-number", "--parent-pid"):
        assert internal not in said


def test_the_older_names_of_limits_are_taken_and_hidden(capsys):
    least = ["--model", "a.json", "--listen", "tcp://:0"]
    config = config_from([*least, "--most-queued", "5", "--most-clients=6", "--most-rows", "7"], "worker")
    assert (config.max_queued, config.max_clients, config.max_rows) == (5, 6, 7)
    assert config_from(least, "worker") == WorkerConfig(models=("a.json",), listen="tcp://:0")
    with pytest.raises(SystemExit):
        config_from(["--help"], "worker")
    assert "most-" not in capsys.readouterr().out
