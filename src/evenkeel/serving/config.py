"""Reads the configuration of `evenkeel serve`: a YAML file, flags, or both, checked before anything starts.

Each message names the field, as `replicas.count` or `health.pause`. A field that nobody knows is refused rather than
ignored, since a misspelt deadline that is silently the default is found out too late.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
import yaml.nodes

from evenkeel.backends.lossy.udp import udp_address
from evenkeel.backends.worker.address import parse_address
from evenkeel.backends.worker.batching import MAX_BATCH
from evenkeel.coding.answers.by_name import CODES, CodeSettings, CollageSettings, ReplicateSettings, settings_of
from evenkeel.delays.text import parse_delay
from evenkeel.errors import ConfigurationError
from evenkeel.models import shipped
from evenkeel.models.cards import ModelCard, load_card
from evenkeel.promises.promise import KINDS, Promise
from evenkeel.serving.gateway.health import HealthSettings
from evenkeel.serving.gateway.policy import Policy, parse_trigger, preset
from evenkeel.text_values import read_duration_s, without_password

__all__ = ["CodeConfig", "LossyConfig", "NodesConfig", "ServeConfig", "load_raw", "read_config"]

_BASE = shipped.card_path("cifar10-base")
_COLLAGES = (shipped.card_path("cifar10-collage-2x2"), shipped.card_path("cifar10-collage-3x3"))
_HTTP = ("http://", "https://")
_UDP = "udp://"
_OLDER_KINDS = {"concat-parity": "parity:form=concat"}
_OLDER_FIELDS = {
    "items": ("k", 1024),
    "spares": ("spares", 64),
}  # field -> its setting in `kind`, and the largest value


@dataclass(frozen=True)
class NodesConfig:
    """Lists workers of one kind: some started here, some reached by address, some remote inference servers."""

    count: int = 0  # started and supervised by the gateway
    addresses: tuple[str, ...] = ()  # unix:/path or tcp://host:port of `evenkeel worker`
    urls: tuple[str, ...] = ()  # http://host:port of an Open Inference Protocol server
    links: tuple[str, ...] = ()  # udp://host:port of a gateway that listens for images with packet loss

    @property
    def total(self) -> int:
        """Counts all nodes."""
        return self.count + len(self.addresses) + len(self.urls) + len(self.links)


@dataclass(frozen=True)
class LossyConfig:
    """Says how images cross links that lose packets, and where they are listened for."""

    listen: str = ""  # udp://host:port; "": nowhere
    key_file: str = ""  # shared with the other ends; "": `worker_key_file`
    no_key: bool = False  # other machines may reach this end, or be reached, without a key
    quality: int = 75  # of JPEG; this and what follows is for images that are sent
    subsampling: int = 0
    blocks: int = 1  # in a restart interval
    payload: int = 1200  # bytes of a packet at most
    wait_s: float = 0.05  # after which the other end makes do with what has come
    deadline_s: float = 0.5  # after which an image counts as lost, also for those who listen
    parity: float = 0.0  # parity packets for each data packet
    retransmit: bool = True


@dataclass(frozen=True)
class CodeConfig:
    """Holds one code that backups can run, and the model that it needs."""

    settings: CodeSettings
    model: Path | None = None  # card; None: the replicas' own model
    run: str = ""  # python:module:factory, which replaces that card's ONNX file in the backups started here


@dataclass(frozen=True)
class ServeConfig:
    """Holds everything that `evenkeel serve` needs to know."""

    model: Path = _BASE
    name: str = ""  # as clients call it; the card's name by default
    codes: tuple[CodeConfig, ...] = (
        CodeConfig(ReplicateSettings()),
        CodeConfig(CollageSettings(), _COLLAGES[0]),
        CodeConfig(CollageSettings(), _COLLAGES[1]),
    )
    replicas: NodesConfig = NodesConfig(count=2)
    backups: NodesConfig = NodesConfig(count=1)
    remote_model: str = ""  # what remote servers call the model; `name` by default
    remote_version: str = ""  # of that model; "": the first version that a server names
    policy: Policy = field(default_factory=lambda: preset("collage+hedge"))
    certificate: Path | None = None  # of the policy's promise: a cascade's, or of a collage's fills
    promise: Promise | None = None  # kept where a request asks for none
    misses: float = 0.0  # share of the answers that may be degraded within a promise
    audit: float = 0.0  # share of the requests that both models of a cascade answer
    audit_file: Path | None = None  # to which each audit is appended, as a line of JSON
    health: HealthSettings = field(default_factory=HealthSettings)
    lossy: LossyConfig = LossyConfig()
    host: tuple[str, ...] = ("127.0.0.1",)  # addresses to listen on, and unix:/path; loopback by default
    port: int = 8000
    threads: int = 1  # of one pass in the workers started here
    max_batch: int = MAX_BATCH  # items that wait there and share a pass, where the model gains by it; 1: none do
    max_outstanding: int = 64  # items at the least-loaded replica beyond which requests are refused
    max_connections: int = 10_000  # further clients get 503
    max_body_bytes: int = 64 << 20
    max_bodies_bytes: int = 256 << 20  # of all requests together; larger bodies than 64 KiB then get 503
    decode_processes: int = 2  # image files that are decoded at once; each takes some 40 MB once there are any
    decode_memory_bytes: int = 1 << 30  # of image files and what decoding them takes; further ones get 503
    drain_s: float = 30.0
    grace_s: float = 0.2  # after the signal to end, while connections are still accepted
    keep_alive_s: float = 75.0  # an idle connection
    pass_limit_s: float = 30.0  # one pass at a worker; beyond, it counts as lost
    load_limit_s: float = 120.0  # a worker started here, until it has loaded its models
    remote_connections: int = 8  # requests that are open at one remote server
    delay: str = ""  # injected into the workers started here, for experiments
    run: str = ""  # python:module:factory, which replaces the card's ONNX file in the workers started here
    worker_key_file: str = ""  # the key shared with workers on TCP; "": of the variable EVENKEEL_WORKER_KEY, or none
    no_worker_key: bool = False  # reach workers on other machines without a key

    def card(self) -> ModelCard:
        """Gives the served model's card."""
        return load_card(self.model)


