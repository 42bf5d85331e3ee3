"""Runs a gateway in a process of its own, as a benchmark needs it: started, watched, read, stopped."""

import asyncio
import os
import re
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from evenkeel.errors import EvenkeelError
from evenkeel.http_client.client import NO_ACCESS, ClientAccess, request_once

__all__ = ["Counters", "ServerProcess", "read_counters"]

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 20.0
_MORE_LABELS = ("model", "kind", "address")  # which a server of one model need not be asked for


class Counters(dict[str, float]):
    """Holds counters of a gateway: name, with its label value in brackets where it has one."""

    def since(self, before: "Counters") -> "Counters":
        """Subtracts: what was counted between two readings."""
        return Counters({name: value - before.get(name, 0.0) for name, value in self.items()})

    def total(self, prefix: str) -> float:
        """Sums one counter over its label values."""
        return sum(value for name, value in self.items() if name.startswith(f"{prefix}["))


async def read_counters(url: str, access: ClientAccess = NO_ACCESS) -> Counters:
    """Reads the counters at `url`/metrics; empty when the server has none of ours."""
    response = await request_once(url, "/metrics", access)
    if response.status != 200:
        return Counters()
    counters = Counters()
    for family in text_string_to_metric_families(response.body.decode()):
        for sample in family.samples if family.type != "histogram" else ():
            if sample.name.startswith("evenkeel_"):
                label = next((text for name, text in sample.labels.items() if name not in _MORE_LABELS), None)
                name = sample.name.removeprefix("evenkeel_").removesuffix("_total")
                counters[name if label is None else f"{name}[{label}]"] = sample.value
    return counters


class ServerProcess:
    """Runs `evenkeel serve`, or an edge node, with a configuration, as an asynchronous context.

    Attributes:
        url: where it listens.
        process: the gateway; None before it starts.

    Args:
        config: as the YAML file has it.
        command: `serve` or `edge`.
    """

    def __init__(self, config: Mapping[str, Any], command: str = "serve") -> None:
        self._command = command
        self._config = {"host": "127.0.0.1", "port": 0, **config}
        self.process: asyncio.subprocess.Process | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="evenkeel-bench-")
        self.url = ""

    @property
    def pid(self) -> int:
        """Gives the process id of the gateway."""
        assert self.process is not None
        return self.process.pid

    async def __aenter__(self) -> "ServerProcess":
        path = Path(self._folder.name, "config.yaml")
        path.write_text(yaml.safe_dump(dict(self._config)), encoding="utf-8")
        log = Path(self._folder.name, "log")
        with log.open("wb") as stderr:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "evenkeel", self._command, str(path), "--parent-pid", str(os.getpid())),
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                self.url = await self._read_url()
        except (TimeoutError, EvenkeelError):
            await self._stop()
            tail = log.read_text(encoding="utf-8", errors="replace")[-2000:].strip()
            self._folder.cleanup()
            raise EvenkeelError(f"the gateway did not start: {tail or 'no message'}") from None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()
        self._folder.cleanup()

    async def _read_url(self) -> str:
        assert self.process is not None
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            # The one line that `evenkeel serve` prints once it answers.
            url = re.search(rb"https?://\S+", line)
            if url is not None:
                return url[0].decode().rstrip("/")
        raise EvenkeelError("it ended")

    async def _stop(self) -> None:
        process = self.process
        if process is None or process.returncode is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
