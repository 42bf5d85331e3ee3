"""Holds the configuration of `evenkeel serve`, and reads it from a YAML file, flags, or both, before anything starts.

To add a field, write one line in a dataclass here, or one line for a dataclass of your own module; `evenkeel.settings`
says how. Then docs/how-to/serve.md shows it with its default, which a test checks. A field that nobody knows is refused
rather than ignored, since a misspelt deadline that is silently the default is found out too late.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import yaml
import yaml.nodes

from evenkeel.backends.lossy.udp import udp_address
from evenkeel.backends.ray_actors.options import RayOptions
from evenkeel.backends.worker.address import parse_address
from evenkeel.backends.worker.batching import MAX_BATCH
from evenkeel.coding.answers.by_name import CODES, CodeSettings, CollageSettings, ReplicateSettings, settings_of
from evenkeel.delays.text import parse_delay
from evenkeel.errors import ConfigurationError
from evenkeel.models import shipped
from evenkeel.models.cards import ModelCard, load_card
from evenkeel.promises.promise import KINDS, Promise
from evenkeel.schema import ProblemsError, Schema
from evenkeel.serving.autoscale import AutoscaleSettings
from evenkeel.serving.discovery.by_name import FORMS, SCHEMES, discovery_of
from evenkeel.serving.front.access import KeysConfig
from evenkeel.serving.gateway.health import HealthSettings
from evenkeel.serving.gateway.policy import POLICIES, Policy, preset
from evenkeel.serving.tracing import TracingConfig
from evenkeel.settings import (
    Bytes,
    FieldError,
    FilePath,
    FileText,
    Form,
    Seconds,
    checked,
    file_name,
    read_name,
    setting,
    shown,
)
from evenkeel.trust.credentials import CredentialsConfig
from evenkeel.trust.tls import ClientTls, ServerTls

__all__ = [
    "CARD",
    "NODES",
    "SCHEMA",
    "CodeConfig",
    "LossyConfig",
    "NodesConfig",
    "PromisesConfig",
    "ServeConfig",
    "find_lines",
    "load_raw",
    "read_config",
    "server_differences",
]

_BASE = shipped.card_path("cifar10-base")
_COLLAGES = (shipped.card_path("cifar10-collage-2x2"), shipped.card_path("cifar10-collage-3x3"))
_SERVERS = ("http://", "https://", "grpc://", "grpcs://")
_UDP = "udp://"
_OLDER_KINDS = {"concat-parity": "parity:form=concat"}
_OLDER_FIELDS = {"items": "k", "spares": "spares"}  # field -> its setting in `kind`
_SIZE: dict[str, Any] = {"low": 1, "high": 1 << 32}
_TEXTS: Mapping[str, Any] = {"type": "array", "items": {"type": "string"}}


def _nodes(raw: Any, plain: Any, folder: Path) -> Any:
    """Reads nodes, also from a number or a list of addresses of all kinds."""
    if isinstance(raw, int) and not isinstance(raw, bool):
        raw = {"count": raw}
    elif isinstance(raw, Sequence) and not isinstance(raw, str):
        kinds: dict[str, list[str]] = {"addresses": [], "urls": [], "links": [], "discover": []}
        for place, entry in enumerate(raw):
            if isinstance(entry, str) and entry.startswith(SCHEMES):
                kinds["discover"].append(entry)
                continue
            if not isinstance(entry, str) or not entry.startswith(("unix:", "tcp://", _UDP, *_SERVERS)):
                servers = "http(s)://host:port, grpc(s)://host:port"
                wanted = f"unix:/path, tcp://host:port, {servers}, udp://host:port, {FORMS}"
                raise FieldError((place,), f"expected {wanted}, found {shown(entry)}")
            kind = "urls" if entry.startswith(_SERVERS) else "links" if entry.startswith(_UDP) else "addresses"
            _check_node(kind, entry, (place,))
            kinds[kind].append(entry)
        raw = kinds
    elif not isinstance(raw, Mapping):
        raise ConfigurationError(f"expected a whole number, a list of addresses, or fields, found {shown(raw)}")
    found = raw.get("discover")
    if isinstance(found, list):  # paths are relative to the file
        raw = {**raw, "discover": [_in_folder(entry, folder) for entry in found]}
    return plain(raw)


def _in_folder(entry: Any, folder: Path) -> Any:
    is_file = isinstance(entry, str) and entry.startswith("file:") and entry != "file:"
    return f"file:{folder / entry.removeprefix('file:')}" if is_file else entry


def _check_node(kind: str, text: str, place: tuple[str | int, ...]) -> None:
    if kind == "urls":
        if not text.startswith(_SERVERS):
            raise FieldError(place, f"expected http(s)://host:port or grpc(s)://host:port, found {shown(text)}")
        return
    try:
        address = udp_address(text) if kind == "links" else parse_address(text)
    except ConfigurationError as error:
        raise FieldError(place, str(error)) from None
    if address.kind == "fd":
        raise FieldError(place, f"expected unix:/path or tcp://host:port, found {shown(text)}")


@dataclass(frozen=True)
class NodesConfig:
    """Lists workers of one kind: some started here, some reached by address, some remote inference servers."""

    count: int = setting(0, "Workers that the gateway starts and supervises.", low=0, high=4096)
    addresses: tuple[str, ...] = setting((), "Workers elsewhere (`evenkeel worker`): unix:/path or tcp://host:port.")
    urls: tuple[str, ...] = setting((), "Servers of the Open Inference Protocol: http://host:port or grpc://host:port.")
    links: tuple[str, ...] = setting((), "Gateways over links that lose packets: udp://host:port; see `lossy`.")
    ray: RayOptions | None = setting(None, "Workers that a Ray cluster places and watches.")
    autoscale: AutoscaleSettings | None = setting(None, "How the number of own workers follows the load; of replicas.")
    discover: tuple[str, ...] = setting((), f"Where to find out, again and again, who is there: {FORMS}.")

    def __post_init__(self) -> None:
        """Refuses addresses that are none, and a number that nothing here can change."""
        for kind in ("addresses", "urls", "links"):
            for place, text in enumerate(getattr(self, kind)):
                _check_node(kind, text, (kind, place))
        for place, text in enumerate(self.discover):
            try:
                discovery_of(text)
            except ConfigurationError as error:
                raise FieldError(("discover", place), str(error)) from None
        scale = self.autoscale
        if scale is None:
            return
        if self.ray is not None and self.ray.fleet:
            raise FieldError("autoscale", "a fleet that gateways share has a fixed number of workers")
        if not self.count and self.ray is None:
            raise FieldError("autoscale", "is for workers that the gateway has started; give count or ray")
        if not scale.min <= self.total <= scale.max:
            raise FieldError("autoscale", f"the fleet begins with {self.total}, which is not from min to max")

    @property
    def total(self) -> int:
        """Counts all nodes, and a discovery as one."""
        on_ray = 0 if self.ray is None else self.ray.count
        elsewhere = (self.addresses, self.urls, self.links, self.discover)
        return self.count + sum(map(len, elsewhere)) + on_ray


@dataclass(frozen=True)
class LossyConfig:
    """Says how images cross links that lose packets, and where they are listened for."""

    listen: Annotated[str, checked(udp_address)] = setting(
        "", "Address where images are taken, and answered: udp://host:port."
    )
    key_file: FileText = setting("", "File with the key that the other ends share; worker_key_file by default.")
    no_key: bool = setting(False, "Let other machines be at either end without a key.")
    quality: int = setting(75, "Quality of JPEG; this and what follows is for images that are sent.", low=1, high=100)
    subsampling: int = setting(0, "2 sends colours at half resolution, 0 at full resolution.", low=0, high=2)
    blocks: int = setting(1, "Blocks in one restart interval.", low=1, high=65535)
    payload: int = setting(1200, "Largest number of bytes in a packet.", low=100, high=1200)
    wait_s: Seconds = setting(0.05, "Time after which the other end makes do with what has come.", low=0)
    deadline_s: Seconds = setting(0.5, "Time after which an image counts as lost, also for those who listen.", low=0)
    parity: float = setting(0.0, "Parity packets for each data packet.", low=0, high=1)
    retransmit: bool = setting(True, "Send what is missing again while there is time.")

    def __post_init__(self) -> None:
        """Refuses times and samplings that cannot be."""
        if not 0 < self.wait_s < self.deadline_s:
            wanted = f"must be above 0 and below lossy.deadline, {self.deadline_s:g}s"
            raise FieldError("wait", f"{wanted}, found {self.wait_s:g}s")
        if self.subsampling == 1:
            raise FieldError("subsampling", "must be 0 or 2, found 1")


def _settings(raw: Any, plain: Any, folder: Path) -> CodeSettings:
    return settings_of(read_name(raw))


def _card(raw: Any, plain: Any, folder: Path) -> Path:
    """Reads the path of a card, or the name of a shipped one."""
    name = read_name(raw)
    if name in shipped.NAMES:
        return shipped.card_path(name)
    if not name.endswith(".json"):
        raise ConfigurationError(
            f"expected a model card (.json) or one of {', '.join(shipped.NAMES)}, found {shown(name)}"
        )
    return folder / name


def _callable(raw: Any, plain: Any, folder: Path) -> str:
    """Reads a model spec; a Python file in it is relative to the configuration's folder, as cards are."""
    text = str(plain(raw))
    where, colon, factory = text.removeprefix("python:").rpartition(":")
    if text.startswith("python:") and colon and where.endswith(".py"):
        return f"python:{folder / where}:{factory}"
    return text


