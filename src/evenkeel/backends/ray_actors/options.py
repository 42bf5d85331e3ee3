"""Says how many workers Ray is to place, where, and with what of the cluster."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from evenkeel.errors import ConfigurationError
from evenkeel.settings import FieldError, Form, check_fields, one_of, setting, shown

__all__ = ["STRATEGIES", "RayOptions"]

STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")


def _fields(raw: Any, plain: Any, folder: Path) -> dict[str, Any]:
    if not isinstance(raw, Mapping) or not all(isinstance(name, str) for name in raw):
        raise ConfigurationError(f"expected fields, found {shown(raw)}")
    return dict(raw)


_AMOUNTS = {"type": "object", "additionalProperties": {"type": "number", "exclusiveMinimum": 0}, "minProperties": 1}


@dataclass(frozen=True)
class RayOptions:
    """Describes the workers of one kind on a Ray cluster."""

    count: int = setting(..., "Workers that are placed as a group, all or none; their room is kept.", low=1, high=4096)
    address: str = setting(
        "auto",
        "Cluster: host:port of its head, auto for the one that this machine is in, or local for one that is started "
        "here and ends with the gateway.",
    )
    resources: Annotated[Mapping[str, float], Form(_fields, schema=_AMOUNTS)] = field(
        default_factory=lambda: {"CPU": 1.0},
        metadata={"description": "What each worker is given, by Ray's names: CPU, GPU, memory or the cluster's own."},
    )
    strategy: Annotated[str, one_of(STRATEGIES)] = setting(
        "SPREAD",
        "How the group is placed: PACK on few nodes if possible, SPREAD over many if possible, STRICT_PACK on one, "
        "STRICT_SPREAD each on a node of its own.",
    )
    fleet: str = setting(
        "", "Name under which several gateways share the workers, which outlive each of them; else they are its own."
    )
    ship: bool = setting(True, "Send models through Ray; false: the same paths hold the same files on every node.")
    runtime_env: Annotated[Mapping[str, Any], Form(_fields, schema={"type": "object"})] = field(
        default_factory=dict,
        metadata={"description": "Environment of the actors as Ray takes it, as {pip: [evenkeel]}."},
    )

    def __post_init__(self) -> None:
        """Refuses what Ray would not take, or not mean."""
        check_fields(self, "ray")
        if self.strategy not in STRATEGIES:
            raise FieldError("strategy", f"must be {' or '.join(STRATEGIES)}, found {shown(self.strategy)}")
        if self.address.startswith("ray://"):
            raise FieldError(
                "address",
                "a gateway must be on a machine of the cluster, which a Ray client is not; join it with `ray start "
                "--address=HOST:6379 --num-cpus=0` and say auto",
            )
        if not self.address or len(self.address) > 255 or re.search(r"\s", self.address):
            raise FieldError("address", f"expected auto, local or host:port, found {shown(self.address)}")
        if not re.fullmatch(r"[\w.-]{0,64}", self.fleet):
            raise FieldError("fleet", f"letters, digits and ._- make a name, found {shown(self.fleet)}")
        if self.fleet and self.address == "local":
            raise FieldError("fleet", "a cluster that ends with this gateway cannot be shared; give its address")
        if not self.resources:
            raise FieldError("resources", "name at least one, such as CPU: 1")
        for name, amount in self.resources.items():
            if name in ("cpu", "gpu", "Memory"):
                raise FieldError(("resources", name), "Ray's names are CPU, GPU and memory")
            if not isinstance(amount, (int, float)) or isinstance(amount, bool) or not 0 < amount < math.inf:
                raise FieldError(("resources", name), f"expected a number above 0, found {shown(amount)}")
        try:
            json.dumps(self.runtime_env)
        except (TypeError, ValueError) as error:
            raise FieldError("runtime_env", str(error)) from error
