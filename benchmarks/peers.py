"""How many requests a second does each inference server answer, with a model that costs nothing and one replica?

python benchmarks/peers.py [--only evenkeel,ray] [--seconds 5] [--minutes 6] [--venvs FOLDER] [--json FILE]

Each peer is installed in a virtual environment of its own, started, asked one question whose answer is known, warmed
up, and measured with 1 and with 16 connections; then it is stopped and the next one comes. What cannot be installed,
started or understood is shown with the reason, and so is what there was no time left for. The model is
x[3072] @ W[3072, 10] on one float32 image of 3x32x32, 12 KB as raw bytes. evenkeel itself is served from the tree that
this script stands in.

HTTP is asked by the same client for all, gRPC by grpcio in a process of the peer's own environment. Both share the
cores with the server, and grpcio is the dearer by far: the table says what processor time the client took.
"""

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import orjson
import yaml
from output import show, write_json
from process_tree import adopt_orphans, cpu_s, descendants, end_all
from raw_client import Connection, Load, drive, request_bytes
from trivial_model import weights
from trivial_server import NAME, trivial_config

from evenkeel.figures.records import commit
from evenkeel.oip import Tensor, parse_response, write_request

_HERE = Path(__file__).resolve().parent
_TREE = _HERE.parent / "src"
_CONNECTIONS = (1, 16)
_START_TIMEOUT_S = 120.0
_CLIENT_PATIENCE_S = 30.0  # for a client in a process of its own to start, ask and end
_CLIENT_START_S = 1.0  # what that usually takes
_STOP_S = 5.0  # what a peer usually takes to end
_WARM_UP_SHARE = 0.5  # of the measured time
_WARM_UP_ATTEMPTS = 5
_IMAGE = np.random.default_rng(1).integers(0, 256, (1, 3, 32, 32)).astype(np.float32)
_JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Payload:
    """One way to ask: what is sent, and how the scores are read from an answer (its head in lower case).

    Attributes:
        path: of HTTP, or the full name of a gRPC method.
        grpc: True if `body` is a message for a gRPC method, which has no head.
    """

    name: str
    path: str
    headers: dict[str, str]
    body: bytes
    read: Callable[[bytes, bytes], Any]
    grpc: bool = False


def _inference_protocol(name: str, *, binary: bool) -> Payload:
    tensor = Tensor("images", "FP32", _IMAGE.shape, _IMAGE)
    parameters = {"binary_data_output": True} if binary else None
    body, header_length = write_request([tensor], binary=binary, parameters=parameters)
    headers = _JSON
    if header_length is not None:
        headers = {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(header_length),
        }
    return Payload(name, f"/v2/models/{NAME}/infer", headers, body, _read_inference_protocol)


def _read_inference_protocol(head: bytes, body: bytes) -> Any:
    _, found, rest = head.partition(b"inference-header-content-length:")
    length = int(rest.split(b"\r\n")[0]) if found else None
    return next(tensor.data for tensor in parse_response(body, length).outputs if tensor.name == "scores")


_OIP_BINARY = _inference_protocol("OIP binary", binary=True)
_OIP_JSON = _inference_protocol("OIP JSON", binary=False)
_RAW = Payload(
    "raw bytes",
    "/",
    {"Content-Type": "application/octet-stream"},
    _IMAGE.tobytes(),
    lambda head, body: np.frombuffer(body, np.float32),
)
_BASE64 = Payload(
    "base64 in JSON",
    "/predict",
    _JSON,
    orjson.dumps({"data": base64.b64encode(_IMAGE.tobytes()).decode()}),
    lambda head, body: np.array(orjson.loads(body)["scores"]),
)


def _varint(value: int) -> bytes:
    head = []
    while value >= 128:
        head.append(value % 128 + 128)
        value //= 128
    return bytes([*head, value])


def _field(number: int, value: bytes) -> bytes:
    """A field of bytes, text or a message as Protocol Buffers write it."""
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _fields(message: bytes) -> dict[int, bytes]:
    """The last value of each field of a message that holds nothing but what `_field` writes."""
    found, at = {}, 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key, length = number(), number()
        found[key >> 3] = message[at : at + length]
        at += length
    return found


