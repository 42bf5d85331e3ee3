"""Defines the error tree.

    EvenkeelError
    ├── ConfigurationError     the command line, a configuration file or a model card is wrong (exit code 2)
    ├── MissingExtraError      an optional part is not installed; the message is the install line
    ├── CodeError              items or replies do not fit the code
    │   └── UndecodableError   too few replies to decode everything; names what is missing
    ├── UnreadableImageError   one image among many cannot be read; who reads them counts it and goes on
    ├── RequestError           a request is wrong; carries the HTTP status to answer with
    │   ├── UnauthenticatedError  who sent it is not known (401)
    │   ├── ForbiddenError     who sent it may not do this (403)
    │   ├── UnknownModelError  no such model or version (404)
    │   ├── SlowRequestError   the rest of a request did not come in time (408)
    │   ├── TooLargeError      over a size limit (413)
    │   └── UnsupportedError   understood but not offered (501)
    ├── OverloadedError        queues are full or nobody can serve (503, retry later)
    ├── DeadlineError          the total deadline passed without an answer (504)
    ├── ReducerError           gradients could not be added: a peer is gone or silent
    ├── LabError               the emulated cluster could not be made, measured or removed
    ├── SwitchError            a switch could not be built, started or removed
    ├── PacketError            a packet is no packet of a switch's; carries the reason under which it is counted
    ├── Http2Error             a peer broke the rules of HTTP/2; carries the code to close the connection with
    └── BackendError           a backend could not do a task
        ├── BackendLostError   the connection or the process went away
        ├── BackendBusyError   it has no room for the task now
        ├── TaskRefusedError   it says that the request is wrong
        ├── PoisonItemError    workers broke while they were at the item
        └── ProtocolError      what came from a worker or a server is not what was agreed

Every message says what happened and, where there is something to do, what to do.
"""

__all__ = [
    "BackendBusyError",
    "BackendError",
    "BackendLostError",
    "CodeError",
    "ConfigurationError",
    "DeadlineError",
    "EvenkeelError",
    "ForbiddenError",
    "Http2Error",
    "LabError",
    "MissingExtraError",
    "OverloadedError",
    "PacketError",
    "PoisonItemError",
    "ProtocolError",
    "ReducerError",
    "RequestError",
    "SlowRequestError",
    "SwitchError",
    "TaskRefusedError",
    "TooLargeError",
    "UnauthenticatedError",
    "UndecodableError",
    "UnknownModelError",
    "UnreadableImageError",
    "UnsupportedError",
]


class EvenkeelError(Exception):
    """Is the root of all errors that evenkeel raises on purpose."""

    http_status = 500


class ConfigurationError(EvenkeelError):
    """The command line, a configuration file or a model card is wrong."""


class MissingExtraError(EvenkeelError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} is not installed; run: pip install 'evenkeel[{extra}]'")


class CodeError(EvenkeelError):
    """Items or replies do not fit the code."""


class UndecodableError(CodeError):
    """Replies are too few to decode everything; `missing` names what cannot be decoded."""

    def __init__(self, message: str, missing: tuple[int, ...]) -> None:
        super().__init__(message)
        self.missing = missing


class UnreadableImageError(EvenkeelError):
    """One image among many cannot be read; the message is the reason, without the image's name."""


class RequestError(EvenkeelError):
    """A request is wrong; the message says what was wrong and what is expected."""

    http_status = 400


class UnauthenticatedError(RequestError):
    """Who sent a request is not known; `challenge` says how to prove it, as WWW-Authenticate does."""

    http_status = 401

    def __init__(self, message: str, challenge: str = "") -> None:
        super().__init__(message)
        self.challenge = challenge


class ForbiddenError(RequestError):
    """Who sent a request is known, and may not do this; `challenge` as for `UnauthenticatedError`."""

    http_status = 403

    def __init__(self, message: str, challenge: str = "") -> None:
        super().__init__(message)
        self.challenge = challenge


class UnknownModelError(RequestError):
    """There is no such model or version."""

    http_status = 404


class SlowRequestError(RequestError):
    """The rest of a request did not come in time."""

    http_status = 408


class TooLargeError(RequestError):
    """Something is over a size limit."""

    http_status = 413


class UnsupportedError(RequestError):
    """A request is understood, but what it wants is not offered."""

    http_status = 501


class OverloadedError(EvenkeelError):
    """Queues are full, or nobody can serve at the moment."""

    http_status = 503

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(EvenkeelError):
    """The total deadline passed without an answer."""

    http_status = 504


class ReducerError(EvenkeelError):
    """Gradients could not be added: a peer is gone or silent. Restart the job from its last checkpoint."""


class Http2Error(EvenkeelError):
    """A peer broke the rules of HTTP/2, so that the connection cannot go on; `code` is what it is closed with."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class BackendError(EvenkeelError):
    """A backend could not do a task."""

    http_status = 502


class BackendLostError(BackendError):
    """The connection to the backend, or its process, went away before it replied."""


class BackendBusyError(BackendError):
    """The backend has no room for the task now. `retry_after_s` says when to try again; None: it did not say."""

    http_status = 503

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TaskRefusedError(BackendError):
    """The backend says that the request itself is wrong: another one would say the same."""

    http_status = 400


class PoisonItemError(BackendError):
    """Workers died or froze while they were at the item, so that it is tried no more."""

    http_status = 500


class ProtocolError(BackendError):
    """A worker or a server sent something other than what was agreed."""


class LabError(EvenkeelError):
    """The emulated cluster could not be made, measured or removed."""


class SwitchError(EvenkeelError):
    """A switch that adds packets could not be built, started or removed."""


class PacketError(EvenkeelError):
    """Bytes are no packet that a switch takes; `reason` is the number under which switches count it."""

    def __init__(self, reason: int, message: str) -> None:
        super().__init__(message)
        self.reason = reason
