"""Makes the backends of a configuration: workers started here or elsewhere, remote servers, links that lose packets."""

from collections.abc import Sequence

from evenkeel.backends.backend import Backend
from evenkeel.backends.oip.backend import OipBackend
from evenkeel.backends.worker.address import parse_address
from evenkeel.backends.worker.config import WorkerConfig
from evenkeel.backends.worker.key import check_open, read_key
from evenkeel.backends.worker.process import ProcessBackend
from evenkeel.backends.worker.remote import WorkerBackend
from evenkeel.backends.worker.session import ClientOptions
from evenkeel.errors import ConfigurationError
from evenkeel.models.cards import ModelCard, load_card
from evenkeel.models.digest import ModelDigests, card_digest
from evenkeel.promises.certificate import read_certificate
from evenkeel.serving.config import NodesConfig, ServeConfig
from evenkeel.serving.lossy import lossy_backend

__all__ = ["REACH_S", "known_digests", "make_nodes"]

REACH_S = 5.0  # for nodes elsewhere; one that takes longer joins when it is there


def make_nodes(
    config: ServeConfig,
    kind: str,
    nodes: NodesConfig,
    cards: Sequence[ModelCard],
    first: int,
    epoch_s: float,
    digests: ModelDigests,
) -> list[Backend]:
    """Makes the backends of one kind, numbered from `first` (for delays in which workers differ)."""
    wanted = [card.name for card in cards]
    backends: list[Backend] = []
    for number in range(nodes.count):
        worker = WorkerConfig(
            models=_model_specs(config, cards),
            listen="tcp://127.0.0.1:0",  # not used: the child inherits its connection
            threads=config.threads,
            max_batch=config.max_batch,
            delay=config.delay,
            delay_epoch_s=epoch_s,
            worker_number=first + number,
        )
        own = ClientOptions(start_timeout_s=config.load_limit_s)
        backends.append(ProcessBackend(f"{kind}-{number}", worker, wanted, own, digests))
    key = read_key(config.worker_key_file) if nodes.addresses else b""
    for address in nodes.addresses:
        check_open(parse_address(address), key, config.no_worker_key)
        options = ClientOptions(start_timeout_s=REACH_S, key=key)
        backends.append(WorkerBackend(f"{kind}-{len(backends)}", address, wanted, options, digests))
    for url in nodes.urls:
        if len(cards) > 1:
            raise ConfigurationError("backups.urls: a remote server holds one model; reach backups as workers instead")
        backends.append(_remote(config, f"{kind}-{len(backends)}", url, cards[0], digests))
    for link in nodes.links:
        name = f"{kind}-{len(backends)}"
        backends.append(lossy_backend(config, name, link, cards[0], digests.known(cards[0].name)))
    return backends


def known_digests(config: ServeConfig) -> dict[str, str]:
    """Hashes every model whose file is here; a gateway of workers elsewhere may have the cards alone.

    For those a certificate says which they must be; the workers and servers that say otherwise are refused.
    """
    said = {} if config.certificate is None else read_certificate(config.certificate).digests
    known: dict[str, str] = {}
    for path in (config.model, *(code.model for code in config.codes if code.model is not None)):
        card = load_card(path)
        if (path.parent / card.file).is_file():
            known[card.name] = card_digest(card, path.parent)
        elif card.name in said:
            known[card.name] = str(said[card.name])
    return known


def _remote(config: ServeConfig, name: str, url: str, card: ModelCard, digests: ModelDigests) -> Backend:
    model = config.remote_model or config.name or card.name
    version = config.remote_version
    return OipBackend(
        name,
        url,
        model,
        card,
        version=version,
        versions=digests,
        connections=config.remote_connections,
        timeout_s=config.pass_limit_s,
        start_timeout_s=REACH_S,
    )


def _model_specs(config: ServeConfig, cards: Sequence[ModelCard]) -> tuple[str, ...]:
    runs = {config.model: config.run}
    for code in config.codes:
        if code.model is not None:
            runs.setdefault(code.model, code.run)
    # Replicas hold the first model only.
    known = zip(cards, runs.items(), strict=False)
    return tuple(f"{card.name}={run}" if run else str(path) for card, (path, run) in known)