# One method from google.protobuf.BytesValue to the same.
_GRPC = Payload(
    "raw bytes by gRPC",
    "/peers.Classifier/Classify",
    {},
    _field(1, _IMAGE.tobytes()),
    lambda head, body: np.frombuffer(_fields(body)[1], np.float32),
    grpc=True,
)
# ModelInfer: model's name (1), input's name, datatype and shape (5), output's name (6), raw contents (7; answers: 6).
_OIP_GRPC = Payload(
    "OIP gRPC",
    "/inference.GRPCInferenceService/ModelInfer",
    {},
    _field(1, NAME.encode())
    + _field(5, _field(1, b"images") + _field(2, b"FP32") + _field(3, b"".join(map(_varint, _IMAGE.shape))))
    + _field(6, _field(1, b"scores"))
    + _field(7, _IMAGE.tobytes()),
    lambda head, body: np.frombuffer(_fields(body)[6], np.float32),
    grpc=True,
)


@dataclass(frozen=True)
class Peer:
    """One server in one of its shapes.

    Attributes:
        venv: folder of its environment; peers of the same kind share one. Empty: the one that this script runs in.
        requirements: what pip installs there.
        script: in peers/; called with the port for HTTP, that for gRPC, and `arguments`.
        payloads: asked one after the other.
        python: that the environment is made of.
        environment: variables that the server gets; {http}, {grpc} and {folder} stand for its ports and its folder,
            {after_http} and {after_grpc} for the ports above.
    """

    name: str
    venv: str
    requirements: tuple[str, ...]
    script: str
    payloads: tuple[Payload, ...]
    arguments: tuple[str, ...] = ()
    python: str = sys.executable
    environment: dict[str, str] = field(default_factory=dict)


_LITSERVE = ("litserve==0.2.19", "numpy")
# uvloop 0.22 gives a thread no event loop of itself, on which MLServer 1.7.1 relies; with it workers do not start.
_MLSERVER = ("mlserver==1.7.1", "uvloop<0.22", "numpy")
_RAY = ("ray[serve]==2.60.0", "numpy")
# Its stub embeds an older CPython that cannot import what 3.11.7 has compiled; Debian's own 3.11.2 is fine.
_TRITON = ("nvidia-pytriton==0.7.0", "numpy")
_RAY_FAST = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": "{folder}"}
# HAProxy before the replica's own ports.
_RAY_THROUGH_PROXY = {**_RAY_FAST, "RAY_SERVE_ENABLE_HA_PROXY": "1"}
# Those ports and nothing before them. Each range, whose end is not part of it, holds the only replica's.
_RAY_DIRECT = {
    **_RAY_FAST,
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": "{http}",
    "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": "{after_http}",
    "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": "{grpc}",
    "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": "{after_grpc}",
}

PEERS = (
    Peer("evenkeel", "", (), "", (_OIP_BINARY, _OIP_JSON, _OIP_GRPC)),
    Peer("litserve", "litserve", _LITSERVE, "litserve_server.py", (_BASE64,)),
    Peer("litserve-fast-queue", "litserve", _LITSERVE, "litserve_server.py", (_BASE64,), ("fast",)),
    Peer("mlserver", "mlserver", _MLSERVER, "mlserver_server.py", (_OIP_JSON, _OIP_BINARY, _OIP_GRPC), ("1",)),
    Peer("mlserver-in-process", "mlserver", _MLSERVER, "mlserver_server.py", (_OIP_JSON, _OIP_GRPC), ("0",)),
    Peer("ray", "ray", _RAY, "ray_server.py", (_RAW, _GRPC), environment=_RAY_THROUGH_PROXY),
    Peer("ray-direct", "ray", _RAY, "ray_server.py", (_RAW, _GRPC), ("direct",), environment=_RAY_DIRECT),
    Peer(
        "triton",
        "triton",
        _TRITON,
        "triton_server.py",
        (_OIP_BINARY, _OIP_JSON, _OIP_GRPC),
        python="/usr/bin/python3.11",
    ),
)


class CannotRunError(Exception):
    """A peer that cannot be measured here, and why."""


