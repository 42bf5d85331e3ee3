"""Sends requests in an open loop: they leave when they are due, whether or not earlier ones are answered.

A closed loop sends its next request when the last one is answered, so a slow server gets fewer and looks better
than it is (coordinated omission). Here latency counts from the moment a request was meant to leave.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from evenkeel.arrays import Array
from evenkeel.errors import EvenkeelError
from evenkeel.figures.records import RequestRecord
from evenkeel.http_client.client import NO_ACCESS, ClientAccess, HttpClient
from evenkeel.oip.requests import write_request
from evenkeel.oip.responses import parse_response
from evenkeel.oip.types import HEADER_LENGTH, Tensor

__all__ = ["Target", "drive"]

# A client that stops waiting before the server's deadline would cut the tail that is being measured.
_TIMEOUT_S = 120.0
_MAX_ANSWER_BYTES = 64 << 20


@dataclass(frozen=True)
class Target:
    """Describes a running server and the pictures to send it.

    Attributes:
        url: of the server, without a path.
        model: name of the model there.
        input_name: of its input tensor.
        images: `[count, ...]`, sent in turn, in the model's own layout.
        labels: `[count]` true classes, or None.
        access: what the server lets us in with.
    """

    url: str
    model: str
    input_name: str
    images: Array
    labels: Array | None
    access: ClientAccess = NO_ACCESS


async def drive(
    target: Target,
    times_s: Array,
    *,
    keys: bool = True,
    on_answer: Callable[[RequestRecord], object] = lambda record: None,
) -> list[RequestRecord]:
    """Sends a request at each of `times_s` (seconds from now, ascending); gives what became of each, in that order.

    Args:
        target: where to, and what.
        times_s: `[requests]`.
        keys: name the pieces of work, so that injected delays are the same in every run (evenkeel servers only).
        on_answer: called with each record as it is complete.
    """
    bodies = _bodies(target, len(times_s), keys)
    access, kept = target.access, [HEADER_LENGTH.lower().encode()]
    async with HttpClient(target.url, kept, credentials=access.credentials, tls=access.tls) as client:
        start_s = time.perf_counter() + 0.05
        tasks: list[asyncio.Task[RequestRecord]] = []
        async with asyncio.TaskGroup() as group:
            for number, due_s in enumerate(times_s):
                await asyncio.sleep(start_s + float(due_s) - time.perf_counter())
                task = group.create_task(_send(client, target, number, float(due_s), start_s, bodies(number)))
                task.add_done_callback(lambda done: on_answer(done.result()))
                tasks.append(task)
    return [task.result() for task in tasks]


def _bodies(target: Target, requests: int, keys: bool) -> Callable[[int], tuple[bytes, int | None]]:
    def body(number: int) -> tuple[bytes, int | None]:
        image = target.images[number % len(target.images)][None]
        tensor = Tensor(target.input_name, "UINT8" if image.dtype == np.uint8 else "FP32", image.shape, image)
        parameters = {"evenkeel_key": number} if keys else {}
        return write_request([tensor], parameters={**parameters, "binary_data_output": True}, binary=True)

    return body


async def _send(
    client: HttpClient,
    target: Target,
    number: int,
    intended_s: float,
    start_s: float,
    body: tuple[bytes, int | None],
) -> RequestRecord:
    content, header_length = body
    headers = b"content-type: application/octet-stream\r\n"
    if header_length is not None:
        headers += f"{HEADER_LENGTH}: {header_length}\r\n".encode()
    truth = None if target.labels is None else int(target.labels[number % len(target.labels)])
    sent_s = time.perf_counter() - start_s
    status, source, confidence, label, error = 0, "", None, None, None
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            path = f"/v2/models/{target.model}/infer"
            answer = await client.request("POST", path, content, headers, _MAX_ANSWER_BYTES)
        status = answer.status
        if status == 200:
            length = answer.header(HEADER_LENGTH.lower().encode())
            source, confidence, label = _read(answer.body, None if length is None else int(length))
        else:
            error = answer.body[:200].decode("utf-8", "replace")
    except (TimeoutError, EvenkeelError, ValueError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    done_s = time.perf_counter() - start_s
    return RequestRecord(number, intended_s, sent_s, done_s, status, source, confidence, label, truth, error)


def _read(body: bytes, header_length: int | None) -> tuple[str, float | None, int | None]:
    """Reads source, confidence and label; another server's answer has scores alone."""
    outputs: dict[str, Any] = {tensor.name: tensor.data for tensor in parse_response(body, header_length).outputs}
    scores = outputs.get("scores")
    if scores is None:
        numbers = (data for data in outputs.values() if isinstance(data, np.ndarray))
        scores = next((data for data in numbers if data.dtype.kind == "f"), None)
    label = None if scores is None else int(np.argmax(scores))
    source = outputs["source"][0].decode() if "source" in outputs else "exact"
    confidence = float(np.ravel(outputs["confidence"])[0]) if "confidence" in outputs else None
    return source, confidence, label
