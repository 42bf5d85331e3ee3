"""Keeps what was certified in a file: thresholds, for which models, until when. Refuses one that does not hold.

The file is JSON, sealed with the SHA-256 of all it says, so that a number changed by hand or by accident is found. That
is no signature: who may write the file may also seal it anew.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import yaml

from evenkeel.errors import ConfigurationError
from evenkeel.promises.promise import Promise
from evenkeel.promises.thresholds import Threshold
from evenkeel.text_values import is_text, read_json

__all__ = [
    "BUCKETS",
    "FORMAT",
    "Certificate",
    "ScoreName",
    "bucket_of",
    "check_promises",
    "load_certificate",
    "read_certificate",
]

FORMAT = 1
# Upper ends of the buckets of packet loss: none, up to 2 %, 5 %, 10 %, 20 %, and all above.
BUCKETS = (0.0, 0.02, 0.05, 0.1, 0.2, 1.0)
ScoreName = Literal["max_probability", "margin"]
Use = Literal["cascade", "fills"]
_ID_LENGTH = 16  # hexadecimal digits, as answers carry it
_MAX_BYTES = 1 << 20
_MAX_AHEAD_S = 300.0  # that the clock of the machine that certified may be ahead
_DAY_S = 86400.0


@dataclass(frozen=True)
class Certificate:
    """Holds the thresholds that were certified for a pair of models.

    Attributes:
        use: `cascade`: the light model answers users; `fills`: a spare's answer stands in for a late replica's.
        light: name of the light model.
        accurate: name of the accurate model.
        digests: of both, by name; `models/digest.py` makes them.
        score: that decides who answers.
        temperature: by which the light model's logits are divided first.
        thresholds: found, or found impossible.
        created_s: seconds since 1970.
        expires_s: the same.
        data: what it was certified on, in words.
    """

    use: Use
    light: str
    accurate: str
    digests: Mapping[str, str]
    score: ScoreName
    temperature: float
    thresholds: tuple[Threshold, ...]
    created_s: float
    expires_s: float
    data: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Gives what answers name it by: the beginning of its seal."""
        return _seal(self._content())[:_ID_LENGTH]

    def save(self, path: Path) -> None:
        """Writes it, sealed.

        Raises:
            ConfigurationError: the file cannot be written.
        """
        content = self._content()
        document = {"evenkeel_certificate": FORMAT, **content, "seal": _seal(content)}
        try:
            path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"certificate {path} cannot be written: {error.strerror or error}") from error

    def check_models(self, digests: Mapping[str, str]) -> None:
        """Refuses models other than those it was made for.

        Args:
            digests: of the models in use, by name; one that is missing here is not checked.

        Raises:
            ConfigurationError: names the model.
        """
        for role, name in (("light", self.light), ("accurate", self.accurate)):
            found = digests.get(name)
            if found is None:
                raise ConfigurationError(
                    f"certificate {self.id}: is for the {role} model {name!r}, which is not served here; served are "
                    f"{', '.join(sorted(digests)) or 'none'}; certify this configuration anew"
                )
            if found != self.digests[name]:
                raise ConfigurationError(
                    f"certificate {self.id}: was made for another {name!r}: digest {self.digests[name][:17]}, found "
                    f"{found[:17]}; certify this configuration anew"
                )

    def check_time(self, now_s: float | None = None) -> float:
        """Gives the seconds that it is still valid.

        Raises:
            ConfigurationError: it has expired, or was made later than the clock says it is.
        """
        now_s = time.time() if now_s is None else now_s
        if now_s < self.created_s - _MAX_AHEAD_S:
            raise ConfigurationError(
                f"certificate {self.id}: was made {self.created_s - now_s:.0f} s after the time that this machine's "
                "clock shows; set the clock"
            )
        if now_s >= self.expires_s:
            raise ConfigurationError(
                f"certificate {self.id}: expired {(now_s - self.expires_s) / _DAY_S:.1f} days ago; certify anew"
            )
        return self.expires_s - now_s

    def keeping(self, wanted: Promise, bucket: int = 0) -> Threshold | None:
        """Gives the threshold with the least offload that keeps the promise at that packet loss; None: none does."""
        fitting = [
            one for one in self.thresholds if one.certified and one.bucket == bucket and one.promise.covers(wanted)
        ]
        return min(fitting, key=lambda one: (one.offload, one.threshold), default=None)

    def plain_yaml(self) -> str:
        """Writes the thresholds as YAML that needs nothing of ours to be read."""
        rows = [
            {
                one.promise.kind: one.promise.level,
                "guarantee": one.promise.guarantee,
                "packet_loss_up_to": BUCKETS[one.bucket],
                "confidence_threshold": one.threshold,
                "escalated_share": round(one.offload, 6),
            }
            for one in self.thresholds
            if one.threshold is not None
        ]
        head = {
            "certificate": self.id,
            "edge_model": self.light,
            "cloud_model": self.accurate,
            "confidence": self.score,
            "temperature": self.temperature,
            "expires": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.expires_s)),
        }
        return yaml.safe_dump({**head, "thresholds": rows}, sort_keys=False)

    def _content(self) -> dict[str, Any]:
        content = asdict(self)
        content["thresholds"] = [asdict(one) for one in self.thresholds]
        content["digests"], content["sizes"] = dict(self.digests), dict(self.sizes)
        return content