@dataclass(frozen=True)
class Address:
    """Where a peer answers, and the interpreter of its environment."""

    http: int
    grpc: int
    python: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}"


def measure(peer: Peer, venvs: Path, seconds: float, until_s: float) -> Iterator[dict[str, Any]]:
    """A row for each payload and number of connections, or one that says why there is none."""
    try:
        python = _installed(peer, venvs, until_s)
        each_s = [seconds * (1 + _WARM_UP_SHARE) + payload.grpc * _CLIENT_START_S for payload in peer.payloads]
        needs_s = len(_CONNECTIONS) * sum(each_s) + _STOP_S
        if time.monotonic() + needs_s > until_s:
            raise CannotRunError("no time is left; give more --minutes")
        with _running(peer, python, until_s - needs_s) as address:
            for payload in peer.payloads:
                yield from _measure_payload(peer, payload, address, seconds)
    except (CannotRunError, OSError) as error:
        # Reasons may name files; where those lie is this machine's own affair.
        yield {"peer": peer.name, "payload": None, "not_run": re.sub(r"(/[\w.+-]+)+/", ".../", str(error))}


def _measure_payload(peer: Peer, payload: Payload, address: Address, seconds: float) -> Iterator[dict[str, Any]]:
    about = {"peer": peer.name, "payload": payload.name, "request_bytes": len(payload.body)}
    wrong = _wait_for_answer(payload, address, patience_s=2.0)
    if wrong:
        yield {**about, "not_run": wrong}
        return
    drive_it = _drive_grpc if payload.grpc else _drive_http
    for connections in _CONNECTIONS:
        load, server_cpu_s, client_cpu_s = drive_it(payload, address, connections, seconds)
        yield {
            **about,
            "client": "grpcio" if payload.grpc else "sockets",
            "connections": connections,
            "rate_per_s": load.rate_per_s,
            "p50_ms": load.percentile_ms(50),
            "p99_ms": load.percentile_ms(99),
            "server_cpu_us_per_request": server_cpu_s / load.requests * 1e6,
            "client_cpu_us_per_request": client_cpu_s / load.requests * 1e6,
            "requests": load.requests,
            "failed": load.failed,
        }


def _drive_http(payload: Payload, address: Address, connections: int, seconds: float) -> tuple[Load, float, float]:
    """What was seen, and the seconds of processor time that the servers and the client took meanwhile."""
    request = request_bytes(address.url + payload.path, payload.body, payload.headers)
    _warm_up(address.url, request, connections, seconds * _WARM_UP_SHARE)
    servers = descendants(os.getpid())
    server_s, client_s = cpu_s(servers), time.process_time()
    load = drive(address.url, request, connections, seconds=seconds)
    return load, cpu_s(servers) - server_s, time.process_time() - client_s


def _drive_grpc(payload: Payload, address: Address, connections: int, seconds: float) -> tuple[Load, float, float]:
    servers = descendants(os.getpid())
    seen = _grpc_client(payload, address, connections, seconds * _WARM_UP_SHARE, seconds, servers)
    load = Load(np.array(seen["latencies_ms"]), seen["elapsed_s"], seen["failed"])
    return load, seen["server_cpu_s"], seen["client_cpu_s"]


def _grpc_client(
    payload: Payload, address: Address, connections: int, warm_up_s: float, seconds: float, servers: list[int]
) -> dict[str, Any]:
    command = [address.python, str(_HERE / "peers" / "grpc_client.py"), f"127.0.0.1:{address.grpc}", payload.path]
    command += [str(connections), str(warm_up_s), str(seconds), ",".join(map(str, servers))]
    try:
        done = subprocess.run(
            command,
            input=payload.body,
            capture_output=True,
            check=False,
            timeout=warm_up_s + seconds + _CLIENT_PATIENCE_S,
            env={**os.environ, "PYTHONPATH": str(_HERE)},
        )
    except subprocess.TimeoutExpired:
        raise CannotRunError("the gRPC client does not end") from None
    if done.returncode:
        raise CannotRunError(f"the gRPC client fails: {_last_line(done.stderr.decode(errors='replace'))}")
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


