"""Writes requirements.lock: every package of constraints.txt that a development install takes, with its files' hashes.

Run it after constraints.txt has changed: `python scripts/lock.py`. Hashes are those of the release's files on PyPI that
Python 3.11 to 3.14 on Linux x86-64 may take. Where `--wheel` gives a wheel, its hash stands there alone: PyTorch
publishes its CPU builds elsewhere, and pip would prefer the far larger one on PyPI.
"""

import argparse
import hashlib
import json
import re
import sys
import tempfile
import urllib.request
from pathlib import Path
from subprocess import run

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
HEAD = "# Made by scripts/lock.py from constraints.txt: pip install --require-hashes -r requirements.lock\n"
SIMPLE = "application/vnd.pypi.simple.v1+json"
BUILD = ("hatchling", "editables")  # what an editable install of this package is built with


def resolved() -> dict[str, str]:
    """Name -> version of all that a development install takes."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), "-c", str(ROOT / "constraints.txt"), f"{ROOT}[dev,train]", *BUILD]
        run(command, check=True)
        found = json.loads(report.read_text())["install"]
    versions = {each["metadata"]["name"]: each["metadata"]["version"].partition("+")[0] for each in found}
    del versions["evenkeel"]
    return versions


def hashes_on_pypi(name: str, version: str) -> set[str]:
    """SHA-256 of the files of a release: wheels are `name-version-python-abi-platform.whl`."""
    request = urllib.request.Request(f"https://pypi.org/simple/{name}/", headers={"Accept": SIMPLE})
    with urllib.request.urlopen(request, timeout=60) as answer:
        files = json.load(answer)["files"]
    here = r"(-[\w.]+)?-(py3|py2\.py3|cp31[1-4]|cp3\d+-abi3)(-[\w.]+)*-(any|manylinux[\w.]*x86_64[\w.]*)\.whl"
    mine = re.compile(rf"[\w.-]+?-{re.escape(version)}({here}|\.tar\.gz|\.zip)", re.IGNORECASE)
    found = {file["hashes"]["sha256"] for file in files if mine.fullmatch(file["filename"]) and not file.get("yanked")}
    if not found:
        raise SystemExit(f"PyPI has no files of {name} {version}")
    return found


def main() -> None:
    """Writes the lock file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--wheel", action="append", default=[], type=Path, help="Wheel from elsewhere that is right too."
    )
    elsewhere: dict[str, set[str]] = {}
    for wheel in parser.parse_args().wheel:
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        elsewhere.setdefault(wheel.name.split("-")[0].lower(), set()).add(digest)
    lines = [HEAD]
    for name, version in sorted(resolved().items(), key=lambda each: each[0].lower()):
        normal = re.sub(r"[-_.]+", "-", name).lower()
        hashes = elsewhere.get(normal) or hashes_on_pypi(normal, version)
        lines.append(
            " \\\n    ".join([f"{normal}=={version}", *(f"--hash=sha256:{each}" for each in sorted(hashes))]) + "\n"
        )
    LOCK.write_text("".join(lines))


if __name__ == "__main__":
    main()