CARD = Form(_card, schema={"anyOf": [{"enum": list(shipped.NAMES)}, {"type": "string", "pattern": r"\.json$"}]})
_CALLABLE = Form(_callable)
NODES = Form(_nodes, ({"type": "integer", "minimum": 0, "maximum": 4096}, _TEXTS))


@dataclass(frozen=True)
class CodeConfig:
    """Holds one code that backups can run, and the model that it needs."""

    settings: Annotated[CodeSettings, Form(_settings, schema={"type": "string"})] = setting(
        ..., f"Name of the code, and its settings, as `cheap:k=3`: {', '.join(CODES)}.", name="kind"
    )
    model: Annotated[Path | None, CARD] = setting(None, "Card of the model that the code needs, where it needs one.")
    run: Annotated[str, _CALLABLE] = setting(
        "", "Python callable (python:module:factory) that replaces the card's file in the backups started here."
    )

    def __post_init__(self) -> None:
        """Refuses a model where none is needed, and none where one is."""
        if self.model is None and self.settings.card_kind is not None:
            raise FieldError("model", f"a {self.settings.name} code needs a model card")
        if self.model is None and self.run:
            raise FieldError("run", "replaces the file of a card, and there is no model")
        if self.model is not None and self.settings.card_kind is None:
            raise FieldError("model", f"{self.settings.name} runs the replicas' own model; leave the field out")


