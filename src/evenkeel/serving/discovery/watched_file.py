"""Reads where nodes are from a file, and again whenever it has changed."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import yaml

from evenkeel.errors import ConfigurationError
from evenkeel.serving.discovery.discovery import MAX_NODES, Discovery, OnFound

__all__ = ["WatchedFile", "read_addresses"]

_log = logging.getLogger(__name__)
_MAX_BYTES = 1 << 20


class WatchedFile(Discovery):
    """Watches a file of addresses: YAML or JSON (a list, or `addresses: [...]`), or text with one in a line.

    Args:
        path: of the file; `.yaml`, `.yml` and `.json` say what it is.
        every_s: between two looks.
    """

    def __init__(self, path: Path, every_s: float = 1.0) -> None:
        self._path, self._every_s = path, every_s

    async def watch(self, found: OnFound) -> None:
        """Calls `found` when two looks in a row saw the same new content, so that a file is not used half written."""
        used: bytes | str | None = None
        last: bytes | str | None = None
        while True:
            content = self._content()
            # The first time there is nothing to lose.
            if content != used and (content == last or used is None):
                used = content
                await self._use(content, found)
            last = content
            await asyncio.sleep(self._every_s)

    def _content(self) -> bytes | str:
        """Reads the file, or gives the reason why that cannot be done."""
        try:
            with self._path.open("rb") as file:
                return file.read(_MAX_BYTES + 1)
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"

    async def _use(self, content: bytes | str, found: OnFound) -> None:
        try:
            if isinstance(content, str):
                raise ConfigurationError(content)
            loop, suffix = asyncio.get_running_loop(), self._path.suffix.lower()
            found(await loop.run_in_executor(None, read_addresses, content, suffix))  # YAML takes its time
        except ConfigurationError as error:
            _log.warning("%s: %s; nodes stay as they are", self._path, error)


def read_addresses(content: bytes, suffix: str) -> list[str]:
    """Reads addresses, at least one, from the content of a file.

    Raises:
        ConfigurationError: it is too large, cannot be read, or holds something else.
    """
    if len(content) > _MAX_BYTES:
        raise ConfigurationError(f"holds more than {_MAX_BYTES >> 20} MiB")
    try:
        text = content.decode("utf-8-sig")
        raw: Any
        if suffix in (".yaml", ".yml", ".json"):
            raw = yaml.safe_load(text)
            raw = raw.get("addresses") if isinstance(raw, dict) else raw
        else:
            lines = (line.partition("#")[0].strip() for line in text.splitlines())
            raw = [line for line in lines if line]
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:  # by dates that are none
        raise ConfigurationError(f"cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(raw, list) or not raw or not all(isinstance(entry, str) for entry in raw):
        raise ConfigurationError("holds no addresses: a list of them is needed, or one in a line")
    if len(raw) > MAX_NODES:
        raise ConfigurationError(f"holds {len(raw)} addresses; at most {MAX_NODES} are taken")
    return list(dict.fromkeys(raw))