def _warm_up(url: str, request: bytes, connections: int, seconds: float) -> None:
    for attempt in range(_WARM_UP_ATTEMPTS):
        try:
            drive(url, request, connections, seconds=seconds)
            return
        except ConnectionError:
            # Ray's proxy starts afresh shortly after its first answer and drops the connections that it has.
            if attempt == _WARM_UP_ATTEMPTS - 1:
                raise


def _wait_for_answer(payload: Payload, address: Address, patience_s: float) -> str:
    """Ask until the right answer comes; what was wrong with the last one if it does not."""
    expected = _IMAGE.reshape(-1) @ weights()
    ask = _ask_grpc if payload.grpc else _ask_http
    until_s = time.monotonic() + patience_s
    while True:
        answer, wrong = ask(payload, address)
        if answer is not None:
            try:
                scores = np.ravel(payload.read(*answer))
            except Exception as error:  # whatever another's answer may do to its reader
                return f"an answer that cannot be read: {error!r}"
            if scores.shape == expected.shape and np.allclose(scores, expected, rtol=1e-3, atol=0.05):
                return ""
            return f"a wrong answer: {scores[:3]}... instead of {expected[:3]}..."
        if time.monotonic() >= until_s:
            return wrong
        time.sleep(0.1)


def _ask_http(payload: Payload, address: Address) -> tuple[tuple[bytes, bytes] | None, str]:
    """The answer's head and body, or None and why there is none."""
    try:
        connection = Connection(address.url)
        status = connection.exchange(request_bytes(address.url + payload.path, payload.body, payload.headers))
        head, body = connection.head_and_body()
        connection.close()
    except OSError as error:
        return None, str(error)
    if status != 200:
        return None, f"HTTP {status}: {body[:160].decode(errors='replace')}"
    return (head.lower(), body), ""


def _ask_grpc(payload: Payload, address: Address) -> tuple[tuple[bytes, bytes] | None, str]:
    seen = _grpc_client(payload, address, 1, 0.0, 0.0, [])
    return ((b"", bytes.fromhex(seen["answer"])), "") if "answer" in seen else (None, seen["wrong"])


def _installed(peer: Peer, venvs: Path, until_s: float) -> str:
    """The Python interpreter of the peer's environment, made if need be."""
    if not peer.venv:
        return sys.executable
    if not Path(peer.python).exists():
        raise CannotRunError(f"needs {peer.python}, which is not there (Debian 12: apt-get install python3-venv)")
    folder = venvs / peer.venv
    python, note = folder / "bin" / "python", folder / "requirements.txt"
    wanted = "\n".join(peer.requirements)
    if not note.exists() or note.read_text(encoding="utf-8") != wanted:
        click.echo(f"installing {', '.join(peer.requirements)} ...", err=True)
        shutil.rmtree(folder, ignore_errors=True)
        venvs.mkdir(parents=True, exist_ok=True)
        for command in (
            [peer.python, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *peer.requirements],
        ):
            left_s = max(1.0, until_s - time.monotonic())
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=left_s)
            except subprocess.TimeoutExpired:
                raise CannotRunError("no time is left to install it; give more --minutes") from None
            if done.returncode:
                raise CannotRunError(f"cannot be installed: {_last_line(done.stderr or done.stdout)}")
        note.write_text(wanted, encoding="utf-8")
    return str(python)


@contextmanager
def _running(peer: Peer, python: str, until_s: float) -> Iterator[Address]:
    """The peer's server, answering rightly. All that it started is ended afterwards."""
    with tempfile.TemporaryDirectory(prefix="peer-") as name:
        folder = Path(name)
        address = Address(*_free_ports(2), python)
        values = {"http": address.http, "grpc": address.grpc, "folder": name}
        values |= {"after_http": address.http + 1, "after_grpc": address.grpc + 1}
        log = folder / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                _command(peer, address, folder),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=folder,
                env={
                    **os.environ,
                    "OPENBLAS_NUM_THREADS": "1",
                    # Only what servers have to find: the model and the server's own module from its children; ours
                    # is served from this tree, whatever is installed.
                    "PYTHONPATH": os.pathsep.join([str(_HERE), str(_HERE / "peers")] if peer.venv else [str(_TREE)]),
                    **{key: value.format(**values) for key, value in peer.environment.items()},
                },
                start_new_session=True,
            )
        try:
            until_s = min(until_s, time.monotonic() + _START_TIMEOUT_S)
            wrong = "no answer"
            while wrong and time.monotonic() < until_s:
                wrong = _wait_for_answer(peer.payloads[0], address, patience_s=1.0)
                if process.poll() is not None:
                    break
            if wrong:
                said = _last_line(log.read_text(encoding="utf-8", errors="replace"))
                raise CannotRunError(f"does not start: {wrong}; its last words: {said}")
            yield address
        finally:
            end_all()


