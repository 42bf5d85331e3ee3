"""Holds the settings of a worker, as one dataclass and as a command line."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evenkeel.backends.worker.address import parse_address
from evenkeel.backends.worker.batching import MAX_BATCH
from evenkeel.delays.text import parse_delay
from evenkeel.errors import ConfigurationError
from evenkeel.logs import FORMATS, LogFormat
from evenkeel.trust.tls import ServerTls

__all__ = ["WorkerConfig", "add_arguments", "config_from", "to_arguments"]

_EXAMPLES = """\
Examples:
    evenkeel worker --model cifar10-base --listen tcp://127.0.0.1:7000
    evenkeel worker --model card.json --model python:my_module:factory --listen unix:/tmp/w.sock
"""


@dataclass(frozen=True)
class WorkerConfig:
    """Describes what a worker serves, where, and by how much it is delayed on purpose.

    Attributes:
        models: specs as `load_model` takes them.
        listen: `unix:/path`, `tcp://host:port`, or `fd:N`: one connection already open, whose end ends the worker.
        threads: that one pass may use.
        max_queued: more waiting tasks are refused; higher hides overload longer.
        delay: an injected law of task times as `evenkeel.delays.laws.parse_delay` takes it, or "".
        delay_cost: multiplies every draw; None: each model's own `relative_cost`, as its card says, does.
        delay_epoch_s: when the experiment began, by `time.monotonic()`; None: when the worker did.
        worker_number: given to the delay, so that some workers can be the slow ones.
        key_file: holds the key that clients on TCP must have; "": of the variable EVENKEEL_WORKER_KEY, or none.
        no_key: take tasks from anybody who can reach a TCP address beyond this machine.
        tls_certificate: of the worker, as PEM, for TLS on TCP; "": links are not encrypted.
        tls_key: its private key; "": in the certificate's file.
        tls_ca: the authorities whose certificates clients must show; needed with a certificate.
        max_clients: connections at once.
        max_rows: of one task.
        max_batch: rows of waiting tasks that one pass takes together, at most; fewer where the model gains nothing by
            more, as is measured at the start; 1: every task is a pass of its own.
        drain_s: how long, after a stop signal, the worker may go on with what is queued.
        log_format: of what is logged to stderr, `text` or `json`.
        parent_pid: dies with that process, however it ends; 0: stands alone.
    """

    models: tuple[str, ...]
    listen: str
    threads: int = 1
    max_queued: int = 1024
    delay: str = ""
    delay_cost: float | None = None
    delay_epoch_s: float | None = None
    worker_number: int = 0
    key_file: str = ""
    no_key: bool = False
    tls_certificate: str = ""
    tls_key: str = ""
    tls_ca: str = ""
    max_clients: int = 64
    max_rows: int = 1024
    max_batch: int = MAX_BATCH
    drain_s: float = 10.0
    log_format: LogFormat = "text"
    parent_pid: int = 0

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigurationError("a worker needs at least one model")
        parse_address(self.listen)
        if bool(self.tls_certificate) != bool(self.tls_ca) or (self.tls_key and not self.tls_certificate):
            raise ConfigurationError(
                "worker: TLS needs --tls-certificate, --tls-ca and, unless it is in the first file, --tls-key: both "
                "sides show a certificate and verify the other's"
            )
        parse_delay(self.delay or "none")
        for name, least in (
            ("threads", 1),
            ("max_queued", 1),
            ("max_clients", 1),
            ("max_rows", 1),
            ("max_batch", 1),
            ("worker_number", 0),
            ("parent_pid", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigurationError(f"worker: {name} must be at least {least}, found {getattr(self, name)}")
        if self.delay_cost is not None and not 0 < self.delay_cost < 1e6:
            raise ConfigurationError(f"worker: delay_cost must be above 0, found {self.delay_cost}")
        if not 0 <= self.drain_s < 1e6:
            raise ConfigurationError(f"worker: drain_s must not be negative, found {self.drain_s}")

    @property
    def tls(self) -> ServerTls | None:
        """Gives the files of TLS; None where links are not encrypted."""
        if not self.tls_certificate:
            return None
        return ServerTls(Path(self.tls_certificate), Path(self.tls_key) if self.tls_key else None, Path(self.tls_ca))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Gives `parser` the options that `config_from` reads."""
    add = parser.add_argument
    add(
        "--model",
        action="append",
        required=True,
        dest="models",
        metavar="SPEC",
        help="Model to serve: a card.json, the name of a shipped model, or python:mod:factory. May be given again.",
    )
    add("--listen", required=True, metavar="ADDRESS", help="Address to listen on: unix:/path or tcp://host:port.")
    add("--threads", type=int, default=1, help="Number of threads that one pass may use.")
    add("--max-queued", type=int, default=1024, help="Largest number of waiting tasks; more are refused.")
    add("--key-file", default="", metavar="FILE", help="File with the key that clients on TCP share.")
    add("--no-key", action="store_true", help="Take tasks from anybody who can reach a TCP address, without a key.")
    add("--tls-certificate", default="", metavar="FILE", help="The worker's certificate (PEM): links on TCP use TLS.")
    add("--tls-key", default="", metavar="FILE", help="Its private key (PEM), where that is a file of its own.")
    add("--tls-ca", default="", metavar="FILE", help="Authorities (PEM) whose certificates clients must show.")
    add("--max-clients", type=int, default=64, help="Largest number of connections; more are refused.")
    add("--max-rows", type=int, default=1024, help="Largest number of rows in one task.")
    add(
        "--max-batch",
        type=int,
        default=MAX_BATCH,
        help="Largest number of waiting rows in one pass, where the model gains by it (measured); 1: never together.",
    )
    add("--delay", default="", metavar="LAW", help="Delay to inject, for experiments: two-mode:scale=0.3,seed=7.")
    add("--drain", type=float, default=10.0, dest="drain_s", help="Seconds to finish the queue after SIGTERM.")
    add("--log-format", choices=FORMATS, default="text", help="Form of the log on stderr; one line is one record.")
    for name in ("queued", "clients", "rows"):  # the older names of these options
        add(f"--most-{name}", type=int, default=argparse.SUPPRESS, dest=f"max_{name}", help=argparse.SUPPRESS)
    # Set by a gateway or an experiment for the workers that it starts.
    add("--delay-cost", type=float, default=None, help=argparse.SUPPRESS)
    add("--delay-epoch", type=float, default=None, dest="delay_epoch_s", help=argparse.SUPPRESS)
    add("--worker-number", type=int, default=0, help=argparse.SUPPRESS)
    add("--parent-pid", type=int, default=0, help=argparse.SUPPRESS)