def _code(raw: Any, plain: Any, folder: Path) -> Any:
    """Reads a code, also from its name or its model's, and with the older names of settings."""
    if isinstance(raw, str):
        named = raw.partition(":")[0].strip() in CODES
        if not named and raw not in shipped.NAMES and not raw.endswith(".json"):
            wanted = f"a code ({', '.join(CODES)}), a model card (.json) or one of {', '.join(shipped.NAMES)}"
            raise ConfigurationError(f"expected {wanted}, found {shown(raw)}")
        raw = {"kind": raw} if named else {"kind": "collage", "model": raw}
    if not isinstance(raw, Mapping) or not isinstance(raw.get("kind"), str):
        return plain(raw)
    given = {name: value for name, value in raw.items() if name not in _OLDER_FIELDS}
    kind = given["kind"] = str(_OLDER_KINDS.get(raw["kind"], raw["kind"]))
    for older in raw.keys() & _OLDER_FIELDS.keys():
        setting_name, value = _OLDER_FIELDS[older], raw[older]
        if not isinstance(value, int) or isinstance(value, bool):
            raise FieldError(older, f"expected a whole number, found {shown(value)}")
        if not hasattr(settings_of(kind), setting_name):
            raise FieldError(older, f"{settings_of(kind).name} has no such setting")
        if ":" in raw["kind"]:
            raise FieldError(older, f"kind has settings; add {setting_name}={value} there")
        given["kind"] += f"{',' if ':' in given['kind'] else ':'}{setting_name}={value}"
    return plain(given)


_WHOLE = {"type": "integer", "minimum": 1, "deprecated": True}
_CODE = Form(_code, ({"type": "string", "minLength": 1},), extra=dict.fromkeys(_OLDER_FIELDS, _WHOLE))


