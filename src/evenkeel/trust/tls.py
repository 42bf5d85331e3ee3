"""Makes the contexts of TLS from files, for servers and for clients, and says in words why a handshake failed.

TLS 1.2 is the least. Files are read again when they change: connections that are made from then on use the new ones.
"""

import logging
import math
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from evenkeel.errors import ConfigurationError
from evenkeel.settings import FilePath, one_of, setting
from evenkeel.trust.reloaded import Reloaded, warn_if_shared

__all__ = ["ClientTls", "ServerContext", "ServerTls", "client_contexts", "server_contexts", "tls_reason"]

_log = logging.getLogger(__name__)

_SOON_S = 7 * 86400.0  # before a certificate expires it is warned of
_NOT_YET_VALID, _EXPIRED = 9, 10  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
_NO_TLS = "the other side does not speak TLS"
_REASONS = {
    "WRONG_VERSION_NUMBER": _NO_TLS,
    "HTTP_REQUEST": _NO_TLS,
    "PACKET_LENGTH_TOO_LONG": _NO_TLS,
    "RECORD_LAYER_FAILURE": _NO_TLS,
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the other side showed no certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the other side wants a certificate, and this one has none",
    "TLSV1_ALERT_UNKNOWN_CA": "the other side does not know the authority that signed this one's certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the other side says that this one's certificate has expired",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the other side does not take this one's certificate",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "the other side does not take this one's certificate",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "the two sides have no way of TLS in common, or a certificate is missing",
    "TLSV1_ALERT_PROTOCOL_VERSION": "the two sides have no version of TLS in common",
    "UNSUPPORTED_PROTOCOL": "the two sides have no version of TLS in common",
    "NO_SHARED_CIPHER": "the two sides have no cipher in common",
}


@dataclass(frozen=True)
class ServerTls:
    """Names the files of a server."""

    certificate: FilePath = setting(..., "Certificate of the server, with those up to its authority's (PEM).")
    key: FilePath | None = setting(None, "Its private key (PEM); by default in the certificate's file.")
    client_ca: FilePath | None = setting(None, "Authorities (PEM) whose certificates clients show.")
    clients: Annotated[Literal["required", "optional"], one_of(("required", "optional"))] = setting(
        "required", "Whether each client must show a certificate, or may come with a key instead."
    )

    @property
    def names_clients(self) -> bool:
        """True if nobody connects without a certificate."""
        return self.client_ca is not None and self.clients == "required"


@dataclass(frozen=True)
class ClientTls:
    """Names the files of a client."""

    ca: FilePath | None = setting(None, "Authorities (PEM) of the servers' certificates; by default the system's.")
    certificate: FilePath | None = setting(None, "Certificate that is shown to servers (PEM).")
    key: FilePath | None = setting(None, "Its private key (PEM); by default in the certificate's file.")
    name: str = setting("", "Name that servers' certificates must have; by default the host that is connected to.")


class ServerContext(ssl.SSLContext):
    """Is a server's context that knows when its certificate expires, in seconds since the epoch."""

    expires_s = math.inf