def load_raw(path: Path) -> Any:
    """Reads the YAML file at `path`; what it says is not checked yet.

    Raises:
        ConfigurationError: not readable, not YAML, or a field given twice.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8-sig"), _OnceLoader)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigurationError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None
    return {} if raw is None else raw


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


def read_config(raw: Any, folder: Path = Path()) -> ServeConfig:
    """Reads a configuration from a mapping (of YAML, or of flags).

    Args:
        raw: the mapping.
        folder: paths in it are relative to this folder.

    Raises:
        ConfigurationError: names the field.
    """
    fields = _Fields(raw, "")
    config = ServeConfig()
    changes: dict[str, Any] = {}
    if "model" in fields:
        changes["model"] = _card_path(fields.text("model"), folder, "model")
        # The shipped collages fit the shipped classifier only.
        changes["codes"] = (CodeConfig(ReplicateSettings()),)
    if "host" in fields:
        changes["host"] = _hosts(fields.take("host"))
    for name in ("name", "remote_model", "remote_version"):
        if name in fields:
            changes[name] = fields.text(name)
    if "run" in fields:
        changes["run"] = _callable(fields.text("run"), folder)
    if re.search(r"[/\s]", changes.get("name", "")):
        raise ConfigurationError(
            f"name: is part of the URL, so it must hold neither / nor white space, found {changes['name']!r}"
        )
    for name, low, high in (
        ("port", 0, 65535),
        ("threads", 1, 1024),
        ("max_batch", 1, 1024),
        ("max_outstanding", 1, 1 << 20),
        ("max_connections", 1, 1 << 20),
        ("decode_processes", 1, 256),
        ("remote_connections", 1, 1024),
    ):
        if name in fields:
            changes[name] = fields.whole(name, low, high)
    for name in ("max_body", "max_bodies", "decode_memory"):
        if name in fields:
            changes[f"{name}_bytes"] = fields.size(name)
    for name in ("drain", "grace", "keep_alive", "pass_limit", "load_limit"):
        if name in fields:
            changes[f"{name}_s"] = fields.seconds(name)
    if "worker_key_file" in fields:
        changes["worker_key_file"] = str(folder / fields.text("worker_key_file"))
    if "no_worker_key" in fields:
        changes["no_worker_key"] = fields.truth("no_worker_key")
    if "delay" in fields:
        changes["delay"] = fields.text("delay")
        parse_delay(changes["delay"] or "none")
    for name in ("replicas", "backups"):
        if name in fields:
            changes[name] = _nodes(fields.take(name), name)
    if "codes" in fields:
        changes["codes"] = _codes(fields.take("codes"), folder)
    if "policy" in fields:
        raw_policy = _named_policy(fields.take("policy"))
        if "certificate" in raw_policy:
            changes["certificate"] = folder / _Fields(raw_policy, "policy").text("certificate")
        changes["policy"] = _policy({name: raw_policy[name] for name in raw_policy if name != "certificate"})
    if "promises" in fields:
        changes |= _promises(fields.take("promises"), folder)
    if "health" in fields:
        changes["health"] = _health(fields.take("health"))
    if "lossy" in fields:
        changes["lossy"] = _lossy(fields.take("lossy"), folder)
    fields.finish()
    for name in ("keep_alive", "pass_limit", "load_limit"):
        if changes.get(f"{name}_s") == 0:
            raise ConfigurationError(f"{name}: must be above 0")
    config = replace(config, **changes)
    promised = (config.promise, config.misses, config.audit, config.audit_file)
    if config.certificate is None and any(promised):
        raise ConfigurationError("promises: need policy.certificate, which `evenkeel certify` writes")
    if not config.replicas.total:
        raise ConfigurationError("replicas: at least one is needed")
    return config


def _hosts(raw: Any) -> tuple[str, ...]:
    """Addresses to listen on: one, or a list; at most one of them a Unix socket."""
    hosts = (raw,) if isinstance(raw, str) else tuple(raw) if isinstance(raw, Sequence) else ()
    if not hosts or not all(isinstance(host, str) and host.strip("[]") for host in hosts):
        raise ConfigurationError(f"host: expected an address, unix:/path, or a list of them, found {raw!r}")
    paths = [host for host in hosts if host.startswith("unix:")]
    if len(paths) > 1 or "unix:" in paths:
        raise ConfigurationError(f"host: at most one unix:/path, found {raw!r}")
    return hosts


def _named_policy(raw: Any) -> Mapping[str, Any]:
    """Gives a policy's fields, also of a text such as "collage" or "collage(certificate=fills.json)"."""
    given = {"name": raw} if isinstance(raw, str) else _Fields(raw, "policy").all()
    match = re.fullmatch(r"\s*([^()]+?)\s*\(\s*certificate\s*=\s*([^()]+?)\s*\)\s*", str(given.get("name", "")))
    return given if match is None else {**given, "name": match[1], "certificate": match[2]}


