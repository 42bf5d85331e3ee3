"""A model whose workers Ray places: it answers, grows and shrinks there, and says what there is no room for."""

import asyncio

import numpy as np
import pytest

from evenkeel.backends.worker.remote import WorkerBackend
from evenkeel.errors import BackendError, MissingExtraError
from evenkeel.serving.config import read_config
from evenkeel.serving.hosted import HostedModel
from ray_helpers import alive, ray_cluster

IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)


def config(address, **more):
    ray = {"count": 2, "address": address, "strategy": "SPREAD"}
    return read_config({"replicas": {"ray": ray}, "backups": {"ray": {**ray, "count": 1}}, **more})


async def answer(gateway):
    outcome = asyncio.get_running_loop().create_future()
    gateway.submit(IMAGE, outcome.set_result)
    return await outcome


def test_without_ray_a_configuration_with_it_is_refused_by_the_install_line(monkeypatch):
    monkeypatch.setattr("evenkeel.backends.ray_actors.engine.find_spec", lambda name: None)

    async def run():
        with pytest.raises(MissingExtraError, match=r"Ray is not installed; run: pip install 'evenkeel\[ray\]'"):
            HostedModel(config("auto"))

    asyncio.run(run())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(240)
def test_a_model_on_ray_answers_and_is_resized_as_far_as_there_is_room():
    pytest.importorskip("ray", reason="pip install 'evenkeel[ray]'")

    async def run(address):
        hosted = HostedModel(config(address))
        try:
            await hosted.start()
            assert hosted.gateway.ready
            assert [member.own for member in hosted.fleet.members] == [True] * 3
            assert [member.backend.hello.models.keys() for member in hosted.fleet.members] == [
                {"cifar10-base"},
                {"cifar10-base"},
                {"cifar10-base", "cifar10-collage-2x2", "cifar10-collage-3x3"},
            ]
            before = await answer(hosted.gateway)
            assert before.error is None
            await hosted.fleet.resize("replica", 3)
            with pytest.raises(
                BackendError,
                match=r"one more worker with CPU 1 was asked for.* the cluster has 2 nodes and CPU 4 with 0 free",
            ):
                await hosted.fleet.resize("replica", 4)
            assert [member.name for member in hosted.fleet.members if member.kind == "replica"] == [
                "replica-0",
                "replica-1",
                "replica-2",
            ]
            await hosted.fleet.resize("replica", 1)
            after = await answer(hosted.gateway)
            assert np.array_equal(after.answer.value, before.answer.value)
            backends = [member.backend for member in hosted.fleet.members]
            assert all(isinstance(backend, WorkerBackend) for backend in backends)
            return [backend.hello.pid for backend in backends]
        finally:
            await hosted.close()

    with ray_cluster() as cluster:
        pids = asyncio.run(asyncio.wait_for(run(cluster.address), 100))
        assert len(pids) == 2
        assert not any(map(alive, pids))
