"""Compiles the C parts on first use, and keeps what came out in the user's cache."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from evenkeel.errors import ConfigurationError

__all__ = ["load"]

_SOURCES = Path(__file__).parent / "native"
# The processor's own instructions add bytes several times as fast; a compiler that does not know them goes without.
_FLAGS = (("-O3", "-march=native"), ("-O2",))
_TIMEOUT_S = 120.0


@cache
def load(name: str) -> ctypes.CDLL:
    """Gives the library made of `native/<name>.c`.

    Raises:
        ConfigurationError: there is no compiler, or it failed.
    """
    sources = sorted(_SOURCES.glob("*.[ch]"))
    digest = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in sources))
    digest.update(_processor().encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evenkeel" / "native"
    library = folder / f"{name}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        _compile(_SOURCES / f"{name}.c", library)
    return ctypes.CDLL(str(library))


def _processor() -> str:
    """Names what the compiler's own choice of instructions depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return os.uname().machine + next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(source: Path, library: Path) -> None:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise ConfigurationError("the switch's C parts need a compiler; run: apt-get install gcc libc6-dev")
    said = ""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            half = Path(folder) / library.name
            for flags in _FLAGS:
                command = [compiler, *flags, "-shared", "-fPIC", "-o", str(half), str(source)]
                done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
                if done.returncode == 0:
                    os.replace(half, library)  # whole, once it has its name
                    return
                said = (done.stderr or done.stdout).strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigurationError(f"{source.name} could not be compiled: {error}") from error
    raise ConfigurationError(f"{source.name} could not be compiled by {compiler}: {said[:2000]}")
