"""Runs the worker process: serves models over framed connections until it is stopped.

Run as `python -m evenkeel.backends.worker.main --listen unix:/tmp/w.sock --model cifar10-base`; `evenkeel worker` calls
the same `run_worker`. A Unix socket is open to its own user only. On TCP, clients prove that they hold the worker's key
(`key.py`), or both show certificates; beyond this machine a worker without either does not listen, unless `--no-key`
says so.
"""

import asyncio
import gc
import logging
import sys
from collections.abc import Callable, Sequence

import uvloop

from evenkeel.backends.worker.address import parse_address
from evenkeel.backends.worker.batching import with_batching
from evenkeel.backends.worker.config import WorkerConfig, config_from
from evenkeel.backends.worker.key import check_open, follow_key
from evenkeel.backends.worker.model import Model, load_model
from evenkeel.backends.worker.server import serve
from evenkeel.delays.text import parse_delay
from evenkeel.errors import ConfigurationError, EvenkeelError
from evenkeel.logs import log_to_stderr
from evenkeel.processes import ENDING_SIGNALS, asked_to_end, end_by_signal, end_with_parent, heeded

__all__ = ["load_models", "main", "run_worker", "serve_models"]


def run_worker(config: WorkerConfig) -> int:
    """Loads the models and serves them until SIGTERM or SIGINT; returns the exit code.

    Codes: 0 stopped by a signal, 2 the configuration or a model is wrong (one line on stderr says what).
    """
    end_by_signal()
    if config.listen.startswith("fd:"):  # its gateway logs what it says, with a time of its own
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    else:
        log_to_stderr(config.log_format)
    try:
        if config.parent_pid:
            end_with_parent(config.parent_pid)
        key = follow_key(config.key_file)
        check_open(parse_address(config.listen), key(), config.no_key, config.tls is not None)
        models = load_models(config)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve_until_signal(models, config, key))
    except EvenkeelError as error:
        print(f"evenkeel worker: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ConfigurationError) else 1
    return 0


def load_models(config: WorkerConfig) -> list[Model]:
    """Loads the models that a worker serves, and measures how many rows each should take in one pass.

    Raises:
        ConfigurationError: a model cannot be loaded, or two have the same name.
    """
    # With an injected law every task takes the time that is drawn for it alone.
    max_batch = 1 if config.delay else config.max_batch
    models = [with_batching(load_model(spec, config.threads), max_batch) for spec in config.models]
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"two models of one worker have the same name: {', '.join(names)}")
    return models


async def serve_models(
    models: Sequence[Model],
    config: WorkerConfig,
    key: Callable[[], bytes],
    stop: asyncio.Event,
    on_listening: Callable[[str], object],
) -> None:
    """Serves models that are loaded as `config` says, until `stop` is set; see `server.serve`.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """
    # What is alive now lives as long as the process: keep the collector from walking it, at the worst moment, for ever.
    gc.collect()
    gc.freeze()
    await serve(
        models,
        config.listen,
        delay=parse_delay(config.delay) if config.delay else None,
        delay_cost=config.delay_cost,
        delay_epoch_s=config.delay_epoch_s,
        worker_number=config.worker_number,
        max_queued=config.max_queued,
        drain_s=config.drain_s,
        key=key,
        tls=config.tls,
        max_clients=config.max_clients,
        max_rows=config.max_rows,
        stop=stop,
        on_listening=on_listening,
    )


async def _serve_until_signal(models: Sequence[Model], config: WorkerConfig, key: Callable[[], bytes]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in ENDING_SIGNALS:
        if heeded(number):
            loop.add_signal_handler(number, stop.set)
    if asked_to_end():
        stop.set()
    await serve_models(models, config, key, stop, _announce)


def _announce(address: str) -> None:
    if not address.startswith("fd:"):
        print(f"evenkeel worker: listening on {address}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the worker's own command line."""
    try:
        config = config_from(sys.argv[1:] if arguments is None else arguments, "evenkeel worker")
    except ConfigurationError as error:
        print(f"evenkeel worker: {error}", file=sys.stderr)
        return 2
    return run_worker(config)


if __name__ == "__main__":
    sys.exit(main())