def _policy(raw: Any, plain: Any, folder: Path) -> Policy:
    """Reads a policy: the preset that is named, with some fields changed."""
    given = {"name": raw} if isinstance(raw, str) else raw
    if not isinstance(given, Mapping):
        plain(given)
    base = preset(str(given.get("name", "collage+hedge")))
    values = {file_name(one.name): getattr(base, one.name) for one in fields(Policy) if one.name != "light_first"}
    changed = {name: value for name, value in values.items() if name != "degrade"}
    policy: Policy = plain({**changed, **given})
    return replace(policy, light_first=base.light_first)


_NAMED: tuple[dict[str, Any], ...] = (
    {"enum": list(POLICIES)},
    {"type": "string", "pattern": r"\(\s*certificate\s*="},
)
_POLICY_NAME = {
    "description": f"What the rest begins with: {', '.join(POLICIES)}; also NAME(certificate=FILE).",
    "anyOf": list(_NAMED),
    "default": "collage+hedge",
}
_POLICY = Form(_policy, _NAMED, extra={"name": _POLICY_NAME}, hidden=("light_first",))


def _promise(raw: Any, plain: Any, folder: Path) -> Promise:
    if not isinstance(raw, Mapping):
        raise ConfigurationError(f"expected fields, found {shown(raw)}")
    known = (*KINDS, "guarantee")
    for name in raw:
        if name not in known:
            raise FieldError(str(name), f"unknown field; known are {', '.join(known)}")
    kinds = [kind for kind in KINDS if kind in raw]
    if len(kinds) != 1:
        raise ConfigurationError(f"give one of {', '.join(KINDS)}")
    try:
        return Promise(kinds[0], raw[kinds[0]], raw.get("guarantee", 0.95))
    except ConfigurationError as error:
        field, _, text = str(error).partition(": ")
        raise FieldError(field, text) from None


_SHARE = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
_PROMISE = Form(
    _promise,
    schema={
        "type": "object",
        "properties": {
            **dict.fromkeys(KINDS, _SHARE),
            "guarantee": {"type": "number", "minimum": 0.5, "maximum": 0.9999, "default": 0.95},
        },
        "oneOf": [{"required": [kind]} for kind in KINDS],
        "additionalProperties": False,
    },
)


@dataclass(frozen=True)
class PromisesConfig:
    """Says what a certificate is used for."""

    default: Annotated[Promise | None, _PROMISE] = setting(
        None, "Promise that is kept where a request asks for none, as {min_accuracy: 0.8, guarantee: 0.95}."
    )
    misses: float = setting(0.0, "Share of the answers that may be degraded within a promise.", low=0, high=1)
    audit: float = setting(0.0, "Share of the requests that both models of a cascade answer.", low=0, high=1)
    audit_file: FilePath | None = setting(None, "File to which each audit is appended, as a line of JSON.")


def _hosts(raw: Any, plain: Any, folder: Path) -> tuple[str, ...]:
    """Reads addresses to listen on: one, or a list; at most one of them a Unix socket."""
    hosts = (raw,) if isinstance(raw, str) else tuple(raw) if isinstance(raw, Sequence) else ()
    if not hosts or not all(isinstance(host, str) and host.strip("[]") for host in hosts):
        raise ConfigurationError(f"expected an address, unix:/path, or a list of them, found {shown(raw)}")
    paths = [host for host in hosts if host.startswith("unix:")]
    if len(paths) > 1 or "unix:" in paths:
        raise ConfigurationError(f"at most one unix:/path, found {shown(raw)}")
    return hosts


_HOST: dict[str, Any] = {"type": "string", "minLength": 1}
_HOSTS = {"anyOf": [_HOST, {"type": "array", "items": _HOST, "minItems": 1}]}


def _check_name(name: str) -> None:
    if re.search(r"[/\s]", name):
        raise ConfigurationError(f"is part of the URL, so it must hold neither / nor white space, found {shown(name)}")


def _check_delay(text: str) -> None:
    parse_delay(text or "none")


