"""Says how many workers Ray is to place, where, and with what of the cluster."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from evenkeel.errors import ConfigurationError

__all__ = ["STRATEGIES", "RayOptions"]

STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")


@dataclass(frozen=True)
class RayOptions:
    """Describes the workers of one kind on a Ray cluster.

    Attributes:
        count: workers that are placed as one group, all or none; their room stays reserved.
        address: of the cluster: `host:port` of its head, `auto` for the one that this machine is in, or `local` for one
            that is started here and ends with the gateway.
        resources: that each worker is given, by Ray's names; `CPU`, `GPU`, `memory` or the cluster's own.
        strategy: how the group is placed: PACK on few nodes if possible, SPREAD over many if possible, STRICT_PACK on
            one, STRICT_SPREAD each on a node of its own.
        fleet: a name under which several gateways share the workers, which then outlive each of them; "": they are
            this gateway's own and end with it.
        ship: models travel to the nodes through Ray; false: the same paths hold the same files there.
        runtime_env: of the actors, as Ray takes it; such as `{"pip": ["evenkeel"]}` where nodes do not have it.
    """

    count: int
    address: str = "auto"
    resources: Mapping[str, float] = field(default_factory=lambda: {"CPU": 1.0})
    strategy: str = "SPREAD"
    fleet: str = ""
    ship: bool = True
    runtime_env: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.count <= 4096:
            raise ConfigurationError(f"count: must be from 1 to 4096, found {self.count}")
        if self.strategy not in STRATEGIES:
            raise ConfigurationError(f"strategy: must be one of {', '.join(STRATEGIES)}, found {self.strategy!r}")
        if self.address.startswith("ray://"):
            raise ConfigurationError(
                "address: a gateway must be on a machine of the cluster, not a Ray client; join it with "
                "`ray start --address=HOST:6379 --num-cpus=0` and say auto"
            )
        if not self.address or len(self.address) > 255 or re.search(r"\s", self.address):
            raise ConfigurationError(f"address: expected auto, local or host:port, found {self.address!r}")
        if not re.fullmatch(r"[\w.-]{0,64}", self.fleet):
            raise ConfigurationError(f"fleet: letters, digits and ._- make a name, found {self.fleet!r}")
        if self.fleet and self.address == "local":
            raise ConfigurationError("fleet: a cluster that ends with this gateway cannot be shared; give its address")
        if not self.resources:
            raise ConfigurationError("resources: name at least one, such as CPU: 1")
        for name, amount in self.resources.items():
            if not 0 < amount < math.inf:
                raise ConfigurationError(f"resources.{name}: must be above 0, found {amount:g}")
            if name in ("cpu", "gpu", "Memory"):
                raise ConfigurationError(f"resources.{name}: Ray's names are CPU, GPU and memory")
        try:
            json.dumps(self.runtime_env)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"runtime_env: {error}") from error
