"""Reads the configuration of `evenkeel edge`: a gateway whose light model runs here, and whose replica is elsewhere.

An edge node is the gateway with the policy *cascade*, so all fields of `evenkeel serve` hold but those that follow from
being one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from evenkeel.coding.answers.by_name import CascadeSettings
from evenkeel.errors import ConfigurationError
from evenkeel.schema import Problem, ProblemsError, Schema
from evenkeel.serving.config import CARD, NODES, SCHEMA, CodeConfig, NodesConfig, ServeConfig
from evenkeel.settings import UNKNOWN, FilePath, Form, Seconds, file_name, one_of, setting, shown

__all__ = ["edge_json_schema", "edge_problem", "read_edge_config"]

_SET_HERE = {"codes": "light", "backups": "light_workers", "replicas": "data_centre"}
_MADE_FROM: tuple[tuple[tuple[str | int, ...], str], ...] = (
    (("codes", 0, "model"), "light"),
    (("codes", 0), "light"),
    (("backups",), "light_workers"),
    (("replicas",), "data_centre"),
    (("policy", "certificate"), "certificate"),
)
_OF_POLICY = ("on_miss", "certificate", "deadline")


def _data_centre(raw: Any, plain: Any, folder: Path) -> Any:
    if not isinstance(raw, (str, list, tuple, Mapping)):
        raise ConfigurationError(f"expected an address or a list of them, found {shown(raw)}")
    return plain([raw] if isinstance(raw, str) else raw)


@dataclass(frozen=True)
class EdgeFields:
    """Holds the fields that an edge node has beside those of a gateway, or instead of them."""

    light: Annotated[Path, CARD] = setting(..., "Card of the light model, which runs here.")
    data_centre: Annotated[NodesConfig, NODES, Form(_data_centre, ({"type": "string"},))] = setting(
        ..., "Address of what answers when the light model is not sure, or a list of them, as `replicas` has them."
    )
    light_workers: Annotated[NodesConfig, NODES] = setting(
        NodesConfig(count=1), "Workers with the light model: how many to start here, or a list.", shown_default=1
    )
    on_miss: Annotated[bool, one_of({"degrade": True, "reject": False})] = setting(
        True, "At the deadline: the light model's answer, or none.", shown_default="degrade"
    )
    certificate: FilePath | None = setting(None, "Certificate of the promises, which `evenkeel certify` writes.")
    deadline_s: Seconds = setting(30.0, "Time for an item in all.", low=1e-3, high=86400)


_OWN = Schema(EdgeFields)


def read_edge_config(raw: Any, folder: Path = Path()) -> ServeConfig:
    """Reads the configuration of an edge node from a mapping.

    Args:
        raw: of YAML: the fields of `EdgeFields`, and those of `evenkeel serve` that do not follow from them.
        folder: paths in it are relative to this folder.

    Raises:
        ConfigurationError: names each field that is wrong.
    """
    if not isinstance(raw, Mapping):
        raise ProblemsError([Problem((), f"expected fields, found {shown(raw)}")])
    problems = [
        Problem((field,), f"an edge node's follow from {instead}; give that")
        for field, instead in _SET_HERE.items()
        if field in raw
    ]
    own_names = {file_name(name) for name in EdgeFields.__dataclass_fields__}
    policy = raw.get("policy", {})
    policy = dict(policy) if isinstance(policy, Mapping) else {"name": policy}
    if policy.setdefault("name", "cascade") != "cascade":
        problems.append(Problem(("policy",), f"an edge node's is cascade, found {shown(policy['name'])}"))
        policy["name"] = "cascade"
    for field in _OF_POLICY:
        if field in raw:
            if field in policy:
                problems.append(Problem((field,), f"is given twice, again as policy.{field}"))
            policy[field] = raw[field]
    policy.setdefault("on_miss", "degrade")
    served = {name: value for name, value in raw.items() if name not in own_names | _SET_HERE.keys()}
    own = config = None
    try:
        own = _OWN.read({name: raw[name] for name in raw if name in own_names}, folder)
    except ProblemsError as error:
        problems += error.problems
    try:
        config = SCHEMA.read({**served, "policy": policy}, folder)
    except ProblemsError as error:
        for one in error.problems:
            text = one.text
            if len(one.place) == 1 and text.startswith(UNKNOWN):
                text = f"{UNKNOWN}; known are {', '.join(edge_json_schema()['properties'])}"
            if one.place[-1] not in raw.keys() & _OF_POLICY:  # those are checked above, under their names here
                problems.append(Problem(one.place, text))
    if problems or own is None or config is None:
        raise ProblemsError(problems)
    codes = (CodeConfig(CascadeSettings(), own.light),)
    return replace(config, codes=codes, replicas=own.data_centre, backups=own.light_workers)


def edge_problem(problem: Problem) -> Problem:
    """Gives a problem of the configuration that was made here under the name of the field it was made from."""
    for made, own in _MADE_FROM:
        if problem.place[: len(made)] == made:
            return Problem((own, *problem.place[len(made) :]), problem.text)
    return problem


def edge_json_schema() -> dict[str, Any]:
    """Gives the JSON Schema of an edge node's file."""
    schema, own = SCHEMA.json_schema(), _OWN.json_schema()
    served = {name: field for name, field in schema["properties"].items() if name not in _SET_HERE}
    properties = {**own["properties"], **served}
    definitions = {**own["$defs"], **schema["$defs"]}
    return {**schema, "properties": properties, "required": own["required"], "$defs": definitions}
