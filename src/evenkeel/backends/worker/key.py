"""Proves that a worker and its clients hold the same key, each to the other, without sending it.

The worker sends a random challenge; the client answers with a challenge of its own and with the HMAC-SHA256 of both;
the worker answers with the HMAC for its own role. The roles differ, so that no side's proof can be sent back to it.
What follows is neither encrypted nor signed: a key keeps strangers out, not somebody who can change packets on their
way. For that there is TLS, with certificates on both sides, instead of a key or beside it.
"""

import hmac
import ipaddress
import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from evenkeel.backends.worker.address import Address
from evenkeel.errors import ConfigurationError, ProtocolError
from evenkeel.trust.reloaded import Reloaded, warn_if_shared

__all__ = [
    "CHALLENGE_BYTES",
    "KEY_VARIABLE",
    "UNPROVEN_BYTES",
    "challenge",
    "check_open",
    "check_proof",
    "follow_key",
    "is_open",
    "proof",
    "read_key",
]

_log = logging.getLogger(__name__)

KEY_VARIABLE = "EVENKEEL_WORKER_KEY"
CHALLENGE_BYTES = 32
UNPROVEN_BYTES = 4096  # the longest payload that is taken of a peer that has not proved that it holds the key
_MIN_KEY_BYTES = 16
_MAX_KEY_BYTES = 4096


def read_key(file: str | Path = "", variable: str = KEY_VARIABLE) -> bytes:
    """Reads the shared key: the content of `file`, else of the environment variable, else nothing.

    White space around it does not count. A file that others on the machine may read is used with a warning.

    Raises:
        ConfigurationError: the file cannot be read, or the key is shorter than 16 bytes.
    """
    if file:
        where = f"key file {file}"
        try:
            with open(file, "rb") as opened:
                key = opened.read(_MAX_KEY_BYTES + 1).strip()
        except OSError as error:
            raise ConfigurationError(f"{where} cannot be read: {error.strerror or error}") from error
        warn_if_shared(Path(file))
    else:
        where = f"variable {variable}"
        key = os.environb.get(variable.encode(), b"").strip()
        if not key:
            return b""
    if not _MIN_KEY_BYTES <= len(key) <= _MAX_KEY_BYTES:
        raise ConfigurationError(
            f"{where}: a key has {_MIN_KEY_BYTES} to {_MAX_KEY_BYTES} bytes, found {len(key)}; "
            "make one with `openssl rand -hex 32`"
        )
    return key


def follow_key(file: str | Path = "", variable: str = KEY_VARIABLE) -> Callable[[], bytes]:
    """Gives what gives the shared key of now: a file is read again when it changes.

    Connections that are open stay; a new one is made with the new key.

    Raises:
        ConfigurationError: as `read_key`, at first. A later file that is wrong leaves the key as it was.
    """
    return Reloaded(f"key file {file}", [Path(file)] if file else [], lambda: read_key(file, variable)).get


def challenge() -> str:
    """Draws a fresh random challenge, as hexadecimal text."""
    return secrets.token_hex(CHALLENGE_BYTES)


def proof(key: bytes, role: str, of_worker: str, of_client: str) -> str:
    """Computes what only a holder of `key` can: the HMAC of a role and both sides' challenges, as hexadecimal text."""
    return hmac.new(key, f"evenkeel {role} {of_worker} {of_client}".encode(), "sha256").hexdigest()


def check_proof(found: object, key: bytes, role: str, of_worker: object, of_client: object) -> None:
    """Accepts the peer's proof, or refuses it; takes as long for a wrong one as for the right one.

    Raises:
        ProtocolError: the peer, a "client" or a "worker" by its role, does not hold the key.
    """
    sides = (of_worker, of_client)
    if all(isinstance(side, str) and len(side) == 2 * CHALLENGE_BYTES for side in sides) and isinstance(found, str):
        wanted = proof(key, role, str(of_worker), str(of_client))
        if hmac.compare_digest(wanted.encode(), found.encode()):
            return
    raise ProtocolError(
        f"the keys differ: the {role} does not hold the other side's key; give both the same one (--key-file of the "
        f"worker, worker_key_file of the gateway, or the variable {KEY_VARIABLE} of each)"
    )


def check_open(address: Address, key: bytes, no_key: bool, tls: bool = False) -> None:
    """Refuses a TCP address beyond this machine without a key or TLS, unless `no_key` says that this is meant.

    Args:
        address: of a worker or a link.
        key: that both sides hold; empty for none.
        no_key: anybody may connect.
        tls: both sides show and verify certificates.

    Raises:
        ConfigurationError: other machines could send tasks or answer in a worker's place.
    """
    if key or tls or not is_open(address):
        return
    if not no_key:
        raise ConfigurationError(
            f"{address} can be reached from other machines, so that anybody there could send tasks or answer them: "
            f"give both sides the same key (--key-file or worker_key_file, or the variable {KEY_VARIABLE}) or "
            "certificates (--tls-certificate, --tls-key and --tls-ca, or worker_tls), or say --no-key "
            "(no_worker_key: true)"
        )
    _log.warning(
        "NO KEY AND NO TLS at %s: whoever reaches it can send tasks or answer them, see what is sent and change it",
        address,
    )


def is_open(address: Address) -> bool:
    """True for a TCP address that other machines can reach."""
    if address.kind != "tcp" or address.host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(address.host.partition("%")[0]).is_loopback
    except ValueError:  # a name: who knows where it leads
        return True
