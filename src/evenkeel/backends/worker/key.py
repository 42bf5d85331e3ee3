"""Proves that a worker and its clients hold the same key, each to the other, without sending it.

The worker sends a random challenge; the client answers with a challenge of its own and with the HMAC-SHA256 of both;
the worker answers with the HMAC for its own role. The roles differ, so that no side's proof can be sent back to it.
What follows is neither encrypted nor signed: a key keeps strangers out, not somebody who can change packets on their
way.
"""

import hmac
import ipaddress
import logging
import os
import secrets
from pathlib import Path

from evenkeel.backends.worker.address import Address
from evenkeel.errors import ConfigurationError, ProtocolError

__all__ = ["CHALLENGE_BYTES", "KEY_VARIABLE", "challenge", "check_open", "check_proof", "is_open", "proof", "read_key"]

_log = logging.getLogger(__name__)

KEY_VARIABLE = "EVENKEEL_WORKER_KEY"
CHALLENGE_BYTES = 32
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
                if os.fstat(opened.fileno()).st_mode & 0o077:
                    _log.warning("%s can be read by other users of this machine; run `chmod 600` on it", where)
        except OSError as error:
            raise ConfigurationError(f"{where} cannot be read: {error.strerror or error}") from error
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


def check_open(address: Address, key: bytes, no_key: bool) -> None:
    """Refuses a TCP address beyond this machine without a key, unless `no_key` says that this is meant.

    Raises:
        ConfigurationError: there is no key, and other machines could send tasks or answer in a worker's place.
    """
    if key or not is_open(address):
        return
    if not no_key:
        raise ConfigurationError(
            f"{address} can be reached from other machines, so that anybody there could send tasks or answer them: "
            f"give both sides the same key (--key-file or worker_key_file, or the variable {KEY_VARIABLE}), "
            "or say --no-key (no_worker_key: true)"
        )
    _log.warning("%s has no key: whoever reaches it can send tasks, or answer in a worker's place", address)


def is_open(address: Address) -> bool:
    """True for a TCP address that other machines can reach."""
    if address.kind != "tcp" or address.host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(address.host.partition("%")[0]).is_loopback
    except ValueError:  # a name: who knows where it leads
        return True