def _promises(raw: Any, folder: Path) -> dict[str, Any]:
    fields, changes = _Fields(raw, "promises"), dict[str, Any]()
    if "default" in fields:
        inner = _Fields(fields.take("default"), "promises.default")
        kinds = [kind for kind in KINDS if kind in inner]
        if len(kinds) != 1:
            raise ConfigurationError(f"promises.default: give one of {', '.join(KINDS)}")
        level = inner.number(kinds[0])
        guarantee = inner.number("guarantee") if "guarantee" in inner else 0.95
        inner.finish()
        try:
            changes["promise"] = Promise(kinds[0], level, guarantee)
        except ConfigurationError as error:
            raise ConfigurationError(f"promises.default.{error}") from None
    for name in ("misses", "audit"):
        if name in fields:
            changes[name] = fields.number(name)
            if not 0 <= changes[name] <= 1:
                raise ConfigurationError(f"promises.{name}: must be a share from 0 to 1, found {changes[name]:g}")
    if "audit_file" in fields:
        changes["audit_file"] = folder / fields.text("audit_file")
    fields.finish()
    return changes


def _policy(raw: Any) -> Policy:
    fields = _Fields(raw, "policy")
    base = preset(fields.text("name") if "name" in fields else "collage+hedge")
    changes: dict[str, Any] = {}
    for name in ("fill_after", "hedge_after"):
        if name not in fields:
            continue
        value = fields.take(name)
        if value is None or value == "never":
            changes[name] = None
            continue
        inner = _Fields(value if isinstance(value, Mapping) else {"at": value}, f"policy.{name}")
        trigger = parse_trigger(inner.take("at") if "at" in inner else "auto", f"policy.{name}")
        limits: dict[str, Any] = {
            f"{limit}_s": inner.seconds(limit) for limit in ("floor", "ceiling", "initial") if limit in inner
        }
        inner.finish()
        changes[name] = replace(trigger, **limits)
    for name in ("group_wait", "deadline"):
        if name in fields:
            changes[f"{name}_s"] = fields.seconds(name)
    for name in ("min_confidence", "max_extra_load", "max_approximate"):
        if name in fields:
            changes[name] = fields.number(name)
    if "on_miss" in fields:
        on_miss = fields.take("on_miss")
        if on_miss not in ("degrade", "reject"):
            raise ConfigurationError(f"policy.on_miss: must be degrade or reject, found {on_miss!r}")
        changes["degrade"] = on_miss == "degrade"
    for name, low, high in (("copies", 1, 5), ("max_attempts", 1, 5), ("default_label", 0, 1 << 30)):
        if name in fields:
            changes[name] = fields.whole(name, low, high)
    fields.finish()
    try:
        return preset(base.name, **changes)
    except ConfigurationError as error:
        # The policy's own names end in their unit; the file's do not.
        raise ConfigurationError(re.sub(r"^(policy\.\w+)_s: (.*)", r"\1: \2 (seconds)", str(error))) from None


