"""Says from a configuration whom the server lets in, and warns where that is everybody."""

import os

from evenkeel.backends.worker.address import Address
from evenkeel.backends.worker.key import is_open
from evenkeel.serving.config import ServeConfig
from evenkeel.serving.front.access import Access, Guard
from evenkeel.trust.keys import CLIENT_KEYS_VARIABLE, KeyRing

__all__ = ["exposures", "guard_of"]


def guard_of(config: ServeConfig) -> Guard:
    """Makes what stands in front of the front ends.

    Raises:
        ConfigurationError: there are keys, and they cannot be read.
    """
    tls = config.tls
    certificates = "none" if tls is None or tls.client_ca is None else tls.clients
    keys = KeyRing(config.keys.file) if _has_keys(config) else None
    if keys is None and certificates == "none":
        return Guard(None, tls)
    return Guard(Access(keys, certificates, config.keys.open), tls)


def exposures(config: ServeConfig) -> list[str]:
    """Says what strangers on other machines can do to a server of this configuration; nothing where none reach it."""
    hosts = [host for host in config.host if not host.startswith("unix:")]
    reached = ", ".join(host for host in hosts if is_open(Address("tcp", host=host.strip("[]"))))
    said = []
    if reached and not _has_keys(config) and (config.tls is None or config.tls.client_ca is None):
        said.append(f"{reached} is open: whoever reaches it can send requests; give keys.file or tls.client_ca")
    if reached and config.tls is None:
        said.append(
            f"{reached} is without TLS: what clients send, keys too, can be read and changed on its way; "
            "give tls.certificate, or have a proxy do it"
        )
    return said


def _has_keys(config: ServeConfig) -> bool:
    # A variable that is set and empty is a mistake, which must not open the server: then there is an error.
    return config.keys.file is not None or CLIENT_KEYS_VARIABLE in os.environ
