"""Reads the configuration of `evenkeel edge`: a gateway whose light model runs here, and whose replica is elsewhere.

An edge node is the gateway with the policy *cascade*, so all fields of `evenkeel serve` hold but those that follow from
being one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evenkeel.errors import ConfigurationError
from evenkeel.serving.config import ServeConfig, read_config

__all__ = ["read_edge_config"]

_OWN = ("light", "light_workers", "data_centre", "on_miss", "certificate", "deadline")
_SET_HERE = {"codes": "light", "backups": "light_workers", "replicas": "data_centre"}
_OF_POLICY = ("on_miss", "certificate", "deadline")


def read_edge_config(raw: Any, folder: Path = Path()) -> ServeConfig:
    """Reads the configuration of an edge node from a mapping.

    Args:
        raw: of YAML. `light` is the card of the model that runs here, `data_centre` an address or a list of them, as
            `replicas` has them; `light_workers`, `on_miss`, `certificate` and `deadline` may be given; the rest is as
            for `evenkeel serve`.
        folder: paths in it are relative to this folder.

    Raises:
        ConfigurationError: names the field.
    """
    if not isinstance(raw, Mapping):
        raise ConfigurationError(f"configuration: expected fields, found {raw!r}")
    for field, instead in _SET_HERE.items():
        if field in raw:
            raise ConfigurationError(f"{field}: an edge node's follow from {instead}; give that")
    for field in ("light", "data_centre"):
        if field not in raw:
            raise ConfigurationError(f"{field}: is missing")
    policy = raw.get("policy", {})
    policy = dict(policy) if isinstance(policy, Mapping) else {"name": policy}
    if policy.setdefault("name", "cascade") != "cascade":
        raise ConfigurationError(f"policy: an edge node's is cascade, found {policy['name']!r}")
    for field in _OF_POLICY:
        if field in raw:
            if field in policy:
                raise ConfigurationError(f"{field}: is given twice, again as policy.{field}")
            policy[field] = raw[field]
    policy.setdefault("on_miss", "degrade")
    elsewhere = raw["data_centre"]
    if isinstance(elsewhere, int):
        raise ConfigurationError(f"data_centre: expected an address or a list of them, found {elsewhere!r}")
    served = {field: value for field, value in raw.items() if field not in _OWN}
    served |= {
        "codes": [{"kind": "cascade", "model": raw["light"]}],
        "backups": raw.get("light_workers", 1),
        "replicas": [elsewhere] if isinstance(elsewhere, str) else elsewhere,
        "policy": policy,
    }
    try:
        return read_config(served, folder)
    except ConfigurationError as error:
        raise ConfigurationError(_in_its_words(str(error))) from None


def _in_its_words(message: str) -> str:
    """Gives a message about a field that was made here under the name by which it was given."""
    for made, given in (("codes[0].model", "light"), ("backups", "light_workers"), ("replicas", "data_centre")):
        if message.startswith(made):
            return given + message[len(made) :]
    return message