def _health(raw: Any) -> HealthSettings:
    if isinstance(raw, Mapping) and "most_failures" in raw:  # the older name
        raw = {"max_failures" if name == "most_failures" else name: value for name, value in raw.items()}
    fields = _Fields(raw, "health")
    changes: dict[str, Any] = {}
    for name in ("pause", "max_pause", "min_stall"):
        if name in fields:
            changes[f"{name}_s"] = fields.seconds(name)
    for name, low, high in (("slow_factor", 1, 1e6), ("stall_factor", 1, 1e6), ("max_slow_share", 0, 1)):
        if name in fields:
            changes[name] = fields.number(name)
            if not low <= changes[name] <= high:
                raise ConfigurationError(
                    f"health.{name}: must be a number from {low:g} to {high:g}, found {changes[name]:g}"
                )
    for name in ("window", "probes", "max_failures"):
        if name in fields:
            changes[name] = fields.whole(name, 1, 10_000)
    fields.finish()
    settings = replace(HealthSettings(), **changes)
    if settings.max_pause_s < settings.pause_s:
        raise ConfigurationError(
            f"health.max_pause: must be at least health.pause, {settings.pause_s:g}s, found {settings.max_pause_s:g}s"
        )
    return settings


def _lossy(raw: Any, folder: Path) -> LossyConfig:
    fields, changes = _Fields(raw, "lossy"), dict[str, Any]()
    if "listen" in fields:
        changes["listen"] = fields.text("listen")
        _check_link(changes["listen"], "lossy.listen")
    if "key_file" in fields:
        changes["key_file"] = str(folder / fields.text("key_file"))
    for name in ("no_key", "retransmit"):
        if name in fields:
            changes[name] = fields.truth(name)
    for name, low, high in (("quality", 1, 100), ("subsampling", 0, 2), ("blocks", 1, 65535), ("payload", 100, 1200)):
        if name in fields:
            changes[name] = fields.whole(name, low, high)
    for name in ("wait", "deadline"):
        if name in fields:
            changes[f"{name}_s"] = fields.seconds(name)
    if "parity" in fields:
        changes["parity"] = fields.number("parity")
    fields.finish()
    config = replace(LossyConfig(), **changes)
    if not 0 < config.wait_s < config.deadline_s:
        raise ConfigurationError(
            f"lossy.wait: must be above 0 and below lossy.deadline, {config.deadline_s:g}s, found {config.wait_s:g}s"
        )
    if not 0 <= config.parity <= 1:
        raise ConfigurationError(f"lossy.parity: must be a number from 0 to 1, found {config.parity:g}")
    if config.subsampling == 1:
        raise ConfigurationError("lossy.subsampling: must be 0 or 2, found 1")
    return config


