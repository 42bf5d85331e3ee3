"""An edge node and its data centre for real, each a process of its own; the data centre goes away and comes back."""

import asyncio
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from evenkeel.bench.serving.server_process import Counters, ServerProcess, read_counters
from evenkeel.client import AsyncInferenceClient, Classification
from evenkeel.errors import RequestError
from evenkeel.http_client.client import request_once
from evenkeel.models import shipped

pytestmark = pytest.mark.timeout(180)


async def until(holds: Callable[[Counters], bool], url: str) -> Counters:
    counters = Counters()
    async with asyncio.timeout(60):
        while not holds(counters):
            counters = await read_counters(url)
    return counters


def test_an_edge_node_keeps_its_promise_and_its_deadlines_while_its_data_centre_goes_and_comes() -> None:
    with np.load(shipped.IMAGES, allow_pickle=False) as file:
        images, labels = file["images"][:100], file["labels"][:100]

    async def ask(client: AsyncInferenceClient, **needs: Any) -> list[Classification]:
        needs = {"min_accuracy": shipped.PROMISED, "timeout": 20.0, **needs}
        return list(await asyncio.gather(*(client.classify(one, **needs) for one in images)))

    async def run() -> None:
        async with ServerProcess({"replicas": 1, "backups": 0, "policy": "none"}) as far:
            node = {
                "light": "cifar10-light",
                "data_centre": far.url,
                "certificate": str(shipped.CERTIFICATE),
                "promises": {"misses": 0.005},
            }
            async with (
                ServerProcess(node, "edge") as near,
                AsyncInferenceClient(near.url, "cifar10-base") as client,
            ):
                answers = await ask(client)
                assert {one.path for one in answers} == {"edge", "data centre"}
                assert all(one.certificate and one.promise for one in answers)
                right = np.mean([one.label == answer_name(label) for one, label in zip(answers, labels, strict=True)])
                assert right > 0.85
                with pytest.raises(RequestError, match="cannot be shown by certificate"):
                    await client.classify(images[0], min_accuracy=0.99)

                far.process.send_signal(signal.SIGSTOP)  # silent, as behind a link that is gone
                counters = await until(lambda seen: seen.get("backend_up[replica-0]") == 0.0, near.url)
                assert counters["promises_unshown"] == 0
                assert (await request_once(near.url, "/v2/health/ready")).status == 200
                answers = await ask(client)
                assert {one.path for one in answers} == {"edge", "degraded"}
                assert max(one.latency_ms for one in answers) < 5000
                assert not all(one.certificate for one in answers)

                far.process.send_signal(signal.SIGCONT)
                await until(lambda seen: seen.get("backend_up[replica-0]") == 1.0, near.url)
                answers = await ask(client)
                assert {one.path for one in answers} == {"edge", "data centre"}

    def answer_name(label: int) -> str:
        return NAMES[label]

    asyncio.run(run())


NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
