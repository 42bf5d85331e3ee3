"""Every configuration in the documentation and the examples fits the schema, and `check` finds nothing wrong."""

import re
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from certificates import Authority
from evenkeel.cli.check import is_edge
from evenkeel.edge.node import edge_json_schema, read_edge_config
from evenkeel.models.shipped import CERTIFICATE, card_path
from evenkeel.schema import ProblemsError
from evenkeel.serving.check import find_problems
from evenkeel.serving.config import SCHEMA, read_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
BLOCKS = [
    (f"{page.relative_to(ROOT)}:{number}", text)
    for page in PAGES
    for number, text in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
    if not re.search(r"^(apiVersion|kind):", text, re.MULTILINE)  # what Kubernetes reads
]
BLOCKS += [
    (str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "examples").rglob("*.yaml"))
    if not re.search(r"^(apiVersion|kind):", path.read_text(encoding="utf-8"), re.MULTILINE)
]
# A file that shows every field is not one that somebody would serve: its certificate is of another policy.
WRONG_ON_PURPOSE = {"docs/how-to/serve.md:0": ["policy.certificate"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that documents speak of: cards, a certificate and keys."""
    folder = tmp_path_factory.mktemp("documented")
    for model, called in (("cifar10-base", "accurate"), ("cifar10-light", "light")):
        shutil.copy(card_path(model), folder / f"{called}.json")
        shutil.copy(card_path(model).with_suffix(".onnx"), folder)
    for name in ("certificate.json", "promised.json"):
        shutil.copy(CERTIFICATE, folder / name)
    for name in ("worker.key", "camera.key", "link.key", "remote.key", "clients.keys"):
        (folder / name).write_text("k" * 32)
        (folder / name).chmod(0o600)
    authority = Authority(folder, "ca")
    for name in ("server", "gateway"):
        authority.sign(name)
    shutil.copytree(folder, folder / "trust")  # where docs/how-to/trust.md has them
    for name in ("worker.secret", "upstream.key"):
        shutil.copy(folder / "remote.key", folder / "trust" / name)
    return folder


def test_there_are_configurations_to_check() -> None:
    assert len(BLOCKS) >= 5
    assert {is_edge(yaml.safe_load(text)) for _, text in BLOCKS} == {True, False}


@pytest.mark.parametrize(("where", "text"), BLOCKS, ids=[where for where, _ in BLOCKS])
def test_each_fits_the_schema_and_is_found_right(where: str, text: str, folder: Path) -> None:
    raw = yaml.safe_load(text)
    edge = is_edge(raw)
    jsonschema.Draft202012Validator(edge_json_schema() if edge else SCHEMA.json_schema()).validate(raw)
    config = (read_edge_config if edge else read_config)(raw, folder)
    found = find_problems(config)
    assert [str(one).partition(": ")[0] for one in found] == WRONG_ON_PURPOSE.get(where, []), found


@pytest.mark.parametrize(
    "raw",
    [
        {"prot": 1}, {"port": "80"}, {"port": True}, {"port": 70000}, {"port": 80.5}, {"max_body": "much"},
        {"replicas": True}, {"replicas": "x"}, {"replicas": {"cuont": 1}}, {"replicas": [1]}, {"codes": "collage"},
        {"codes": [{"model": "a.json"}]}, {"policy": "colage"}, {"policy": {"fill_after": {"flor": 1}}},
        {"policy": {"light_first": True}}, {"policy": {"fill_after": {"fixed": 1}}}, {"policy": {"deadline": "soon"}},
        {"policy": {"on_miss": "panic"}}, {"health": {"window": 0}}, {"health": {"pause": "1 hour"}}, {"name": ""},
        {"promises": {"default": {"min_accuracy": 2}}}, {"promises": {"default": {}}}, {"model": "no-such"},
        {"host": []},
        {"no_worker_key": "yes"}, {"lossy": {"payload": 10}},
    ],
)  # fmt: skip
def test_what_is_refused_does_not_fit_the_schema_either(raw: dict[str, Any]) -> None:
    with pytest.raises(ProblemsError):
        read_config(raw)
    assert not jsonschema.Draft202012Validator(SCHEMA.json_schema()).is_valid(raw)


@pytest.mark.parametrize(
    "raw",
    [
        {}, {"port": 0}, {"max_body": 5}, {"max_body": "5KiB"}, {"drain": 2}, {"drain": "1.5min"}, {"drain": "20us"},
        {"replicas": 3}, {"replicas": ["http://x"]}, {"replicas": {"count": 1, "urls": ["http://x"]}},
        {"host": ["::", "a"]},
        {"codes": ["berrut:k=8", {"kind": "replicate", "items": 3}, "mine.json"]}, {"policy": "hedge"},
        {"policy": "collage(certificate=c.json)"}, {"policy": {"name": "none", "fill_after": None}},
        {"policy": {"fill_after": {"at": "p95", "floor": "1ms"}, "hedge_after": 0.2}},
        {"policy": {"hedge_after": "never"}},
        {"policy": {"certificate": "c.json"}, "promises": {"default": {"min_accuracy": 0.8, "guarantee": 0.9}}},
        {"health": {"pause": "20ms"}}, {"lossy": {"parity": 1}}, {"policy": {"default_label": 3, "on_miss": "degrade"}},
    ],
)  # fmt: skip
def test_what_is_read_fits_the_schema_too(raw: dict[str, Any]) -> None:
    read_config(raw)
    jsonschema.Draft202012Validator(SCHEMA.json_schema()).validate(raw)


def test_the_schemas_are_schemas_and_their_defaults_fit_them() -> None:
    for schema in (SCHEMA.json_schema(), edge_json_schema()):
        jsonschema.Draft202012Validator.check_schema(schema)
        for section in (schema, *schema["$defs"].values()):
            for name, field in section["properties"].items():
                if "default" in field:
                    one = {"$defs": schema["$defs"], **field}
                    assert jsonschema.Draft202012Validator(one).is_valid(field["default"]), name