def _models(raw: Any, plain: Any, folder: Path) -> Any:
    """Reads the configurations of several models; each holds what stands outside of the list, too (see `_prepare`)."""
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
        raise ConfigurationError(f"expected a list of models, found {shown(raw)}")
    found = []
    for place, entry in enumerate(raw):
        if not isinstance(entry, Mapping):
            raise FieldError((place,), f"expected fields, found {shown(entry)}")
        try:
            found.append(SCHEMA.read(entry, folder))
        except ProblemsError as error:
            first = error.problems[0]
            raise FieldError((place, *first.place), first.text) from None
    return tuple(found)


_MODELS: Mapping[str, Any] = {"type": "array", "items": {"type": "object"}, "minItems": 1}


@dataclass(frozen=True)
class ServeConfig:
    """Holds everything that `evenkeel serve` needs to know."""

    models: Annotated[tuple[Any, ...], Form(_models, schema=_MODELS)] = setting(
        (), "Several models instead of one; each has fields of its own, and those outside of the list besides."
    )

    model: Annotated[Path, CARD] = setting(
        _BASE, "Card of the served model (.json), or the name of a shipped one.", shown_default=_BASE.stem
    )
    name: Annotated[str, checked(_check_name)] = setting("", "Name by which clients call it; the card's by default.")
    codes: tuple[Annotated[CodeConfig, _CODE], ...] = setting(
        (
            CodeConfig(ReplicateSettings()),
            CodeConfig(CollageSettings(), _COLLAGES[0]),
            CodeConfig(CollageSettings(), _COLLAGES[1]),
        ),
        "What backups can run; the smallest that holds what waits is used. With another model: replicate alone.",
        shown_default=["replicate", _COLLAGES[0].stem, _COLLAGES[1].stem],
    )
    replicas: Annotated[NodesConfig, NODES] = setting(
        NodesConfig(count=2), "Workers with the served model: how many to start here, or a list.", shown_default=2
    )
    backups: Annotated[NodesConfig, NODES] = setting(
        NodesConfig(count=1), "Workers that run codes: how many to start here, or a list.", shown_default=1
    )
    remote_model: str = setting("", "What remote servers call the model; `name` by default.")
    remote_version: str = setting(
        "", "Which version of it; by default the first that one of them names, of all of them."
    )
    policy: Annotated[Policy, _POLICY] = setting(
        preset("collage+hedge"), "What is done about late replicas.", shown_default="collage+hedge"
    )
    certificate: FilePath | None = setting(
        None, "Certificate of the promises, which `evenkeel certify` writes.", name="policy.certificate"
    )
    promises: PromisesConfig = setting(PromisesConfig(), "What the certificate is used for; see edge.md.")
    health: HealthSettings = setting(HealthSettings(), "When a replica is ejected, and how it comes back.")
    lossy: LossyConfig = setting(LossyConfig(), "Links that lose packets; see edge.md.")
    host: Annotated[tuple[str, ...], Form(_hosts, schema=_HOSTS)] = setting(
        ("127.0.0.1",),
        "Addresses to listen on: one, or a list; `::` takes IPv4 as well, unix:/path is a Unix socket.",
        shown_default="127.0.0.1",
    )
    port: int = setting(8000, "Port to listen on; 0 takes a free one.", low=0, high=65535)
    grpc_port: int | None = setting(
        None,
        "Port to listen on for gRPC, at the same addresses; 0 takes a free one. Without it there is none.",
        low=0,
        high=65535,
    )
    threads: int = setting(1, "Threads of one pass in the workers started here.", low=1, high=1024)
    max_batch: int = setting(
        MAX_BATCH, "Waiting items that share a pass at most, where the model gains by it; 1: never.", low=1, high=1024
    )
    max_outstanding: int = setting(
        64, "Items at the least-loaded replica beyond which requests are refused (503).", low=1, high=1 << 20
    )
    max_connections: int = setting(
        10_000,
        "Connections beyond which clients get 503; fewer where the limit of open files is low.",
        low=1,
        high=1 << 20,
    )
    max_body_bytes: Bytes = setting(64 << 20, "Largest body of a request, compressed and decompressed.", **_SIZE)
    max_bodies_bytes: Bytes = setting(256 << 20, "All bodies together; larger ones than 64 KiB then get 503.", **_SIZE)
    decode_processes: int = setting(
        2, "Image files that are decoded at once; each takes some 40 MB once there are any.", low=1, high=256
    )
    decode_memory_bytes: Bytes = setting(
        1 << 30, "Memory for image files and what decoding them takes; further ones get 503.", **_SIZE
    )
    drain_s: Seconds = setting(30.0, "Time after SIGTERM in which requests that are open may end.", low=0)
    grace_s: Seconds = setting(0.2, "Part of it in which new connections are still accepted.", low=0)
    keep_alive_s: Seconds = setting(75.0, "Time after which an idle connection is closed.", low=1e-3)
    live: bool = setting(True, "A page at / shows what happens, as it does.")
    tracing: TracingConfig = setting(TracingConfig(), "Traces of items by OpenTelemetry; see watch.md.")
    watch_files_s: Seconds = setting(
        0.0, "Time between two looks at whether the configuration or a model's file has changed; 0: none.", low=0
    )
    pass_limit_s: Seconds = setting(
        30.0, "Longest pass at a worker; beyond, it counts as lost and the item goes elsewhere.", low=1e-3
    )
    load_limit_s: Seconds = setting(
        120.0, "Longest time that a worker started here may take to load its models.", low=1e-3
    )
    remote_connections: int = setting(8, "Requests that are open at one remote server.", low=1, high=1024)
    delay: Annotated[str, checked(_check_delay)] = setting(
        "", "Delay injected into the workers started here, for experiments, as two-mode:scale=0.3."
    )
    run: Annotated[str, _CALLABLE] = setting(
        "", "Python callable (python:module:factory) that replaces the card's file in the workers started here."
    )
    worker_key_file: FileText = setting(
        "", "File with the key shared with workers on TCP; else the variable EVENKEEL_WORKER_KEY, or none."
    )
    no_worker_key: bool = setting(False, "Reach workers on other machines without a key or TLS.")
    worker_tls: ClientTls | None = setting(
        None, "TLS to workers on TCP: needs ca and certificate, as both sides show one; see trust.md."
    )
    remote_tls: ClientTls | None = setting(None, "TLS to remote servers at https://; see trust.md.")
    remote_credentials: CredentialsConfig = setting(CredentialsConfig(), "What remote servers want to be let in.")
    tls: ServerTls | None = setting(None, "TLS of clients; see trust.md.")
    keys: KeysConfig = setting(KeysConfig(), "Keys that clients must have; see trust.md.")

    def __post_init__(self) -> None:
        """Refuses what does not go together."""
        if self.models:
            _check_models(self.models)
        if not self.replicas.total:
            raise FieldError("replicas", "at least one is needed")
        if self.backups.autoscale is not None:
            raise FieldError(("backups", "autoscale"), "the load says how many replicas are needed, not backups")
        if self.grpc_port is not None and all(host.startswith("unix:") for host in self.host):
            raise FieldError("grpc_port", "needs an address, and host names a Unix socket alone")
        if self.backups.links:
            raise FieldError("backups", "no link of lost packets leads to them; name udp:// under replicas")
        if self.worker_tls is not None and (self.worker_tls.ca is None or self.worker_tls.certificate is None):
            raise FieldError("worker_tls", "needs ca and certificate: the gateway and its workers verify each other")
        if self.certificate is None and self.promises != PromisesConfig():
            raise FieldError("promises", "need policy.certificate, which `evenkeel certify` writes")

    def card(self) -> ModelCard:
        """Gives the served model's card."""
        return load_card(self.model)

    @property
    def each(self) -> "tuple[ServeConfig, ...]":
        """Gives the configuration of each model."""
        return self.models or (self,)


