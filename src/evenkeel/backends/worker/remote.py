"""Stands in front of one worker: keeps a connection to it, and connects again whenever that is lost."""

import asyncio
import logging
import time
from collections.abc import Sequence

from evenkeel.arrays import Array
from evenkeel.backends.backend import Backend, OnReply, Reply
from evenkeel.backends.worker.address import parse_address
from evenkeel.backends.worker.links import SocketLink, WorkerLink
from evenkeel.backends.worker.session import ClientOptions, RemoteModel, WorkerHello, WorkerSession, call
from evenkeel.errors import BackendError, BackendLostError, ConfigurationError, EvenkeelError
from evenkeel.models.digest import ModelDigests

__all__ = ["WorkerBackend"]

_log = logging.getLogger(__name__)


class WorkerBackend(Backend):
    """Reaches a worker by `unix:/path`, `tcp://host:port` or another link.

    Args:
        name: unique in a gateway.
        link: the worker's address, or how to reach it.
        models: names that the worker must hold; a worker without one of them is refused.
        options: time limits and shared memory.
        digests: what the models must be; a worker that holds another one by that name is refused.

    `inputs` given to `submit` must stay unchanged until the reply.
    """

    def __init__(
        self,
        name: str,
        link: str | WorkerLink,
        models: Sequence[str] = (),
        options: ClientOptions | None = None,
        digests: ModelDigests | None = None,
    ) -> None:
        self.name = name
        self.address = str(parse_address(link)) if isinstance(link, str) else ""
        self._wanted = tuple(models)
        self._digests = digests
        self._options = options or ClientOptions()
        self._link = SocketLink(parse_address(link), self._options.tls) if isinstance(link, str) else link
        self._session: WorkerSession | None = None
        self._hello: WorkerHello | None = None
        self._ready = False
        self._next_ticket = 1
        self._keeper: asyncio.Task[None] | None = None
        self._settled: asyncio.Future[None] | None = None
        self._last_error: EvenkeelError | None = None

    @property
    def ready(self) -> bool:
        """True if connected and greeted, and the worker did not say goodbye."""
        return self._ready

    @property
    def hello(self) -> WorkerHello | None:
        """Gives what the worker last said of itself."""
        return self._hello

    @property
    def batch(self) -> int:
        """Gives the largest number of rows that a model of the worker takes in one pass, as it last said."""
        models = () if self._hello is None else self._hello.models.values()
        return max((model.batch for model in models), default=1)

    @property
    def why_not(self) -> str:
        """Says why the worker is not ready, if it was ever lost or could not be reached."""
        return "" if self._ready or self._last_error is None else str(self._last_error)

    @property
    def last_error(self) -> EvenkeelError | None:
        """Says why the worker was last lost or could not be reached; None if it never was."""
        return self._last_error

    async def start(self) -> None:
        """Connects; returns when ready.

        Raises:
            BackendLostError: the worker could not be reached in time; goes on trying in the background until `close`.
            ConfigurationError: the worker lacks a model, or could not be started with its arguments.
            BackendError: what answers is no worker of this version, or the worker died while it loaded.
        """
        if self._ready:
            return
        if self._keeper is None or self._keeper.done():
            self._settled = asyncio.get_running_loop().create_future()
            self._keeper = asyncio.ensure_future(self._keep_connected(self._settled))
        assert self._settled is not None
        try:
            async with asyncio.timeout(self._options.start_timeout_s):
                await asyncio.shield(self._settled)
        except TimeoutError:
            # Nobody waits for the error any more: from now on every loss is mended by trying again.
            if not self._settled.done():
                self._settled.set_result(None)
            raise BackendLostError(
                f"backend {self.name!r} was not ready in {self._options.start_timeout_s:g} s: "
                f"{self._last_error or 'no answer from ' + self._link.where}"
            ) from self._last_error

    def submit(self, model: str, inputs: Array, on_reply: OnReply, key: int = 0) -> int:
        """Sends one task; see `Backend.submit`."""
        ticket = self._next_ticket
        self._next_ticket += 1
        session = self._session
        try:
            if session is None or not self._ready:
                reason = f": {self._last_error}" if self._last_error else ""
                raise BackendLostError(f"backend {self.name!r} has no worker at the moment{reason}")
            session.submit(ticket, self._model(model), inputs, on_reply, key)
        except BackendError as error:
            asyncio.get_running_loop().call_soon(on_reply, Reply(error=error, began=False))
        return ticket

    def cancel(self, ticket: int) -> None:
        """Gives the task up; see `Backend.cancel`."""
        if self._session is not None:
            self._session.cancel(ticket)

    def suspect(self) -> None:
        """Gives the worker up soon if it does not answer pings; see `ClientOptions`."""
        if self._session is not None:
            self._session.suspect()

    async def close(self) -> None:
        """Lets go of the worker; open tickets get a BackendLostError."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        if self._settled is not None and not self._settled.done():
            self._settled.set_exception(BackendLostError(f"backend {self.name!r} was closed before it was ready"))
            self._settled.exception()  # mark as seen; who waits for it sees it all the same
        await self._link.close()

    def _model(self, name: str) -> RemoteModel:
        models = {} if self._hello is None else self._hello.models
        if name not in models:
            raise BackendError(f"backend {self.name!r} holds no model {name!r}; it holds {', '.join(models) or 'none'}")
        return models[name]

    async def _keep_connected(self, settled: asyncio.Future[None]) -> None:
        failures = 0
        while True:
            greeted_s: float | None = None
            session: WorkerSession | None = None
            try:
                try:
                    key = await self._link.find(self._options.present_key)
                    session = WorkerSession(self._link.where, self._options, self._update, key)
                    connection = session.connection
                    await self._link.open(lambda: connection)  # noqa: B023 - used before the next round
                    self._hello = self._checked(await session.greet())
                    greeted_s = time.monotonic()
                    self._session = session
                    self._update()
                    if self._ready and not settled.done():
                        settled.set_result(None)
                    error = await asyncio.shield(session.ended)
                except EvenkeelError as refusal:
                    error = refusal
                except Exception as failure:  # whatever it is, the worker must not stay lost for it
                    error = BackendLostError(f"{self._link.where}: {type(failure).__name__}: {failure}")
            finally:
                if session is not None:
                    await session.close()
                self._session = None
                self._update()
            error = await self._link.ended(error, greeted_s is not None)
            self._last_error = error
            if not settled.done() and not isinstance(error, BackendLostError):
                settled.set_exception(error)
                settled.exception()  # mark as seen: who waits for it sees it all the same
                if self._link.ours:
                    return  # started again with the same arguments it would fail in the same way
            lived_s = 0.0 if greeted_s is None else time.monotonic() - greeted_s
            failures = 0 if lived_s > self._options.max_pause_s else failures + 1
            pause_s = self._pause_s(failures)
            known = {"backend": self.name}
            _log.warning("backend %s: %s; trying again in %.1f s", self.name, error, pause_s, extra=known)
            await asyncio.sleep(pause_s)

    def _pause_s(self, failures: int) -> float:
        # The first loss after a good while is mended at once; only what fails again and again has to wait.
        if failures == 0:
            return 0.0
        return min(self._options.first_pause_s * 2.0 ** min(failures - 1, 30), self._options.max_pause_s)

    def _checked(self, hello: WorkerHello) -> WorkerHello:
        missing = [name for name in self._wanted if name not in hello.models]
        if missing:
            raise ConfigurationError(
                f"backend {self.name!r}: the worker at {self._link.where} holds no model {', '.join(missing)}; "
                f"it holds {', '.join(hello.models) or 'none'}"
            )
        if self._digests is not None:
            for name in self._wanted:
                self._digests.check(name, hello.models[name].digest, f"backend {self.name!r} at {self._link.where}")
        return hello

    def _update(self) -> None:
        ready = self._session is not None and self._session.ready
        if ready != self._ready:
            self._ready = ready
            call(self.on_change)
