"""Two Ray nodes on this machine: actors and a node killed, a cluster that is too small, shared, or gone."""

import asyncio
import contextlib
import os
import signal
import time

import numpy as np
import pytest

from backend_helpers import ask, until
from evenkeel.backends.ray_actors.engine import RayEngine, RayWorkers
from evenkeel.backends.ray_actors.options import RayOptions
from evenkeel.backends.worker.config import WorkerConfig
from evenkeel.backends.worker.remote import WorkerBackend
from evenkeel.errors import BackendError, BackendLostError
from evenkeel.models.cards import load_card
from evenkeel.models.digest import ModelDigests, card_digest
from evenkeel.models.shipped import card_path
from ray_helpers import add_node, alive, ray_cluster

ray = pytest.importorskip("ray", reason="pip install 'evenkeel[ray]'")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(240)]

NAME = "cifar10-base"
CARD = card_path(NAME)
IMAGE = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster() as made:
        yield made


def on(cluster, backend: WorkerBackend):
    """The node that holds the backend's worker."""
    shown = backend._link.where.rpartition(" node ")[2]
    return next(node for node in cluster.list_all_nodes() if node.node_id.startswith(shown))


@contextlib.asynccontextmanager
async def workers(cluster, count=2, address=None, **options):
    address = address or cluster.address
    engine = RayEngine(address)
    config = WorkerConfig((str(CARD),), "tcp://127.0.0.1:0")
    asked = RayOptions(count, address, strategy="STRICT_SPREAD", **options)
    digests = ModelDigests({NAME: card_digest(load_card(CARD), CARD.parent)})
    made = RayWorkers(engine, f"{NAME}/replica", asked, config, [NAME], 60.0, digests)
    backends: list[WorkerBackend] = []

    def make() -> WorkerBackend:
        backends.append(made.make(f"replica-{len(backends)}"))
        return backends[-1]

    try:
        yield make
    finally:
        await asyncio.gather(*(backend.close() for backend in backends))


async def lost_and_back(backend: WorkerBackend) -> tuple[float, float]:
    """The seconds until the backend is out, and until it is back."""
    began_s = time.monotonic()
    await until(lambda: not backend.ready)
    out_s = time.monotonic() - began_s
    await until(lambda: backend.ready)
    return out_s, time.monotonic() - began_s


def test_actors_and_nodes_that_die_are_out_at_once_and_replaced(cluster) -> None:
    async def run() -> None:
        async with workers(cluster) as make:
            one, two = make(), make()
            await asyncio.gather(one.start(), two.start())
            assert on(cluster, one) is not on(cluster, two)
            scores = [(await ask(backend, IMAGE, NAME)).outputs for backend in (one, two)]
            assert np.array_equal(*scores)
            assert scores[0].shape == (1, 10)

            os.kill(two.hello.pid, signal.SIGKILL)
            out_s, back_s = await lost_and_back(two)
            assert out_s < 3.0
            assert back_s < 30.0
            assert on(cluster, one) is not on(cluster, two)

            # A third has no node of its own: it says so, the others go on, and it comes with a node.
            third = make()
            with pytest.raises(BackendError, match="each on a node of its own; the cluster has 2 nodes and CPU 4"):
                await third.start()
            assert one.ready
            assert two.ready
            node = add_node(cluster)
            await until(lambda: third.ready)
            assert on(cluster, third) is node
            await third.close()

            # A node dies with what it holds; what it held comes back on the one that is left.
            victim = next(backend for backend in (one, two) if on(cluster, backend) is not cluster.head_node)
            lost = asyncio.ensure_future(lost_and_back(victim))
            await asyncio.to_thread(cluster.remove_node, on(cluster, victim), False)
            out_s, back_s = await lost
            assert out_s < 3.0
            assert back_s < 30.0
            assert on(cluster, victim) is node
            pids = [one.hello.pid, two.hello.pid]
        await until(lambda: not any(map(alive, pids)))

    asyncio.run(asyncio.wait_for(run(), 120))


def test_two_gateways_share_a_fleet_that_outlives_both(cluster) -> None:
    async def run() -> None:
        async with workers(cluster, fleet="blue") as make, workers(cluster, fleet="blue") as make_other:
            one, other = make(), make_other()
            await asyncio.gather(one.start(), other.start())
            pid = one.hello.pid
            assert other.hello.pid == pid
            replies = await asyncio.gather(*(ask(backend, IMAGE, NAME) for backend in (one, other) * 20))
            assert all(reply.error is None for reply in replies)
            os.kill(pid, signal.SIGKILL)
            await asyncio.gather(lost_and_back(one), lost_and_back(other))
            pid = one.hello.pid
            assert other.hello.pid == pid
        assert alive(pid)

    try:
        asyncio.run(asyncio.wait_for(run(), 60))
    finally:
        ray.init(address=cluster.address, namespace="evenkeel", log_to_driver=False)
        ray.kill(ray.get_actor(f"blue/{NAME}/replica/0"))
        ray.util.remove_placement_group(ray.util.get_placement_group(f"blue/{NAME}/replica"))
        ray.shutdown()


def test_a_cluster_that_is_gone_is_said(cluster) -> None:
    async def run() -> None:
        async with workers(cluster) as make:
            backend = make()
            await backend.start()
            address = cluster.address
            cluster.shutdown()
            await until(lambda: not backend.ready)
            assert isinstance((await ask(backend, IMAGE, NAME)).error, BackendLostError)
            async with workers(cluster, address=address) as make_other:
                later = make_other()
                with pytest.raises(BackendError, match=r"no Ray cluster answers at .*: .* refused; start one with"):
                    await later.start()

    asyncio.run(asyncio.wait_for(run(), 90))