def _check_models(models: tuple[ServeConfig, ...]) -> None:
    names: set[str] = set()
    for place, one in enumerate(models):
        name = one.name or one.card().name
        if name in names:
            raise FieldError(("models", place, "name"), f"{name!r} is the name of an earlier model, too")
        names.add(name)
        if one.lossy.listen:
            raise FieldError(("models", place, "lossy", "listen"), "is for a server of one model")


# Fields that a model among several may have of its own; the others are of the server.
_OF_MODEL = frozenset(
    {
        "model",
        "name",
        "codes",
        "replicas",
        "backups",
        "policy",
        "promises",
        "health",
        "lossy",
        "threads",
        "max_batch",
        "max_outstanding",
        "decode_processes",
        "decode_memory",
        "pass_limit",
        "load_limit",
        "drain",
        "delay",
        "run",
        "worker_key_file",
        "no_worker_key",
        "worker_tls",
        "remote_model",
        "remote_version",
        "remote_connections",
        "remote_tls",
        "remote_credentials",
    }
)


def server_differences(one: ServeConfig, other: ServeConfig) -> list[str]:
    """Gives the fields, of the server and not of its models, that differ."""
    names = [field.name for field in fields(ServeConfig) if file_name(field.name) not in {*_OF_MODEL, "models"}]
    return [file_name(name) for name in names if name != "certificate" and getattr(one, name) != getattr(other, name)]


