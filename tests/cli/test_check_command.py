"""`evenkeel check` and `evenkeel schema`."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from evenkeel.cli.main import main


def run(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


def test_every_wrong_field_has_a_line_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    path.write_text("port: 1\npolicy:\n  name: hedge\n  copies: 9\nprot: 3\nreplicas: [nowhere]\n")
    result = run("check", str(path), "--json", str(tmp_path / "out.json"))
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert [line.removeprefix(f"{path}:").split(":")[0] for line in lines] == ["4", "5", "6"]
    assert lines[0].endswith("g.yaml:4: policy.copies: expected a whole number from 1 to 5, found 9")
    rows = json.loads((tmp_path / "out.json").read_text())["problems"]
    assert [(row["line"], row["field"]) for row in rows] == [(4, "policy.copies"), (5, "prot"), (6, "replicas[0]")]
    assert rows[0]["problem"] == "expected a whole number from 1 to 5, found 9"


def test_a_right_configuration_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    path.write_text("replicas: 3\n")
    result = run("check", str(path), "--json", str(tmp_path / "out.json"))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{path}: cifar10-base (3 replicas, 1 backups, collage+hedge): nothing is wrong\n"
    assert json.loads((tmp_path / "out.json").read_text())["problems"] == []


def test_each_of_several_models_has_a_line(tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    path.write_text("replicas: 3\nmodels:\n  - model: cifar10-base\n  - {model: cifar10-light, name: small}\n")
    result = run("check", str(path))
    assert result.exit_code == 0, result.stderr
    assert [line.removeprefix(f"{path}: ") for line in result.stdout.splitlines()] == [
        "cifar10-base (3 replicas, 1 backups, collage+hedge): nothing is wrong",
        "small (3 replicas, 1 backups, collage+hedge): nothing is wrong",
    ]


def test_what_strangers_can_do_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EVENKEEL_CLIENT_KEYS", raising=False)
    path = tmp_path / "g.yaml"
    path.write_text("host: 0.0.0.0\n")
    result = run("check", str(path), "--json", str(tmp_path / "out.json"))
    assert result.exit_code == 0
    assert f"{path}: warning: 0.0.0.0 is open: whoever reaches it can send requests" in result.stderr
    assert len(json.loads((tmp_path / "out.json").read_text())["warnings"]) == 2


def test_an_edge_nodes_problems_have_its_own_names(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("data_centre: http://10.0.0.5:8000\ncertificate: none.json\nlight: cifar10-base\n")
    result = run("check", str(path))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"{path}:2: certificate: certificate ")
    path.write_text("light: none.json\ndata_centre: [ftp://x]\nbackups: 2\n")
    assert [line.split(":")[1:3] for line in run("check", str(path)).stderr.splitlines()] == [
        ["2", " data_centre[0]"],
        ["3", " backups"],
    ]


@pytest.mark.parametrize("text", ["a: [", "port: 1\nport: 2", "- 1"])
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "g.yaml"
    path.write_text(text)
    result = run("check", str(path))
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


def test_the_schema_is_json_with_a_description_of_every_field(tmp_path: Path) -> None:
    served = json.loads(run("schema").stdout)
    assert run("schema", "--output", str(tmp_path / "s.json")).exit_code == 0
    assert json.loads((tmp_path / "s.json").read_text()) == served
    edge = json.loads(run("schema", "edge").stdout)
    assert edge["required"] == ["light", "data_centre"]
    assert not {"replicas", "backups", "codes"} & edge["properties"].keys()
    for schema in (served, edge):
        for section in (schema, *schema["$defs"].values()):
            for name, field in section["properties"].items():
                assert field.get("description"), name
    assert run("schema", "--output", str(tmp_path / "no" / "s.json")).exit_code == 2
