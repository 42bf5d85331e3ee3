"""Makes the discovery that a text in a configuration names."""

import re
from pathlib import Path

from evenkeel.errors import ConfigurationError
from evenkeel.serving.discovery.discovery import Discovery
from evenkeel.serving.discovery.dns import DnsNames, DnsServices
from evenkeel.serving.discovery.kubernetes import KubernetesService
from evenkeel.serving.discovery.watched_file import WatchedFile

__all__ = ["FORMS", "SCHEMES", "discovery_of"]

SCHEMES = ("file:", "dns://", "srv://", "kubernetes://")
FORMS = "file:path, dns://name:port, srv://_service._tcp.name or kubernetes://service[.namespace][:port]"
_LABEL = r"[a-zA-Z0-9_](?:[a-zA-Z0-9_-]{0,61}[a-zA-Z0-9_])?"
_NAME = rf"{_LABEL}(?:\.{_LABEL})*"


def discovery_of(text: str, folder: Path = Path()) -> Discovery:
    """Makes a discovery; paths are relative to `folder`.

    Raises:
        ConfigurationError: the text names none.
    """
    if text.startswith("file:") and text != "file:":
        return WatchedFile(folder / text.removeprefix("file:"))
    if (match := re.fullmatch(rf"dns://({_NAME})\.?:(\d{{1,5}})", text)) and 0 < int(match[2]) < 65536:
        return DnsNames(match[1], int(match[2]))
    if match := re.fullmatch(rf"srv://({_NAME})\.?", text):
        return DnsServices(match[1])
    if match := re.fullmatch(r"kubernetes://([a-z0-9-]{1,63})(?:\.([a-z0-9-]{1,63}))?(?::([a-z0-9-]{1,15}))?", text):
        return KubernetesService(match[1], match[2] or "", match[3] or "")
    raise ConfigurationError(f"{text[:200]!r}: expected {FORMS}")
