"""Makes the backends of a configuration: workers started here, on Ray or elsewhere, remote servers, lossy links."""

import time
from collections import Counter
from collections.abc import Sequence

from evenkeel.backends.backend import Backend
from evenkeel.backends.oip.backend import OipBackend
from evenkeel.backends.ray_actors.engine import RayEngine, RayWorkers
from evenkeel.backends.ray_actors.options import RayOptions
from evenkeel.backends.worker.address import parse_address
from evenkeel.backends.worker.config import WorkerConfig
from evenkeel.backends.worker.key import check_open, follow_key
from evenkeel.backends.worker.process import ProcessBackend
from evenkeel.backends.worker.remote import WorkerBackend
from evenkeel.backends.worker.session import ClientOptions
from evenkeel.errors import ConfigurationError
from evenkeel.models.cards import ModelCard, load_card
from evenkeel.models.digest import ModelDigests, card_digest
from evenkeel.promises.certificate import read_certificate
from evenkeel.serving.config import NodesConfig, ServeConfig
from evenkeel.serving.gateway.gateway import NodeKind
from evenkeel.serving.lossy import lossy_backend

__all__ = ["REACH_S", "NodeMaker", "known_digests"]

_SERVERS = ("http://", "https://", "grpc://", "grpcs://")
_UDP = "udp://"
REACH_S = 5.0  # for nodes elsewhere; one that takes longer joins when it is there


class NodeMaker:
    """Makes the backends of a configuration, each with a name and a number of its own.

    Args:
        config: says how.
        cards: what replicas hold, and then what only backups hold.
        digests: what the models must be.
    """

    def __init__(self, config: ServeConfig, cards: Sequence[ModelCard], digests: ModelDigests) -> None:
        self._config = config
        self._cards: dict[NodeKind, Sequence[ModelCard]] = {"replica": cards[:1], "backup": cards}
        self._digests = digests
        self._epoch_s = time.monotonic()
        self._made = 0
        self._of_kind: Counter[NodeKind] = Counter()
        self._engines: dict[str, RayEngine] = {}  # by the cluster's address
        self._on_ray: dict[NodeKind, RayWorkers] = {}

    def configured(self, kind: NodeKind, nodes: NodesConfig) -> list[Backend]:
        """Makes the backends of one kind that the configuration lists.

        Raises:
            ConfigurationError: an address cannot be used.
            MissingExtraError: workers are to be on Ray, which is not installed.
        """
        own = [self._process(kind) for _ in range(nodes.count)]
        placed = [] if nodes.ray is None else [self._placed(kind, nodes.ray) for _ in range(nodes.ray.count)]
        return [*own, *placed, *(self.at(kind, where) for where in (*nodes.addresses, *nodes.urls, *nodes.links))]

    def own(self, kind: NodeKind) -> Backend:
        """Makes one more worker that the gateway has started: by Ray, if it has some there, or in a process here."""
        nodes = self._config.replicas if kind == "replica" else self._config.backups
        if nodes.ray is not None and not nodes.ray.fleet:
            return self._placed(kind, nodes.ray)
        return self._process(kind)

    def _process(self, kind: NodeKind) -> Backend:
        name, number = self._next(kind)
        options = ClientOptions(start_timeout_s=self._config.load_limit_s)
        models = [card.name for card in self._cards[kind]]
        return ProcessBackend(name, self._worker(kind, number), models, options, self._digests)

    def _placed(self, kind: NodeKind, options: RayOptions) -> Backend:
        config, cards = self._config, self._cards[kind]
        name, number = self._next(kind)
        if kind not in self._on_ray:
            if options.address not in self._engines:
                self._engines[options.address] = RayEngine(options.address)
            self._on_ray[kind] = RayWorkers(
                self._engines[options.address],
                f"{cards[0].name}-{cards[0].version}/{kind}",
                options,
                self._worker(kind, number),
                [card.name for card in cards],
                config.load_limit_s,
                self._digests,
            )
        return self._on_ray[kind].make(name)

    def _worker(self, kind: NodeKind, number: int) -> WorkerConfig:
        config = self._config
        return WorkerConfig(
            models=_model_specs(config, self._cards[kind]),
            listen="tcp://127.0.0.1:0",  # not used: a child inherits its connection, an actor listens where it is
            threads=config.threads,
            max_batch=config.max_batch,
            delay=config.delay,
            delay_epoch_s=self._epoch_s,
            worker_number=number,
        )

    def at(self, kind: NodeKind, where: str) -> Backend:
        """Makes the backend of a node elsewhere: a worker's address, the URL of a remote server, or a link.

        Raises:
            ConfigurationError: it cannot be reached so, by this configuration.
        """
        config, cards = self._config, self._cards[kind]
        if where.startswith(_SERVERS):
            if len(cards) > 1:
                raise ConfigurationError(
                    "backups.urls: a remote server holds one model; reach backups as workers instead"
                )
            return _remote(config, self._next(kind)[0], where, cards[0], self._digests)
        if where.startswith(_UDP):
            known = self._digests.known(cards[0].name)
            return lossy_backend(config, self._next(kind)[0], where, cards[0], known)
        key, tls = follow_key(config.worker_key_file), config.worker_tls
        check_open(parse_address(where), key(), config.no_worker_key, tls is not None)
        options = ClientOptions(start_timeout_s=REACH_S, key=key, tls=tls)
        return WorkerBackend(self._next(kind)[0], where, [card.name for card in cards], options, self._digests)

    def _next(self, kind: NodeKind) -> tuple[str, int]:
        """Gives a name, and a number for delays in which workers differ."""
        name, number = f"{kind}-{self._of_kind[kind]}", self._made
        self._of_kind[kind] += 1
        self._made += 1
        return name, number


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
        credentials=config.remote_credentials.load(),
        tls=config.remote_tls if url.startswith(("https://", "grpcs://")) else None,
    )


def _model_specs(config: ServeConfig, cards: Sequence[ModelCard]) -> tuple[str, ...]:
    runs = {config.model: config.run}
    for code in config.codes:
        if code.model is not None:
            runs.setdefault(code.model, code.run)
    # Replicas hold the first model only.
    known = zip(cards, runs.items(), strict=False)
    return tuple(f"{card.name}={run}" if run else str(path) for card, (path, run) in known)
