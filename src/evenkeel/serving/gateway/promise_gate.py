"""Decides from which score the light model may answer a request, by its promise and a certificate; audits live answers.

A promise that the certificate does not keep is refused, never answered as if it were kept. A random share of all
requests is audited: both models answer, whoever answered the user. A test by betting watches whether they differ as
rarely as was certified; when it gives alarm, that threshold goes to the safe value: the accurate model answers all.

Answers that the accurate model could not give in time count too: each may be wrong. A threshold that was certified for
more than a request asks for leaves room for some of them. What goes beyond it is promised nothing.
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

_RESOLUTION = 0.001  # to which a promise is kept: a lone miss among thousands does not undo it
_PROMISED = ("edge", "exact", "hedge", "concealed")  # sources of answers that were given as the certificate says

OnAudit = Callable[[float, bool], object]


@dataclass(slots=True)
class Grant:
    """Holds what requests of one promise get.

    Attributes:
        threshold: lowest score of the light model that answers; `NEVER` after an alarm.
        certificate: that answers name; empty where nothing is promised.
        offload_high: bound of the share that goes to the accurate model.
        test: of the audits.
        allowed: share of all answers that the promise lets be wrong, or worse, or different.
        slack: how much less the threshold was certified for: the share of answers that may be degraded within it.
        promise: that was granted.
        bucket: of packet loss, for which the threshold is.
        answers: given so far, the misses among them.
        degraded: those that the light model gave in place of the accurate one, within the promise.
        missed: those beyond it, and requests that ended without an answer.
    """

    threshold: float
    certificate: str
    offload_high: float
    kind: str
    test: RateTest
    allowed: float
    slack: float
    promise: Promise
    bucket: int
    answers: int = 0
    degraded: int = 0
    missed: int = 0

    @property
    def kept(self) -> bool:
        """Tells whether the promise is kept by all answers so far but the `missed`, if every degraded one is wrong.

        Of n answers (allowed - slack) n may be wrong as certified, which with the degraded must not be more than what
        is allowed of the n - missed.
        """
        return self.degraded + self.allowed * self.missed <= (self.slack + _RESOLUTION) * self.answers

    def covers(self, source: str) -> str:
        """Counts an answer by its source; gives the certificate that it may name, empty where nothing is shown."""
        self.answers += 1
        if source in _PROMISED:
            return self.certificate if self.kept else ""
        room = self.slack * self.answers - self.allowed * self.missed
        if source == "degraded" and self.degraded + 1 <= room:
            self.degraded += 1
            return self.certificate
        self.missed += 1
        return ""

    def failed(self) -> None:
        """Counts a request that ended without an answer."""
        self.answers += 1
        self.missed += 1


class PromiseGate:
    """Grants promises by one certificate.

    Args:
        certificate: that was found valid, and for these models.
        default: what requests get that ask for nothing.
        misses: share of the answers for which room is to be left, where the certificate has a threshold for that.
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
        misses: float = 0.0,
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
        self._misses = misses
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

    @property
    def unshown(self) -> int:
        """Counts the promises that cannot be shown now, because too many answers were degraded or missing."""
        return sum(not grant.kept for grant in self._grants.values())

    @property
    def degraded(self) -> int:
        """Counts the degraded answers that were given within their promise."""
        return sum(grant.degraded for grant in self._grants.values())

    def at_loss(self, grant: Grant, loss: float) -> Grant | None:
        """Gives what a request gets of which that share was lost on its way to the accurate model; None: no promise.

        The light model has answered from `grant`'s threshold on. Where the one for this loss is higher, that was not
        what was certified, so nothing is promised.
        """
        if grant.test.alarm or self._time_s() >= self._until_s or self._wall_s() >= self.certificate.expires_s:
            return None
        bucket = max(grant.bucket, bucket_of(loss))
        try:
            found = self._grants.get((grant.promise, bucket)) or self._grant(grant.promise, bucket)
        except RequestError:
            return None
        return found if found.threshold <= grant.threshold else None

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
        stricter = promise.stricter(self._misses) if self._misses else None
        found = None if stricter is None else self.certificate.keeping(stricter, bucket)
        found = found or self.certificate.keeping(promise, bucket)
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
        slack = max(0.0, promise.allowed - found.promise.allowed)
        kind, allowed = found.promise.kind, promise.allowed
        grant = Grant(threshold, self.certificate.id, found.offload_high, kind, test, allowed, slack, promise, bucket)
        if len(self._grants) < _MAX_GRANTS:
            self._grants[promise, bucket] = grant
        return grant

    def _expired(self, wanted: Promise | None) -> None:
        if not self._said_expired:
            self._said_expired = True
            _log.error("certificate %s has expired; certify anew", self.certificate.id)
        if wanted is not None:
            raise RequestError(f"{wanted}: cannot be shown any more: certificate {self.certificate.id} has expired")
