"""The recipe for several gateways on Ray that share a fleet: they answer, one dies, all end."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from evenkeel.client import InferenceClient
from evenkeel.errors import EvenkeelError
from ray_helpers import ray_cluster

RECIPE = Path(__file__).parents[2] / "examples" / "ray_gateways.py"
CONFIG = """
replicas: {ray: {count: 2, fleet: blue, resources: {CPU: 0.5}}}
backups: {ray: {count: 1, fleet: blue, resources: {CPU: 0.5}}}
"""
IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)


def recipe(*arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(RECIPE), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


def label(url):
    with InferenceClient(url, "cifar10-base") as client:
        return client.classify(IMAGE, timeout=10.0).label


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(300)
def test_gateways_share_a_fleet_and_one_that_dies_is_started_again(tmp_path):
    ray = pytest.importorskip("ray", reason="pip install 'evenkeel[ray]'")
    (tmp_path / "gateway.yaml").write_text(CONFIG)
    with ray_cluster(1, 6) as cluster:
        given = (tmp_path / "gateway.yaml", "--address", cluster.address)
        one, other = recipe("up", *given)
        assert one != other
        assert label(one) == label(other)
        ray.init(address=cluster.address, namespace="evenkeel", log_to_driver=False)
        try:
            names = {entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True)}
            workers = {f"blue/cifar10-base-1/{place}" for place in ("replica/0", "replica/1", "backup/0")}
            assert names == workers | {"gateway-0", "gateway-1"}
            ray.kill(ray.get_actor("gateway-0"), no_restart=False)
            assert label(other)
            urls, until_s = [], time.monotonic() + 60
            while time.monotonic() < until_s and (not urls or urls[0] == one):
                try:
                    urls = recipe("up", *given)
                    label(urls[0])
                except (EvenkeelError, AssertionError):
                    urls = []
            assert urls[1] == other
            recipe("down", *given)
            assert not ray.util.list_named_actors(all_namespaces=True)
        finally:
            ray.shutdown()