def config_from(arguments: Sequence[str], program: str) -> WorkerConfig:
    """Reads the configuration from a command line; exits with 2 and a usage line when it is not a valid one.

    Raises:
        ConfigurationError: a value is out of bounds.
    """
    parser = argparse.ArgumentParser(
        program,
        description="One worker: runs models on the tasks that it is sent, by a gateway that has its address.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    given = vars(parser.parse_args(arguments))
    return WorkerConfig(**{**given, "models": tuple(given["models"])})


def to_arguments(config: WorkerConfig) -> list[str]:
    """Writes the command line that says `config`; the inverse of `config_from`."""
    values = {
        "--listen": config.listen,
        "--threads": config.threads,
        "--max-queued": config.max_queued,
        "--max-clients": config.max_clients,
        "--max-rows": config.max_rows,
        "--max-batch": config.max_batch,
        "--key-file": config.key_file,
        "--tls-certificate": config.tls_certificate,
        "--tls-key": config.tls_key,
        "--tls-ca": config.tls_ca,
        "--delay": config.delay,
        "--worker-number": config.worker_number,
        "--drain": config.drain_s,
        "--log-format": config.log_format,
        "--parent-pid": config.parent_pid,
    }
    for name, value in (("--delay-cost", config.delay_cost), ("--delay-epoch", config.delay_epoch_s)):
        if value is not None:
            values[name] = value
    flags = ["--no-key"] if config.no_key else []
    options = [f"{name}={value}" for name, value in values.items()]
    return [*(f"--model={spec}" for spec in config.models), *options, *flags]
