"""Checks what is published: `python scripts/check_dist.py DIST` after `python -m hatchling build -d DIST`.

The wheel must come out of the sdist the same, file by file. It is installed into an empty folder as the container image
does (deploy/install.sh), which must stay small; there the commands must work, and a gateway and its workers answer a
request, started with the command lines that the pods of deploy/kubernetes have.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
MANIFESTS = ROOT / "deploy" / "kubernetes" / "base"
BASE_IMAGE_MB = 130  # python:3.11-slim
MAX_IMAGE_MB = 400
START_S = 60.0
KEY = "0123456789abcdef" * 2


def main() -> None:
    """Checks the wheel and the sdist in a folder."""
    (wheel,), (sdist,) = (list(Path(sys.argv[1]).glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        check_sdist(wheel, sdist, folder)
        source = folder / "source"
        source.mkdir()
        for file in (wheel, ROOT / "constraints.txt"):
            shutil.copy(file, source)
        target = folder / "evenkeel"
        run(["sh", str(ROOT / "deploy" / "install.sh"), str(target), str(source)], folder)
        size = sum(file.lstat().st_size for file in target.rglob("*") if not file.is_dir()) / 1e6
        if BASE_IMAGE_MB + size > MAX_IMAGE_MB:
            sys.exit(f"the image would have {BASE_IMAGE_MB} + {size:.0f} MB, more than {MAX_IMAGE_MB}")
        check_commands(target / "bin" / "evenkeel", folder)
        check_pods(target / "bin", folder)
    print(f"{wheel.name}: installs, answers; the image has {BASE_IMAGE_MB} + {size:.0f} MB")


def check_sdist(wheel: Path, sdist: Path, folder: Path) -> None:
    """Sees that the sdist builds the very wheel."""
    with tarfile.open(sdist) as packed:
        packed.extractall(folder / "sdist", filter="data")
    (unpacked,) = (folder / "sdist").iterdir()
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "rebuilt")], unpacked)
    (rebuilt,) = (folder / "rebuilt").glob("*.whl")
    first, second = contents(wheel), contents(rebuilt)
    if first != second:
        differing = sorted(name for name in first | second if first.get(name) != second.get(name))
        sys.exit(f"the sdist builds another wheel; these files differ: {', '.join(differing[:10])}")


def contents(wheel: Path) -> dict[str, bytes]:
    """Gives the files of a wheel."""
    with zipfile.ZipFile(wheel) as packed:
        return {name: packed.read(name) for name in packed.namelist()}


def check_commands(evenkeel: Path, folder: Path) -> None:
    """Runs what needs no server."""
    said = run([str(evenkeel), "--version"], folder)
    if not re.fullmatch(r"evenkeel, version \S+\n", said):
        sys.exit(f"evenkeel --version says {said!r}")
    (folder / "g.yaml").write_text("replicas: 1\nbackups: 1\n")
    run([str(evenkeel), "check", "g.yaml"], folder)
    json.loads(run([str(evenkeel), "schema"], folder))


def check_pods(bin_folder: Path, folder: Path) -> None:
    """Starts the containers of the manifests as processes, with addresses instead of discovery, and asks once."""
    files = [path for path in MANIFESTS.glob("*.yaml") if path.name != "kustomization.yaml"]
    objects = [one for path in files for one in yaml.safe_load_all(path.read_text())]
    pods = {one["metadata"]["name"]: one["spec"]["template"]["spec"] for one in objects if one["kind"] == "Deployment"}
    settings = next(one["data"]["gateway.yaml"] for one in objects if one["kind"] == "ConfigMap")
    key = folder / "worker.key"
    key.write_text(KEY)
    key.chmod(0o600)
    environment = {"PATH": f"{bin_folder}:/usr/bin:/bin", "HOME": str(folder), "TMPDIR": str(folder)}
    started: list[subprocess.Popen[str]] = []

    def start(name: str, arguments: list[str]) -> subprocess.Popen[str]:
        (container,) = pods[name]["containers"]
        command = ["evenkeel", *(re.sub(r"^/etc/evenkeel/keys/worker$", str(key), one) for one in arguments)]
        assert container["args"][0] == arguments[0]
        log = (folder / f"{name}.log").open("w")
        process = subprocess.Popen(
            [str(bin_folder / command[0]), *command[1:]],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        started.append(process)
        return process

    try:
        sockets = {}
        for name in ("evenkeel-replicas", "evenkeel-backups"):
            sockets[name] = f"unix:{folder}/{name}"
            arguments = pods[name]["containers"][0]["args"]
            start(name, [sockets[name] if one.startswith("tcp://") else one for one in arguments])
        raw: dict[str, Any] = yaml.safe_load(settings)
        raw |= {"replicas": [sockets["evenkeel-replicas"]], "backups": [sockets["evenkeel-backups"]]}
        raw |= {"host": "127.0.0.1", "port": 0, "worker_key_file": str(key), "keys": {}}
        (folder / "gateway.yaml").write_text(yaml.safe_dump(raw))
        gateway = start("evenkeel-gateway", ["serve", "gateway.yaml"])
        assert gateway.stdout is not None
        said = gateway.stdout.readline()
        found = re.search(r"(http://\S+)", said)
        if found is None:
            sys.exit(f"the gateway did not start: {said!r} {(folder / 'evenkeel-gateway.log').read_text()}")
        ask(found[1])
        for process in started:
            process.send_signal(signal.SIGTERM)
        endings = [process.wait(30) for process in started]
        if any(endings):
            sys.exit(f"the processes ended with {endings}")
    finally:
        for process in started:
            process.kill()
            process.wait()


def ask(url: str) -> None:
    """Waits until the server is ready, and has it classify an image."""
    until = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5):
                break
        except OSError:
            if time.monotonic() > until:
                sys.exit(f"the server was not ready within {START_S:g} s")
            time.sleep(0.1)
    pixels = {"name": "images", "shape": [1, 32, 32, 3], "datatype": "UINT8", "data": [120] * 3072}
    body = json.dumps({"inputs": [pixels]}).encode()
    with urllib.request.urlopen(f"{url}/v2/models/cifar10-base/infer", body, timeout=30) as reply:
        outputs = {one["name"]: one["data"] for one in json.load(reply)["outputs"]}
    if outputs["source"] != ["exact"]:
        sys.exit(f"the server answered {outputs}")


def run(command: list[str], folder: Path) -> str:
    """Runs a command in a folder, without this project's sources in its way; gives what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
