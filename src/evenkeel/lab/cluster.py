"""Makes a lab on entering and removes it on leaving, whatever happens in between."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType

from evenkeel.errors import ConfigurationError, LabError
from evenkeel.lab import shell
from evenkeel.lab.environment import MASTER_PORT, deal_cpus, environment
from evenkeel.lab.loss import lose_packets
from evenkeel.lab.owner import new_label, owner_of
from evenkeel.lab.processes import HostExit, Launch, run_all
from evenkeel.lab.rate_check import RateCheck, check_rate
from evenkeel.lab.topology import Command, Topology
from evenkeel.processes import end_with_parent

__all__ = ["Lab", "check_program", "clean"]

_ASKED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class Lab:
    """Emulates a cluster, as a context manager; several commands may be run in it, one after another.

    Args:
        topology: how many hosts, and what their links are like.

    Raises:
        ConfigurationError: on entering: no root, no iproute2, or a kernel without what it needs.
        LabError: on entering, a command failed; on leaving, something could not be removed.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self._label = new_label()

    def __enter__(self) -> "Lab":
        shell.require()
        try:
            for command in self.topology.setup(self._label):
                shell.run(command)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        problems = self._remove()
        if problems and error is None:
            raise LabError(f"the lab could not be removed: {'; '.join(problems)}. Try: evenkeel lab clean --all")

    def check_rate(self) -> RateCheck | None:
        """Measures for 1.5 s what the link between the first two hosts carries; None for a single host."""
        if self.topology.hosts < 2:
            return None
        return check_rate(self.topology, (self._inside(0), self._inside(1)))

    def lose(self, share: float, seed: int = 0) -> None:
        """Has every link lose a share of the packets on their way from a host, the same in each run with this seed.

        Raises:
            ConfigurationError: this kernel does not let it.
        """
        lose_packets(self.topology, self._label, share, seed)

    @contextmanager
    def beside(self, command: Sequence[str]) -> Iterator[None]:
        """Runs a command in the middle of the switch, at `topology.switch_address`, and ends it on leaving."""
        parent = os.getpid()
        inside = ("ip", "netns", "exec", self.topology.namespaces(self._label)[0])
        process = subprocess.Popen(
            (*inside, *command), stdin=subprocess.DEVNULL, preexec_fn=lambda: end_with_parent(parent)
        )
        try:
            yield
        finally:
            process.terminate()
            process.wait()

    def run(
        self,
        command: Sequence[str],
        write: Callable[[str, str, bool], None],
        *,
        cpus: Sequence[int] | None = None,
        keep_going: bool = False,
        inherited: Mapping[str, str] | None = None,
        port: int = MASTER_PORT,
        grace_s: float = 10.0,
    ) -> list[HostExit]:
        """Runs `command` on every host at the same time, with torchrun's variables, and says how each ended.

        Args:
            command: program and arguments.
            write: is given the host's name, a line without its end, and whether it came from the error output.
            cpus: dealt out to the hosts, each on its own; None lets all hosts use all.
            keep_going: False: when one host fails, the others are ended too.
            inherited: variables for all hosts; this process's own by default.
            port: where rank 0 waits for the others.
            grace_s: from the request to stop until the kill.

        Raises:
            ConfigurationError: there is no such program.
        """
        check_program(command)
        hosts = self.topology.hosts
        dealt: Sequence[Sequence[int]] = deal_cpus(cpus, hosts) if cpus else [()] * hosts
        threads = max(1, len(os.sched_getaffinity(0)) // hosts)
        launches = [
            Launch(
                host=name,
                command=(*self._inside(rank), *command),
                environment=environment(
                    self.topology,
                    rank,
                    os.environ if inherited is None else inherited,
                    threads=len(dealt[rank]) or threads,
                    port=port,
                ),
                cpus=dealt[rank],
            )
            for rank, name in enumerate(self.topology.names)
        ]
        return run_all(launches, write, keep_going=keep_going, grace_s=grace_s)

    def _inside(self, rank: int) -> Command:
        return ("ip", "netns", "exec", self.topology.namespace(self._label, rank))

    def _remove(self) -> list[str]:
        # A second Ctrl-C must not leave half of it behind; it is heard right after.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _ASKED)
        try:
            ours = set(self.topology.namespaces(self._label))
            return shell.remove([name for name in shell.namespaces() if name in ours])
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check_program(command: Sequence[str]) -> None:
    """Refuses a command line whose program is not there.

    Raises:
        ConfigurationError: it is not.
    """
    if not command or shutil.which(command[0]) is None:
        raise ConfigurationError(f"command: there is no program {command[0] if command else ''!r} to run")


def clean(*, everything: bool = False) -> list[str]:
    """Removes the labs whose owner is gone, with every process in them, and gives the names of what is removed.

    Args:
        everything: also the labs of processes that still run.

    Raises:
        ConfigurationError: no root, or no iproute2.
        LabError: something could not be removed.
    """
    shell.require()
    found = []
    for name in shell.namespaces():
        owner = owner_of(name)
        if owner is not None and (everything or not owner.lives()):
            found.append(name)
    problems = shell.remove(found)
    if problems:
        raise LabError(f"not everything could be removed: {'; '.join(problems)}")
    return found