def bucket_of(loss: float) -> int:
    """Gives the number of the bucket that a share of lost packets, 0..1, lies in."""
    return next(number for number, end in enumerate(BUCKETS) if loss <= end)


def load_certificate(path: Path, *, now_s: float | None = None) -> Certificate:
    """Reads the certificate at `path`, and sees that it is whole and valid.

    Args:
        path: of the file.
        now_s: seconds since 1970; the clock's by default.

    Raises:
        ConfigurationError: not readable, no certificate, changed after it was made, expired or from the future.
    """
    certificate = read_certificate(path)
    try:
        certificate.check_time(now_s)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None
    return certificate


def read_certificate(path: Path) -> Certificate:
    """Reads the certificate at `path`, whole but perhaps expired.

    Raises:
        ConfigurationError: not readable, no certificate, or changed after it was made.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"certificate {path} cannot be read: {error.strerror or error}") from error
    if len(text) > _MAX_BYTES:
        raise ConfigurationError(f"certificate {path} is larger than {_MAX_BYTES:,} bytes: it is none")
    try:
        raw = read_json(text)
    except ValueError as error:
        raise ConfigurationError(f"certificate {path} is not JSON: {error}") from error
    if not isinstance(raw, dict) or raw.pop("evenkeel_certificate", None) != FORMAT:
        raise ConfigurationError(f"certificate {path}: field 'evenkeel_certificate' must be {FORMAT}")
    seal = raw.pop("seal", None)
    if seal != _seal(raw):
        raise ConfigurationError(f"certificate {path}: was changed after it was made; certify anew")
    try:
        return _read(raw)
    except (TypeError, KeyError, ValueError, ConfigurationError) as error:
        raise ConfigurationError(f"certificate {path}: {error}") from error


def _read(raw: dict[str, Any]) -> Certificate:
    thresholds = tuple(Threshold(**{**one, "promise": Promise(**one["promise"])}) for one in raw.pop("thresholds"))
    certificate = Certificate(thresholds=thresholds, **raw)
    for one in thresholds:
        if not isinstance(one.bucket, int) or not 0 <= one.bucket < len(BUCKETS):
            raise ValueError(f"bucket {one.bucket!r} is none of {len(BUCKETS)}")
        if one.threshold is not None and not (_is_number(one.threshold) and 0 <= one.threshold <= 2):
            raise ValueError(f"threshold {one.threshold!r} is no number from 0 to 2")
    names = (certificate.light, certificate.accurate)
    if not all(isinstance(name, str) and is_text(name) and name in certificate.digests for name in names):
        raise ValueError("it must name both models, and hold the digest of each")
    if certificate.use not in ("cascade", "fills") or certificate.score not in ("max_probability", "margin"):
        raise ValueError(f"use {certificate.use!r} or score {certificate.score!r} is not known")
    numbers = (certificate.temperature, certificate.created_s, certificate.expires_s)
    if not all(map(_is_number, numbers)) or certificate.temperature <= 0:
        raise ValueError("temperature and times must be numbers, the temperature above 0")
    return certificate


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_promises(promises: Sequence[Promise]) -> None:
    """Refuses an empty list, and one promise given twice with different guarantees.

    Raises:
        ConfigurationError: says which.
    """
    if not promises:
        raise ConfigurationError("no promise: give min_accuracy, max_accuracy_drop or min_agreement at least once")
    seen: dict[tuple[str, float], float] = {}
    for promise in promises:
        key = (promise.kind, promise.level)
        if key in seen:
            raise ConfigurationError(f"{promise.kind} {promise.level:g} is given twice")
        seen[key] = promise.guarantee
