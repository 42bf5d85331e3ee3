"""Decides from which score the light model may answer a request, by its promise and a certificate; audits live answers.

A promise that the certificate does not keep is refused, never answered as if it were kept. A random share of all
requests is audited: both models answer, whoever answered the user. A test by betting watches whether they differ as
rarely as was certified; when it gives alarm, that threshold goes to the safe value: the accurate model answers all.
"""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from evenkeel.errors import RequestError
from evenkeel.promises.betting import RateTest
from evenkeel.promises.certificate import Certificate, bucket_of
from evenkeel.promises.promise import NEVER, Promise
from evenkeel.promises.thresholds import Threshold

__all__ = ["Grant", "PromiseGate"]

_log = logging.getLogger(__name__)
_LEAST_RATE = 1e-4  # that an audit can watch: below, a single difference would be an alarm
_FALSE_ALARM = 0.01  # probability of an alarm although all is as certified, ever
_MAX_GRANTS = 4096  # different promises that are remembered

OnAudit = Callable[[float, bool], object]


@dataclass(slots=True)
class Grant:
    """Holds what requests of one promise get.

    Attributes:
        threshold: lowest score of the light model that answers; `NEVER` after an alarm.
        certificate: that answers name; empty where nothing is promised.
        offload_high: bound of the share that goes to the accurate model.
        test: of the audits.
    """

    threshold: float
    certificate: str
    offload_high: float
    kind: str
    test: RateTest


class PromiseGate:
    """Grants promises by one certificate.

    Args:
        certificate: that was found valid, and for these models.
        default: what requests get that ask for nothing.
        light_cost: of a pass of the light model, in passes of the accurate one.
        audit_share: of the requests, audited; 0: none.
        time_s: the gateway's clock, which never jumps.
        wall_s: seconds since 1970, which may jump.
        seed: of the choice of what is audited.
        record: given the light model's score and whether both models agreed, for every audit.
    """

    def __init__(
        self,
        certificate: Certificate,
        default: Promise | None = None,
        *,
        light_cost: float = 0.0,
        audit_share: float = 0.0,
        time_s: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
        seed: int | None = None,
        record: OnAudit | None = None,
    ) -> None:
        self.certificate = certificate
        self.audit_share = audit_share
        self._default = default
        self._light_cost = light_cost
        self._time_s = time_s
        self._wall_s = wall_s
        # By the clock that cannot be set back: a certificate must not live longer because the date was changed.
        self._until_s = time_s() + certificate.check_time(wall_s())
        self._random = random.Random(seed)  # what is audited is no secret
        self._record = record
        self._grants: dict[tuple[Promise, int], Grant] = {}
        self._tests: dict[Threshold, RateTest] = {}
        self._said_expired = False
        self.alarms = 0
        if default is not None:
            self._grant(default, 0)

    def grant(self, wanted: Promise | None, loss: float = 0.0, max_cost: float | None = None) -> Grant | None:
        """Gives what a request gets that wants this promise; None: nothing is promised, the accurate model answers.

        Args:
            wanted: None: the default.
            loss: share of the request's packets that were lost on the way here.
            max_cost: most that an answer may cost on average, in passes of the accurate model.

        Raises:
            RequestError: the promise cannot be shown, or not at that cost.
        """
        promise = self._default if wanted is None else wanted
        if promise is None:
            return None
        bucket = bucket_of(loss) if loss else 0
        grant = self._grants.get((promise, bucket)) or self._grant(promise, bucket)
        if self._time_s() >= self._until_s or self._wall_s() >= self.certificate.expires_s:
            self._expired(wanted)
            return None
        if max_cost is not None and self._light_cost + grant.offload_high > max_cost:
            raise RequestError(
                f"{promise}: may cost up to {self._light_cost + grant.offload_high:.3g} passes of the accurate model "
                f"for an answer, more than max_cost {max_cost:g}; allow more, or promise less"
            )
        if grant.test.alarm and wanted is not None and grant.kind == "min_accuracy":
            # The accurate model alone keeps every promise that compares with it, but nobody certified its accuracy.
            raise RequestError(
                f"{promise}: cannot be shown any more, since audits differ from what was certified; ask for exact "
                "answers, or have the operator certify anew"
            )
        return grant

    def chooses_audit(self) -> bool:
        """Draws whether a request is audited."""
        return self._random.random() < self.audit_share

    def audited(self, grant: Grant, score: float, agree: bool) -> None:
        """Takes an audit into account: the light model's score, and whether both models agreed."""
        if self._record is not None:
            self._record(score, agree)
        test = grant.test
        if test.alarm:
            return
        if test.add(score >= grant.threshold and not agree):
            self.alarms += 1
            _log.error(
                "certificate %s: audits show more differences than was certified: %d of %d, at most %.4f of all; the "
                "accurate model answers everything from now on; certify anew, with --audited",
                self.certificate.id, test.hits, test.samples, test.rate,
            )  # fmt: skip
            for other in self._grants.values():
                if other.test is test:
                    other.threshold, other.offload_high = NEVER, 1.0
                    if other.kind == "min_accuracy":
                        other.certificate = ""  # nobody certified the accurate model alone

    def _grant(self, promise: Promise, bucket: int) -> Grant:
        found = self.certificate.keeping(promise, bucket)
        if found is None or found.threshold is None:
            kept = "; ".join(str(one) for one in self.certificate.thresholds if one.certified and one.bucket == bucket)
            raise RequestError(
                f"{promise}: cannot be shown by certificate {self.certificate.id}"
                f"{' at this packet loss' if bucket else ''}; it keeps {kept or 'nothing'}"
            )
        test = self._tests.get(found)
        if test is None:
            test = self._tests[found] = RateTest(max(found.disagreement_high, _LEAST_RATE), _FALSE_ALARM)
        threshold = NEVER if test.alarm else found.threshold
        grant = Grant(threshold, self.certificate.id, found.offload_high, found.promise.kind, test)
        if len(self._grants) < _MAX_GRANTS:
            self._grants[promise, bucket] = grant
        return grant

    def _expired(self, wanted: Promise | None) -> None:
        if not self._said_expired:
            self._said_expired = True
            _log.error("certificate %s has expired; certify anew", self.certificate.id)
        if wanted is not None:
            raise RequestError(f"{wanted}: cannot be shown any more: certificate {self.certificate.id} has expired")
