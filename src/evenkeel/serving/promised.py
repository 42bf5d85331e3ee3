"""Applies a certificate to what is served: a cascade's gate, or the confidence from which fills are used."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from evenkeel.coding.answers.backup_code import BackupCode
from evenkeel.coding.answers.cascade import Cascade
from evenkeel.errors import ConfigurationError, RequestError
from evenkeel.models.cards import ModelCard
from evenkeel.promises.certificate import Certificate, load_certificate
from evenkeel.serving.config import ServeConfig
from evenkeel.serving.gateway.promise_gate import PromiseGate

__all__ = ["AuditFile", "apply_certificate"]

_log = logging.getLogger(__name__)


class AuditFile:
    """Appends audits to a file, a line each; a disk that is full stops it, not the server."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("a", buffering=1, encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(
                f"promises.audit_file: {path} cannot be written: {error.strerror or error}"
            ) from error
        self._path = path

    def __call__(self, score: float, agree: bool) -> None:
        """Writes one audit."""
        if self._file.closed:
            return
        try:
            self._file.write(json.dumps({"score": score, "agree": agree}) + "\n")
        except OSError as error:
            _log.error("audits are no longer kept: %s cannot be written: %s", self._path, error.strerror or error)
            self.close()

    def close(self) -> None:
        """Closes the file."""
        try:
            self._file.close()
        except OSError as error:
            _log.error("%s could not be closed: %s", self._path, error.strerror or error)


def apply_certificate(
    config: ServeConfig,
    cards: Mapping[str, ModelCard],
    codes: Sequence[BackupCode],
    digests: Mapping[str, str],
    audits: AuditFile | None,
) -> PromiseGate | None:
    """Sets the codes as the certificate says, and makes the gate of a cascade; None: no light model answers first.

    Raises:
        ConfigurationError: the certificate does not hold, or is for other models or another policy.
    """
    if config.certificate is None:
        return None
    if not config.policy.light_first and config.policy.fill_after is None:
        raise ConfigurationError(
            f"policy.certificate: the policy {config.policy.name} uses no light model and no fills"
        )
    certificate = load_certificate(config.certificate)
    certificate.check_models(digests)
    use = "cascade" if config.policy.light_first else "fills"
    if certificate.use != use:
        raise ConfigurationError(
            f"certificate {certificate.id}: is for {certificate.use}, and the policy {config.policy.name} needs one "
            f"for {use}"
        )
    if use == "fills":
        _gate_fills(config, certificate, codes)
        return None
    for code in codes:
        if isinstance(code, Cascade):
            if code.model != certificate.light:
                raise ConfigurationError(f"certificate {certificate.id}: is for {certificate.light}, not {code.model}")
            code.kind = certificate.score
            code.scores = replace(code.scores, temperature=certificate.temperature)
    try:
        return PromiseGate(
            certificate,
            config.promises.default,
            misses=config.promises.misses,
            light_cost=cards[certificate.light].relative_cost,
            audit_share=config.promises.audit,
            record=audits,
        )
    except RequestError as error:
        raise ConfigurationError(f"promises.default: {error}") from error


def _gate_fills(config: ServeConfig, certificate: Certificate, codes: Sequence[BackupCode]) -> None:
    certified = [one for one in certificate.thresholds if one.certified]
    if config.promises.default is not None:
        certified = [one for one in certified if one.promise.covers(config.promises.default)]
    if len({one.promise for one in certified}) != 1 and config.promises.default is None:
        raise ConfigurationError(
            f"certificate {certificate.id}: keeps {len(certified)} promises; say in promises.default which one is meant"
        )
    found = min(certified, key=lambda one: one.offload, default=None)
    if found is None or found.threshold is None:
        raise ConfigurationError(f"certificate {certificate.id}: does not keep {config.promises.default}")
    for code in codes:
        if code.model == certificate.light:
            code.min_confidence = found.threshold
        elif code.model != certificate.accurate:
            raise ConfigurationError(
                f"certificate {certificate.id}: is for fills of {certificate.light}, and says nothing of {code.model}; "
                "leave that code out"
            )
