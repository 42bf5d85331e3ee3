"""Lets a server's jobs into the switch in this machine's kernel, as their workers join."""

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import CFUNCTYPE, POINTER, Structure, c_char, c_int, c_uint32, c_uint64
from typing import Any

from evenkeel.errors import ConfigurationError, EvenkeelError, SwitchError
from evenkeel.switch.aggregator import Job
from evenkeel.switch.deployment import Deployment, find_deployment, names
from evenkeel.switch.packet import MAX_JOBS, MAX_WORKERS, LaneType

__all__ = ["JobAsked", "Registrar", "largest_of", "switch_of"]

_WHY_BYTES = 200


class JobAsked(Structure):
    """Mirrors `struct ek_asked`: what a server asks to let in; or, where nobody has joined, that is over."""

    _fields_ = (
        ("token", c_uint64),
        *((name, c_uint32) for name in ("job", "epoch", "workers", "joined", "words", "lanes", "via_server")),
        ("addresses", c_uint32 * MAX_WORKERS),
        ("ports", c_uint32 * MAX_WORKERS),
        ("why", c_char * _WHY_BYTES),
    )


class Registrar:
    """Lets jobs into a switch, and gives them numbers that no other server's job has there.

    Args:
        deployment: the switch.
        server: address of the server, behind one of its ports.
        say: is given a line about what has changed.

    Attributes:
        callback: for C: takes a JobAsked, gives the job's number, or -1.

    Raises:
        ConfigurationError: the server is not behind a port of the switch, or has another port than it was started for.
    """

    def __init__(
        self, deployment: Deployment, server: tuple[str, int], say: Callable[[str], None] = lambda line: None
    ) -> None:
        if server[0] not in {port.address for port in deployment.ports}:
            there = ", ".join(port.address for port in deployment.ports)
            raise ConfigurationError(
                f"switch {deployment.name} has no port with {server[0]} behind it; bind one of {there}"
            )
        if server[1] != deployment.udp:
            raise ConfigurationError(
                f"switch {deployment.name} knows its packets by the server's port {deployment.udp}, not {server[1]}: "
                f"bind {server[0]}:{deployment.udp}"
            )
        self._deployment, self._server, self._say = deployment, server, say
        self._gone = False
        self._tokens: dict[int, int] = {}  # of our jobs, by number
        self.callback: Any = CFUNCTYPE(c_int, POINTER(JobAsked))(self._asked)

    @property
    def words(self) -> int:
        """Counts the words that fragments must have."""
        return self._deployment.rule.words

    @property
    def bytes_only(self) -> bool:
        """Says whether lanes of 4 bits, whose sums are longer, cannot be added."""
        return self._deployment.mode == "native"

    def changed(self) -> bool:
        """Looks whether the switch went away, or is another one since; then jobs must be let in again."""
        found = find_deployment(self._deployment.name)
        if found is None or not found.maps:
            if not self._gone:
                self._say(f"switch {self._deployment.name} is gone: this server adds alone until it is back")
            self._gone = True
            return False
        fits = (found.rule.words, found.mode, found.udp) == (self.words, self._deployment.mode, self._deployment.udp)
        another = found.maps != self._deployment.maps
        self._gone = another and not fits
        if another and fits:
            self._deployment = found
            self._say(f"switch {found.name} is back: jobs are let in again")
        return another and fits

    def _asked(self, pointer: Any) -> int:
        asked = pointer.contents
        try:
            return self._forget(asked.job) if not asked.joined else self._enroll(asked)
        except EvenkeelError as error:
            why = str(error)
        except BaseException as error:  # it must not get lost in C
            why = f"the server failed: {error!r}"
        asked.why = why.encode("ascii", "replace")[: _WHY_BYTES - 1]
        return -1

    def _enroll(self, asked: JobAsked) -> int:
        if self._gone:
            return self._numbered(asked.job, asked.token, {})
        with self._alone():
            maps = self._deployment.open()
            try:
                tokens = {number: job.token for number, job in maps.jobs.items()}
                known = maps.jobs.get(asked.job)
                same = known is not None and (known.token, known.lanes, known.words, known.workers) == (
                    *(asked.token, asked.lanes, asked.words, asked.workers),
                )
            finally:
                maps.close()
            if asked.joined != (1 << asked.workers) - 1:
                # After a restart of the server the switch knows the job already, and adds on.
                return int(asked.job) if same else -1
            number = self._numbered(asked.job, asked.token, tokens)
            lanes = LaneType(asked.lanes)
            job = Job(
                asked.token,
                asked.workers,
                lanes,
                asked.words,
                largest_of(lanes, asked.workers),
                epoch=asked.epoch,
                via_server=bool(asked.via_server),
            )
            workers = [
                (socket.inet_ntoa(address.to_bytes(4, "big")), port)
                for address, port in zip(asked.addresses[: asked.workers], asked.ports, strict=False)
            ]
            self._deployment.register(number, job, workers, self._server)
        self._tokens[number] = asked.token
        self._say(f"job {number} of {asked.workers} workers is in switch {self._deployment.name}")
        return number

    def _forget(self, number: int) -> int:
        if self._tokens.pop(number, None) is not None and not self._gone:
            with self._alone():
                self._deployment.remove(number)
        return -1

    def _numbered(self, wanted: int, token: int, tokens: dict[int, int]) -> int:
        """Gives the number that a job wants, if that is its own or free; or the first that is free."""
        if wanted < MAX_JOBS and tokens.get(wanted, token) == token:
            return wanted
        for number in range(MAX_JOBS):
            if number not in tokens and number not in self._tokens:
                return number
        raise SwitchError(f"switch {self._deployment.name} has {MAX_JOBS} jobs already: take it down and up again")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps the switch's other servers from giving the same number."""
        file = os.open(self._deployment.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)


def switch_of(address: str) -> Deployment | None:
    """Finds the switch in this machine's kernel that has a port with this address behind it."""
    for name in names():
        found = find_deployment(name)
        if found is not None and found.maps and address in {port.address for port in found.ports}:
            return found
    return None


def largest_of(lanes: LaneType, workers: int) -> int:
    """Gives the largest number that a lane may hold so that no sum carries into the next."""
    return lanes.most or ((1 << lanes.sum_bits) - 1) // workers
