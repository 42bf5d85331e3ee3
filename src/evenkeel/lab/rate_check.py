"""Measures what a lab's links really carry, beside the wanted rate."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from evenkeel.errors import LabError
from evenkeel.lab import probe
from evenkeel.lab.topology import Command, Topology

__all__ = ["RateCheck", "check_rate"]

_PORT = 29400
_SECONDS = 1.0
_BITS, _MAX_SECONDS = 2.5e7, 3.0  # on a slow link a second is too few packets to measure
_WARM_S = 0.3
_TIMEOUT_S = 45.0
# Of the wanted rate, the payload of full packets is 1448/1514. Acknowledgements for the other way take another 2 %, and
# TCP does not quite fill a slow link.
_LOW, _HIGH = 0.8, 1.02


@dataclass(frozen=True)
class RateCheck:
    """Holds the payload rates between the first two hosts, both ways at once."""

    wanted_bps: float
    there_bps: float  # from host0 to host1
    back_bps: float
    round_trip_s: float

    def text(self) -> str:
        """Says it in one line for people."""
        wanted = _rate(self.wanted_bps) if math.isfinite(self.wanted_bps) else "unlimited"
        return (
            f"{wanted} links carry {_rate(self.there_bps)} there and {_rate(self.back_bps)} back at once (payload), "
            f"round trip {self.round_trip_s * 1e3:.2g} ms"
        )

    def warning(self) -> str | None:
        """Says what to mind if the rate is too far off; None if it is right, or if no rate was wanted."""
        if not math.isfinite(self.wanted_bps):
            return None
        low, high = sorted((self.there_bps, self.back_bps))
        if high > _HIGH * self.wanted_bps:
            return f"the link carries {high / self.wanted_bps:.0%} of the wanted rate: it is not shaped as it should be"
        if low < _LOW * self.wanted_bps:
            return (
                f"the link carries {low / self.wanted_bps:.0%} of the wanted rate: the machine is too busy or too slow "
                "for it, or packets get lost; do not trust times from this lab"
            )
        return None


def check_rate(topology: Topology, prefixes: tuple[Command, Command]) -> RateCheck:
    """Measures for a second and a half.

    Args:
        topology: with two hosts or more.
        prefixes: what a command line begins with to be run in host 0, and in host 1.

    Raises:
        LabError: the two hosts did not reach each other.
    """
    warm_s = _WARM_S + 20 * topology.delay_s  # a window grows by round trips
    seconds = min(max(_SECONDS, _BITS / topology.rate_bps), _MAX_SECONDS)
    numbers = (str(_PORT), str(warm_s), str(seconds))
    sides = []
    try:
        for prefix, role in zip(prefixes, ("listen", "connect"), strict=True):
            script = (sys.executable, "-I", str(Path(probe.__file__)), role, topology.address(0), *numbers)
            sides.append(
                subprocess.Popen(
                    (*prefix, *script),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                )
            )
        seen = [_result(side) for side in sides]
    finally:
        for side in sides:
            if side.poll() is None:
                side.kill()
            side.communicate()
    return RateCheck(
        wanted_bps=topology.rate_bps,
        there_bps=seen[1]["received_bps"],
        back_bps=seen[0]["received_bps"],
        round_trip_s=seen[1]["round_trip_s"],
    )


def _result(side: subprocess.Popen[bytes]) -> dict[str, float]:
    try:
        out, err = side.communicate(timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise LabError(f"the rate check did not end within {_TIMEOUT_S:g} s; leave it out with --no-check") from None
    if side.returncode:
        said = err.decode(errors="replace").strip().splitlines()
        raise LabError(f"the rate check failed: {said[-1] if said else f'exit code {side.returncode}'}")
    result: dict[str, float] = json.loads(out)
    return result


def _rate(bps: float) -> str:
    for unit, size in (("Gbit/s", 1e9), ("Mbit/s", 1e6)):
        if bps >= size:
            return f"{bps / size:.3g} {unit}"
    return f"{bps / 1e3:.3g} kbit/s"
