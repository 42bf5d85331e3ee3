"""Makes authorities and certificates for tests of TLS."""

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Pair:
    """The files of one certificate."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates; `file` is its own."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named(name)
        usage = x509.BasicConstraints(ca=True, path_length=None)
        own = _builder(self._name, self._name, self._key.public_key(), -DAY, 30 * DAY).add_extension(usage, True)
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(own.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def sign(
        self,
        name: str,
        *,
        hosts: tuple[str, ...] = ("localhost", "127.0.0.1"),
        begins: datetime.timedelta = -DAY,
        ends: datetime.timedelta = 30 * DAY,
        alone: bool = False,
        file: str = "",
        of: str = "both",
    ) -> Pair:
        """Gives a certificate of `name` for `hosts`; signed by itself alone if `alone`."""
        key = ec.generate_private_key(ec.SECP256R1())
        signer, issuer = (key, _named(name)) if alone else (self._key, self._name)
        kinds = {"server": [ExtendedKeyUsageOID.SERVER_AUTH], "client": [ExtendedKeyUsageOID.CLIENT_AUTH]}
        usages = kinds.get(of, kinds["server"] + kinds["client"])
        builder = _builder(_named(name), issuer, key.public_key(), begins, ends)
        builder = builder.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), False)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), False)
        pair = Pair(self.folder / f"{file or name}.pem", self.folder / f"{file or name}.key")
        pair.certificate.write_bytes(builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        write_key(pair.key, key)
        return pair


def write_key(file: Path, key: ec.EllipticCurvePrivateKey, password: bytes | None = None) -> None:
    locked = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    file.touch(0o600)
    file.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, locked))


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _builder(subject, issuer, public_key, begins, ends) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public_key)
    return builder.serial_number(x509.random_serial_number()).not_valid_before(now + begins).not_valid_after(now + ends)