def _nodes(raw: Any, name: str) -> NodesConfig:
    if isinstance(raw, int) and not isinstance(raw, bool):
        raw = {"count": raw}
    elif isinstance(raw, Sequence) and not isinstance(raw, str):
        for place, entry in enumerate(raw):
            if not isinstance(entry, str) or not entry.startswith(("unix:", "tcp://", _UDP, *_HTTP)):
                shown = without_password(entry) if isinstance(entry, str) else entry
                raise ConfigurationError(
                    f"{name}[{place}]: expected unix:/path, tcp://host:port, http(s)://host:port or udp://host:port, "
                    f"found {shown!r}"
                )
            if not entry.startswith((_UDP, *_HTTP)):
                _check_address(entry, f"{name}[{place}]")
        http, udp = ([text for text in raw if text.startswith(one)] for one in (_HTTP, _UDP))
        raw = {"addresses": [text for text in raw if text not in http + udp], "urls": http, "links": udp}
    elif not isinstance(raw, Mapping):
        raise ConfigurationError(f"{name}: expected a whole number, a list of addresses, or fields, found {raw!r}")
    fields = _Fields(raw, name)
    count = fields.whole("count", 0, 4096) if "count" in fields else 0
    addresses = fields.texts("addresses") if "addresses" in fields else ()
    urls = fields.texts("urls") if "urls" in fields else ()
    links = fields.texts("links") if "links" in fields else ()
    fields.finish()
    for place, address in enumerate(addresses):
        _check_address(address, f"{name}.addresses[{place}]")
    for place, url in enumerate(urls):
        if not url.startswith(_HTTP):
            shown = without_password(url)
            raise ConfigurationError(f"{name}.urls[{place}]: expected http(s)://host:port, found {shown!r}")
    for place, link in enumerate(links):
        _check_link(link, f"{name}.links[{place}]")
    if links and name == "backups":
        raise ConfigurationError("backups: no link of lost packets leads to them; name udp:// under replicas")
    return NodesConfig(count, addresses, urls, links)


def _check_link(text: str, name: str) -> None:
    try:
        udp_address(text)
    except ConfigurationError as error:
        raise ConfigurationError(f"{name}: {error}") from None


def _check_address(text: str, name: str) -> None:
    try:
        address = parse_address(text)
    except ConfigurationError as error:
        raise ConfigurationError(f"{name}: {error}") from None
    if address.kind == "fd":
        raise ConfigurationError(f"{name}: expected unix:/path or tcp://host:port, found {text!r}")


def _codes(raw: Any, folder: Path) -> tuple[CodeConfig, ...]:
    if not isinstance(raw, Sequence) or isinstance(raw, str):
        raise ConfigurationError(f"codes: expected a list, found {raw!r}")
    return tuple(_code(entry, f"codes[{place}]", folder) for place, entry in enumerate(raw))


def _code(raw: Any, name: str, folder: Path) -> CodeConfig:
    if isinstance(raw, str):
        # The short form: the name of a code that runs the replicas' own model, or the card of a Collage-CNN.
        named = raw.partition(":")[0].strip() in CODES
        if not named and raw not in shipped.NAMES and not raw.endswith(".json"):
            raise ConfigurationError(
                f"{name}: expected a code ({', '.join(CODES)}), a model card (.json) or one of "
                f"{', '.join(shipped.NAMES)}, found {raw!r}"
            )
        raw = {"kind": raw} if named else {"kind": "collage", "model": raw}
    fields = _Fields(raw, name)
    kind = fields.text("kind")
    try:
        settings = settings_of(_OLDER_KINDS.get(kind, kind))
    except ConfigurationError as error:
        raise ConfigurationError(f"{name}.kind: {error}") from None
    for field_name, (setting, largest) in _OLDER_FIELDS.items():
        if field_name in fields:
            value = fields.whole(field_name, 1, largest)
            if not hasattr(settings, setting):
                raise ConfigurationError(f"{name}.{field_name}: {settings.name} has no such setting")
            if ":" in kind:
                raise ConfigurationError(f"{name}.{field_name}: kind has settings; add {setting}={value} there")
            settings = replace(settings, **{setting: value})
    model = _card_path(fields.text("model"), folder, f"{name}.model") if "model" in fields else None
    run = _callable(fields.text("run"), folder) if "run" in fields else ""
    fields.finish()
    if model is None and settings.card_kind is not None:
        raise ConfigurationError(f"{name}.model: a {settings.name} code needs a model card")
    if model is None and run:
        raise ConfigurationError(f"{name}.run: replaces the file of a card, and there is no {name}.model")
    if model is not None and settings.card_kind is None:
        raise ConfigurationError(f"{name}.model: {settings.name} runs the replicas' own model; leave the field out")
    return CodeConfig(settings, model, run)