def _command(peer: Peer, address: Address, folder: Path) -> list[str]:
    if peer.script:
        script = str(_HERE / "peers" / peer.script)
        return [address.python, script, str(address.http), str(address.grpc), *peer.arguments]
    config = trivial_config(folder, 32, "none", datatype="FP32", replicas=1, backups=0, port=address.http)
    config["grpc_port"] = address.grpc
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return [address.python, "-m", "evenkeel", "serve", str(path)]


def _free_ports(count: int) -> list[int]:
    free = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in free]
    for each in free:
        each.close()
    return ports


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "none"


def _compared(rows: list[dict[str, Any]]) -> str:
    """Our throughput over that of the best peer, of all payloads and of those by gRPC."""
    busiest = [row for row in rows if row.get("connections") == max(_CONNECTIONS)]
    lines = []
    for what, some in (("", busiest), (", gRPC alone", [row for row in busiest if row["client"] == "grpcio"])):
        ours = [row["rate_per_s"] for row in some if row["peer"] == "evenkeel"]
        others = [row for row in some if row["peer"] != "evenkeel"]
        if ours and others:
            best = max(others, key=lambda row: row["rate_per_s"])
            lines.append(
                f"evenkeel / best peer ({best['peer']}, {best['payload']}) with {max(_CONNECTIONS)} connections{what}: "
                f"{max(ours) / best['rate_per_s']:.2f}"
            )
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--only", default="", help=f"Some of {', '.join(peer.name for peer in PEERS)}.")
@click.option("--seconds", default=5.0, show_default=True, help="Of each measurement.")
@click.option("--minutes", default=6.0, show_default=True, help="Of everything, installing included.")
@click.option(
    "--venvs",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "evenkeel", "peers"),
    help="Where peers are installed; by default in the user's cache.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the rows here as well.")
def main(only: str, seconds: float, minutes: float, venvs: Path, json_path: Path | None) -> None:
    until_s = time.monotonic() + 60 * minutes
    wanted = [name.strip() for name in only.split(",") if name.strip()] or [peer.name for peer in PEERS]
    unknown = set(wanted) - {peer.name for peer in PEERS}
    if unknown:
        raise click.BadParameter(f"no peer {', '.join(sorted(unknown))}", param_hint="--only")
    adopt_orphans()
    # So that the servers are ended too when this script is.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows: list[dict[str, Any]] = []
    for peer in PEERS:
        if peer.name in wanted:
            click.echo(f"{peer.name} ...", err=True)
            rows += measure(peer, venvs.resolve(), seconds, until_s)
    columns = {
        "peer": ("server", ""),
        "payload": ("payload", ""),
        "client": ("client", ""),
        "connections": ("conn", "d"),
        "rate_per_s": ("req/s", ",.0f"),
        "p50_ms": ("p50 ms", ".2f"),
        "p99_ms": ("p99 ms", ".2f"),
        "server_cpu_us_per_request": ("CPU us/req", ",.0f"),
        "client_cpu_us_per_request": ("client's", ",.0f"),
        "failed": ("failed", "d"),
    }
    show("One replica, one 12 KB image a request", [row for row in rows if "not_run" not in row], columns)
    for row in rows:
        if "not_run" in row:
            what = f" with {row['payload']}" if row["payload"] else ""
            click.echo(f"not run: {row['peer']}{what}: {row['not_run']}")
    click.echo(_compared(rows))
    write_json(
        json_path, {"only": only, "seconds": seconds, "connections": _CONNECTIONS, "served": commit(_TREE)}, rows
    )


if __name__ == "__main__":
    main()
