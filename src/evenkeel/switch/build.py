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

__all__ = ["bpf_object", "load"]

_SOURCES = Path(__file__).parent / "native"
# The processor's own instructions add bytes several times as fast; a compiler that does not know them goes without.
_FLAGS = (("-O3", "-march=native"), ("-O2",))
_BPF_FLAGS = ("-O2", "-g", "-target", "bpf", "-mcpu=v3", "-Wall", "-Wno-address-of-packed-member")
_CLANGS = ("clang", *(f"clang-{version}" for version in range(25, 12, -1)))
_TIMEOUT_S = 120.0


@cache
def load(name: str) -> ctypes.CDLL:
    """Gives the library made of `native/<name>.c`.

    Raises:
        ConfigurationError: there is no compiler, or it failed.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise ConfigurationError("the switch's C parts need a compiler; run: apt-get install gcc libc6-dev")
    commands = [(compiler, *flags, "-shared", "-fPIC") for flags in _FLAGS]
    return ctypes.CDLL(str(_built(f"{name}.c", ".so", commands)))


def bpf_object(name: str, defines: tuple[str, ...] = ()) -> Path:
    """Gives the BPF object made of `native/<name>.bpf.c`.

    Args:
        name: of the source.
        defines: `NAME=value`, for the preprocessor.

    Raises:
        ConfigurationError: there is no clang, or it failed.
    """
    # The newest first: clang 19 makes code a third faster than clang 14's.
    compiler = next(filter(None, map(shutil.which, _CLANGS[1:])), None) or shutil.which(_CLANGS[0])
    if compiler is None:
        raise ConfigurationError("the switch in the kernel is compiled by clang; run: apt-get install clang libbpf-dev")
    headers = f"-I/usr/include/{os.uname().machine}-linux-gnu"  # where Debian keeps asm/types.h
    command = (compiler, *_BPF_FLAGS, headers, *(f"-D{define}" for define in defines), "-c")
    return _built(f"{name}.bpf.c", ".bpf.o", [command])


def _built(source: str, ending: str, commands: list[tuple[str, ...]]) -> Path:
    """Gives the file that the first of the commands that works makes of a source, made now or before."""
    digest = hashlib.sha256()
    for path in sorted(_SOURCES.glob("*.[ch]")):
        digest.update(path.name.encode() + path.read_bytes())
    said = ""
    try:
        digest.update(repr(commands).encode() + _version(commands[0][0]) + _processor())
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evenkeel" / "native"
        made = folder / f"{source.split('.')[0]}-{digest.hexdigest()[:16]}{ending}"
        if made.exists():
            return made
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as half_done:
            half = Path(half_done) / made.name
            for command in commands:
                done = subprocess.run(
                    [*command, "-o", str(half), str(_SOURCES / source)],
                    capture_output=True,
                    text=True,
                    timeout=_TIMEOUT_S,
                    check=False,
                )
                if done.returncode == 0:
                    os.replace(half, made)  # whole, once it has its name
                    return made
                said = (done.stderr or done.stdout).strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigurationError(
            f"{source} could not be compiled: {error}. XDG_CACHE_HOME says where the result is kept"
        ) from error
    hint = "; run: apt-get install libbpf-dev" if "bpf/bpf_" in said else ""
    raise ConfigurationError(f"{source} could not be compiled by {commands[0][0]}{hint}: {said[:2000]}")


@cache
def _version(compiler: str) -> bytes:
    return subprocess.run([compiler, "--version"], capture_output=True, timeout=_TIMEOUT_S, check=False).stdout


def _processor() -> bytes:
    """Names what the compiler's own choice of instructions depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    chosen = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return (os.uname().machine + chosen).encode()