def server_contexts(tls: ServerTls, protocols: Sequence[str] = ()) -> Reloaded[ServerContext]:
    """Gives the context for each new connection of a server.

    Args:
        tls: its files.
        protocols: that it speaks, for ALPN, the preferred first.

    Raises:
        ConfigurationError: a file is missing, damaged or expired, or a key is another certificate's.
    """

    def load() -> ServerContext:
        context = ServerContext(ssl.PROTOCOL_TLS_SERVER)
        _harden(context, protocols)
        _load_own(context, tls.certificate, tls.key)
        context.expires_s = _check_dates(tls.certificate, tls.key, of_server=True)
        if tls.client_ca is not None:
            _load_authorities(context, tls.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED if tls.clients == "required" else ssl.CERT_OPTIONAL
        return context

    return Reloaded("the certificate of this server", _files(tls.certificate, tls.key, tls.client_ca), load)


def client_contexts(tls: ClientTls, protocols: Sequence[str] = ()) -> Reloaded[ssl.SSLContext]:
    """Gives the context for each new connection of a client.

    Raises:
        ConfigurationError: as `server_contexts`.
    """

    def load() -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        _harden(context, protocols)
        if tls.ca is None:
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        else:
            _load_authorities(context, tls.ca)
        if tls.certificate is not None:
            _load_own(context, tls.certificate, tls.key)
            _check_dates(tls.certificate, tls.key, of_server=False)
        return context

    if tls.key is not None and tls.certificate is None:
        raise ConfigurationError(f"tls: {tls.key} is the key of no certificate; give that, too")
    return Reloaded("a certificate for servers elsewhere", _files(tls.ca, tls.certificate, tls.key), load)


def tls_reason(error: BaseException) -> str:
    """Says in words why a handshake failed; what is no error of TLS is said as it is."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate of the other side is refused: {error.verify_message.rstrip('.')}"
    if isinstance(error, ssl.SSLError):
        return _REASONS.get(error.reason or "", f"TLS failed: {error.reason or error}")
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def _files(*paths: Path | None) -> list[Path]:
    return [path for path in paths if path is not None]


def _harden(context: ssl.SSLContext, protocols: Sequence[str]) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    if protocols:
        context.set_alpn_protocols(list(protocols))


def _load_own(context: ssl.SSLContext, certificate: Path, key: Path | None) -> None:
    def locked() -> str:  # else OpenSSL would ask on the terminal, and a server would wait there
        raise ConfigurationError(f"key {key or certificate} is locked by a password; give it without one")

    _check_readable(certificate)
    if key is not None:
        _check_readable(key)
    warn_if_shared(key or certificate)
    try:
        context.load_cert_chain(certificate, key, locked)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigurationError(f"key {key or certificate} is not that of certificate {certificate}") from None
        raise ConfigurationError(
            f"certificate {certificate} and key {key or certificate} cannot be used: {error.reason or 'no PEM there'}"
        ) from None


def _load_authorities(context: ssl.SSLContext, file: Path) -> None:
    _check_readable(file)
    try:
        context.load_verify_locations(file)
    except ssl.SSLError:
        raise ConfigurationError(f"authorities {file} cannot be used: no certificate as PEM is there") from None


def _check_readable(file: Path) -> None:
    try:
        with file.open("rb"):
            pass
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror or error}") from None


def _check_dates(certificate: Path, key: Path | None, of_server: bool) -> float:
    """Refuses a certificate that is not valid now, by a handshake in memory: nobody else would take it.

    Gives when it expires, in seconds since the epoch; infinity where that cannot be told.

    Raises:
        ConfigurationError: it has expired, or is not valid yet.
    """
    showing = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if of_server else ssl.PROTOCOL_TLS_CLIENT)
    looking = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if of_server else ssl.PROTOCOL_TLS_SERVER)
    showing.check_hostname = looking.check_hostname = False
    showing.verify_mode = ssl.CERT_NONE
    showing.load_cert_chain(certificate, key)
    if not of_server:
        looking.load_cert_chain(certificate, key)  # a server needs one; who looks at it does not verify
    looking.load_verify_locations(certificate)
    looking.verify_mode = ssl.CERT_REQUIRED
    looking.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN  # its own certificate is authority enough
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [showing.wrap_bio(there, back, server_side=of_server), looking.wrap_bio(back, there, not of_server)]
    for _ in range(4):
        for side in sides:
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                if error.verify_code in (_NOT_YET_VALID, _EXPIRED):
                    raise ConfigurationError(f"certificate {certificate}: {error.verify_message}") from None
                return math.inf  # what else there may be, only its real peers can tell
            except ssl.SSLError:
                return math.inf
    expires_s = float(ssl.cert_time_to_seconds(str((sides[1].getpeercert() or {})["notAfter"])))
    if expires_s < time.time() + _SOON_S:
        _log.warning("certificate %s expires in %.1f days", certificate, (expires_s - time.time()) / 86400)
    return expires_s