def _callable(text: str, folder: Path) -> str:
    """Reads the model spec `text`; a Python file in it is relative to the configuration's folder, as cards are."""
    where, colon, factory = text.removeprefix("python:").rpartition(":")
    if text.startswith("python:") and colon and where.endswith(".py"):
        return f"python:{folder / where}:{factory}"
    return text


def _card_path(text: str, folder: Path, name: str) -> Path:
    if text in shipped.NAMES:
        return shipped.card_path(text)
    path = folder / text
    if path.suffix != ".json":
        raise ConfigurationError(
            f"{name}: expected a model card (.json) or one of {', '.join(shipped.NAMES)}, found {text!r}"
        )
    return path


class _Fields:
    """Gives the fields of a mapping one by one, so that what is left over at the end is known to be wrong."""

    def __init__(self, raw: Any, name: str) -> None:
        if not isinstance(raw, Mapping):
            raise ConfigurationError(f"{name or 'configuration'}: expected fields, found {raw!r}")
        self._left = dict(raw)
        self._name = name
        self._seen: list[str] = []

    def __contains__(self, field_name: str) -> bool:
        self._seen.append(field_name)
        return field_name in self._left

    def all(self) -> dict[str, Any]:
        return dict(self._left)

    def path(self, field_name: str) -> str:
        return f"{self._name}.{field_name}" if self._name else field_name

    def take(self, field_name: str) -> Any:
        if field_name not in self._left:
            raise ConfigurationError(f"{self.path(field_name)}: is missing")
        return self._left.pop(field_name)

    def text(self, field_name: str) -> str:
        value = self.take(field_name)
        if not isinstance(value, str) or not value:
            raise ConfigurationError(f"{self.path(field_name)}: expected a text, found {value!r}")
        return value

    def texts(self, field_name: str) -> tuple[str, ...]:
        value = self.take(field_name)
        if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(one, str) for one in value):
            raise ConfigurationError(f"{self.path(field_name)}: expected a list of texts, found {value!r}")
        return tuple(value)

    def whole(self, field_name: str, low: int, high: int) -> int:
        value = self.take(field_name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ConfigurationError(
                f"{self.path(field_name)}: expected a whole number from {low} to {high}, found {value!r}"
            )
        return value

    def truth(self, field_name: str) -> bool:
        value = self.take(field_name)
        if not isinstance(value, bool):
            raise ConfigurationError(f"{self.path(field_name)}: expected true or false, found {value!r}")
        return value

    def number(self, field_name: str) -> float:
        value = self.take(field_name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ConfigurationError(f"{self.path(field_name)}: expected a number, found {value!r}")
        return float(value)

    def seconds(self, field_name: str) -> float:
        value = read_duration_s(str(self.take(field_name)), self.path(field_name))
        if value < 0:
            raise ConfigurationError(f"{self.path(field_name)}: must not be negative")
        return value

    def size(self, field_name: str) -> int:
        value = self.take(field_name)
        units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
        if isinstance(value, str) and value[-3:] in units and value[:-3].strip().isdigit():
            value = int(value[:-3]) * units[value[-3:]]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 32:
            raise ConfigurationError(f"{self.path(field_name)}: expected a size like 64MiB, found {value!r}")
        return value

    def finish(self) -> None:
        if self._left:
            first = next(iter(self._left))
            known = ", ".join(dict.fromkeys(self._seen)) or "none"
            raise ConfigurationError(f"{self.path(str(first))}: unknown field; known are {known}")
