"""Holds the settings of a worker, as one dataclass and as a command line."""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from evenkeel.backends.worker.address import parse_address
from evenkeel.backends.worker.batching import MAX_BATCH
from evenkeel.delays.text import parse_delay
from evenkeel.errors import ConfigurationError
from evenkeel.logs import FORMATS, LogFormat
from evenkeel.settings import check_fields, file_name, setting
from evenkeel.trust.tls import ServerTls

__all__ = ["WorkerConfig", "add_arguments", "config_from", "to_arguments"]

_EXAMPLES = """\
Examples:
    evenkeel worker --model cifar10-base --listen tcp://127.0.0.1:7000
    evenkeel worker --model card.json --model python:my_module:factory --listen unix:/tmp/w.sock
"""


@dataclass(frozen=True)
class WorkerConfig:
    """Describes what a worker serves, where, and by how much it is delayed on purpose."""

    models: tuple[str, ...]  # specs as `load_model` takes them
    listen: str = setting(..., "Address to listen on: unix:/path or tcp://host:port.")
    threads: int = setting(1, "Number of threads that one pass may use.", low=1)
    max_queued: int = setting(1024, "Largest number of waiting tasks; more are refused.", low=1)
    delay: str = setting("", "Delay to inject, for experiments: two-mode:scale=0.3,seed=7.")
    delay_cost: float | None = setting(None, "Factor of every delay; by default what each model's card says.", low=1e-9)
    delay_epoch_s: float | None = setting(None, "When the experiment began, by time.monotonic(); by default now.")
    worker_number: int = setting(0, "Number that the delay gets, so that some workers can be the slow ones.", low=0)
    key_file: str = setting("", "File with the key that clients on TCP share; else the variable EVENKEEL_WORKER_KEY.")
    no_key: bool = setting(False, "Take tasks from anybody who can reach a TCP address, without a key.")
    tls_certificate: str = setting("", "The worker's certificate (PEM): links on TCP use TLS.")
    tls_key: str = setting("", "Its private key (PEM), where that is a file of its own.")
    tls_ca: str = setting("", "Authorities (PEM) whose certificates clients must show; needed with a certificate.")
    max_clients: int = setting(64, "Largest number of connections; more are refused.", low=1)
    max_rows: int = setting(1024, "Largest number of rows in one task.", low=1)
    max_batch: int = setting(
        MAX_BATCH,
        "Largest number of waiting rows in one pass, where the model gains by it (measured); 1: never together.",
        low=1,
    )
    drain_s: float = setting(10.0, "Seconds to finish the queue after SIGTERM.", low=0, high=1e6)
    log_format: LogFormat = setting("text", "Form of the log on stderr; one line is one record.")
    parent_pid: int = setting(0, "Process with which this one ends, however that ends; 0: none.", low=0)

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        if not self.models:
            raise ConfigurationError("a worker needs at least one model")
        parse_address(self.listen)
        if bool(self.tls_certificate) != bool(self.tls_ca) or (self.tls_key and not self.tls_certificate):
            raise ConfigurationError(
                "worker: TLS needs --tls-certificate, --tls-ca and, unless it is in the first file, --tls-key: both "
                "sides show a certificate and verify the other's"
            )
        parse_delay(self.delay or "none")
        check_fields(self, "worker")

    @property
    def tls(self) -> ServerTls | None:
        """Gives the files of TLS; None where links are not encrypted."""
        if not self.tls_certificate:
            return None
        return ServerTls(Path(self.tls_certificate), Path(self.tls_key) if self.tls_key else None, Path(self.tls_ca))


# Set by a gateway or an experiment for the workers that it starts.
_INTERNAL = ("delay_cost", "delay_epoch_s", "worker_number", "parent_pid")
_METAVARS = {"listen": "ADDRESS", "delay": "LAW"} | dict.fromkeys(
    ("key_file", "tls_certificate", "tls_key", "tls_ca"), "FILE"
)


def _options() -> dict[str, Field[Any]]:
    """Gives the field of each option; models, which may be given again, are left out."""
    return {f"--{file_name(one.name).replace('_', '-')}": one for one in fields(WorkerConfig) if one.name != "models"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Gives `parser` the options that `config_from` reads."""
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        dest="models",
        metavar="SPEC",
        help="Model to serve: a card.json, the name of a shipped model, or python:mod:factory. May be given again.",
    )
    for option, one in _options().items():
        given: dict[str, Any] = {"help": argparse.SUPPRESS if one.name in _INTERNAL else one.metadata["description"]}
        if one.type is bool:
            given["action"] = "store_true"
        else:
            given["type"] = next((kind for kind in (int, float) if kind in (one.type, *get_args(one.type))), str)
            given["metavar"] = _METAVARS.get(one.name)
            given["choices"] = FORMATS if one.type is LogFormat else None
        given |= {"required": True} if one.default is MISSING else {"default": one.default}
        parser.add_argument(option, dest=one.name, **given)
    for name in ("queued", "clients", "rows"):  # the older names of these options
        older: dict[str, Any] = {"type": int, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        parser.add_argument(f"--most-{name}", dest=f"max_{name}", **older)


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
    values = {option: getattr(config, one.name) for option, one in _options().items()}
    flags = [option for option, value in values.items() if value is True]
    options = [f"{option}={value}" for option, value in values.items() if not isinstance(value, bool | None)]
    return [*(f"--model={spec}" for spec in config.models), *options, *flags]