def _prepare(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Takes a policy's certificate out of it, also out of a text such as "collage(certificate=fills.json)"."""
    given = dict(raw)
    if isinstance(entries := given.get("models"), Sequence) and not isinstance(entries, str):
        for name in ("model", "name"):
            if name in given:
                raise FieldError(name, "is of one model; give it in models")
        shared = {name: value for name, value in given.items() if name in _OF_MODEL}
        for place, entry in enumerate(entries):
            for name in entry if isinstance(entry, Mapping) else ():
                if name not in _OF_MODEL and name in _ALL:
                    raise FieldError(("models", place, str(name)), "is of the server, and stands outside of models")
        given["models"] = [{**shared, **one} if isinstance(one, Mapping) else one for one in entries]
    if "model" in given:
        given.setdefault("codes", ["replicate"])  # the shipped collages fit the shipped classifier only
    policy = given.get("policy")
    policy = {"name": policy} if isinstance(policy, str) else policy
    if isinstance(policy, Mapping):
        policy = dict(policy)
        match = re.fullmatch(r"\s*([^()]+?)\s*\(\s*certificate\s*=\s*([^()]+?)\s*\)\s*", str(policy.get("name", "")))
        if match is not None:
            policy |= {"name": match[1], "certificate": match[2]}
        if "certificate" in policy:
            given["policy.certificate"] = policy.pop("certificate")
        given["policy"] = policy
    if isinstance(health := given.get("health"), Mapping) and "most_failures" in health:  # the older name
        given["health"] = {"max_failures" if name == "most_failures" else name: health[name] for name in health}
    return given


SCHEMA = Schema(ServeConfig, _prepare)
_ALL = frozenset(file_name(one.name) for one in fields(ServeConfig))


def read_config(raw: Any, folder: Path = Path()) -> ServeConfig:
    """Reads a configuration from a mapping (of YAML, or of flags).

    Args:
        raw: the mapping.
        folder: paths in it are relative to this folder.

    Raises:
        ConfigurationError: names each field that is wrong.
    """
    return SCHEMA.read(raw, folder)


def load_raw(path: Path) -> Any:
    """Reads the YAML file at `path`; what it says is not checked yet.

    Raises:
        ConfigurationError: not readable, not YAML, or a field given twice.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8-sig"), _OnceLoader)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # All but the first and the last: a date, a number or a truth that is none.
        raise ConfigurationError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None
    return {} if raw is None else raw


def find_lines(path: Path) -> Callable[[tuple[str | int, ...]], int]:
    """Gives what tells the line of a field in the YAML file at `path`; of one that is not there, its section's.

    Raises:
        ConfigurationError: as `load_raw`.
    """
    load_raw(path)
    root = yaml.compose(path.read_text(encoding="utf-8-sig"), yaml.SafeLoader)

    def line(place: tuple[str | int, ...]) -> int:
        node, mark = root, root.start_mark if root else None
        for part in place:
            if isinstance(node, yaml.nodes.MappingNode):
                found = [pair for pair in node.value if pair[0].value == part]
            elif isinstance(node, yaml.nodes.SequenceNode) and isinstance(part, int) and part < len(node.value):
                found = [(node.value[part], node.value[part])]
            else:
                found = []
            if not found:
                break
            mark, node = found[0][0].start_mark, found[0][1]
        return int(mark.line) + 1 if mark else 1

    return line


class _OnceLoader(yaml.SafeLoader):
    """Loads YAML safely, and refuses a repeated field where YAML's own safe loader keeps the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.nodes.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.nodes.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                raise ConfigurationError(f"{key.value}: is given twice, again in line {key.start_mark.line + 1}")
            seen.add((key.tag, key.value))
        return node
