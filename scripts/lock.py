"""Writes requirements.lock: what a development install takes, with the hash of every file.

Run it with Python 3.11 on Linux x86-64 after constraints.txt has changed: `python scripts/lock.py`. Versions and
files are those that pip chooses there, so that the lock is for that Python and kind of machine; elsewhere use `make`
as it is.
"""

import json
import re
import sys
import tempfile
from pathlib import Path
from subprocess import run

ROOT = Path(__file__).parents[1]
HEAD = "# Made by scripts/lock.py from constraints.txt: pip install --require-hashes -r requirements.lock\n"
BUILD = ("hatchling", "editables")  # what an editable install of this package is built with


def main() -> None:
    """Has pip resolve an install without doing it, and writes what it chose."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), "-c", str(ROOT / "constraints.txt"), f"{ROOT}[dev,docs,train]", *BUILD]
        run(command, check=True)
        found = json.loads(report.read_text())["install"]
    lines = {}
    for each in found:
        name = re.sub(r"[-_.]+", "-", each["metadata"]["name"]).lower()
        if name != "evenkeel":
            version = each["metadata"]["version"].partition("+")[0]
            digest = each["download_info"]["archive_info"]["hashes"]["sha256"]
            lines[name] = f"{name}=={version} --hash=sha256:{digest}\n"
    (ROOT / "requirements.lock").write_text(HEAD + "".join(lines[name] for name in sorted(lines)))


if __name__ == "__main__":
    main()
