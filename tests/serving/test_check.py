"""What is wrong with a configuration beyond its fields."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from certificates import DAY, Authority
from evenkeel.models.cards import load_card, save_card
from evenkeel.models.shipped import card_path
from evenkeel.serving.check import find_problems
from evenkeel.serving.config import find_lines, read_config

BASE, COLLAGE = card_path("cifar10-base"), card_path("cifar10-collage-2x2")
ADDRESS = "tcp://127.0.0.1:7000"


def problems(folder: Path, **raw: Any) -> list[str]:
    return [str(one) for one in find_problems(read_config(raw, folder))]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for path in (BASE, COLLAGE):
        shutil.copy(path, tmp_path)
        shutil.copy(path.with_suffix(".onnx"), tmp_path)
    return tmp_path


def test_nothing_is_wrong_with_what_is_shipped(models: Path) -> None:
    (models / "k").write_text("k" * 32)
    (models / "k").chmod(0o600)
    assert problems(models) == []
    mine = {"model": BASE.name, "codes": ["replicate", COLLAGE.name]}
    assert problems(models, **mine, replicas=[ADDRESS], worker_key_file="k", host=f"unix:{models}/s") == []


def test_all_that_is_wrong_is_found_at_once(models: Path) -> None:
    codes = ["no.json", {"kind": "collage:grid=3", "model": COLLAGE.name}, {"kind": "cheap", "model": COLLAGE.name}]
    found = problems(models, model=BASE.name, codes=codes, worker_key_file="none", host="unix:/nowhere/socket")
    assert [re.sub(r"(card |file )/\S*/", r"\1", one).partition(" cannot")[0] for one in found] == [
        "codes[0].model: model card no.json",
        "codes[1]: cifar10-collage-2x2 is for grid=2, not grid=3",
        "codes[2]: cheap needs the card of a classifier, but cifar10-collage-2x2 is a collage",
        "worker_key_file: key file none",
        "host: /nowhere/socket",
    ]


def test_files_are_those_that_the_cards_were_written_for(models: Path) -> None:
    (models / "cifar10-base.onnx").write_bytes(b"another")
    (models / "cifar10-collage-2x2.onnx").unlink()
    mine = {"model": BASE.name, "codes": [COLLAGE.name]}
    wrong, missing = problems(models, **mine)
    assert re.match(r"model: model card .*: field 'sha256' is .*, but .* has ", wrong)
    assert re.match(r"codes\[0\].model: model card .* cannot be read: No such file", missing)
    # Workers elsewhere have the files; here only the cards are needed.
    assert problems(models, **mine, replicas=[ADDRESS], backups=[ADDRESS]) == []
    assert len(problems(models, **mine, replicas=[ADDRESS])) == 2  # a backup runs the classifier, too
    assert len(problems(models, **mine, replicas=1, policy="hedge")) == 1


def test_a_callable_replaces_a_file_and_must_be_there(models: Path) -> None:
    (models / "cifar10-base.onnx").unlink()
    (found,) = problems(models, model=BASE.name, run="python:mine.py:make")
    assert re.match(r"run: .*mine\.py cannot be read", found)
    (models / "mine.py").touch()
    assert problems(models, model=BASE.name, run="python:mine.py:make") == []


def test_classes_must_be_those_of_the_classifier(models: Path) -> None:
    card = load_card(COLLAGE)
    save_card(replace(card, classes=("cat", *card.classes[1:])), models / "other.json")
    (found,) = problems(models, model=BASE.name, codes=["other.json"])
    assert found.startswith("codes[0]: cifar10-collage-2x2 and cifar10-base must have the same classes")


def test_addresses_beyond_this_machine_need_a_key(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EVENKEEL_WORKER_KEY", raising=False)
    (found,) = problems(models, replicas=["tcp://10.0.0.7:7000"])
    assert found.startswith("replicas: tcp://10.0.0.7:7000 can be reached from other machines")
    (found,) = problems(models, backups=["http://10.0.0.7"], replicas=1)
    assert found.startswith("backups.urls: a remote server holds one model")
    assert problems(models, replicas=["tcp://10.0.0.7:7000"], no_worker_key=True) == []


def test_a_certificate_must_fit(models: Path) -> None:
    (found,) = problems(models, policy="cascade(certificate=none.json)")
    assert found.startswith("policy.certificate: certificate ")
    (models / "c.json").write_text(json.dumps({"evenkeel_certificate": 1}))
    (found,) = problems(models, policy="cascade(certificate=c.json)")
    assert "c.json" in found


def test_keys_and_certificates_must_be_readable(models: Path) -> None:
    (models / "ca.pem").write_text("no certificate")
    tls = {"ca": "ca.pem", "certificate": "none.pem"}
    found = problems(models, keys={"file": "none"}, tls={"certificate": "none.pem"}, worker_tls=tls, remote_tls=tls)
    assert [one.partition(":")[0] for one in found] == ["keys.file", "tls", "worker_tls", "remote_tls"]


def test_names_are_looked_up_when_asked(models: Path) -> None:
    config = read_config({"replicas": ["http://here.invalid:80", "http://127.0.0.1:80"], "host": "there.invalid"})
    found = [str(one).partition(":")[0] for one in find_problems(config, resolve=True)]
    assert found == ["replicas", "host"]
    assert find_problems(config) == []


def test_a_field_is_found_in_its_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("a: 1\nb:\n  - x\n  - {c: 2,\n     d: 3}\nlong:\n  deep:\n    e: 5\n")
    line = find_lines(path)
    places = [
        ("a",),
        ("b",),
        ("b", 0),
        ("b", 1),
        ("b", 1, "d"),
        ("b", 7),
        ("long", "deep", "e"),
        ("long", "no"),
        ("no",),
    ]
    assert [line(place) for place in places] == [1, 2, 3, 4, 5, 2, 8, 6, 1]
    assert line(()) == 1
    path.write_text("")
    assert find_lines(path)(("a",)) == 1


def test_keys_and_certificates_are_read_as_the_server_would(models: Path) -> None:
    authority = Authority(models)
    authority.sign("good")
    authority.sign("old", begins=-2 * DAY, ends=-DAY)
    good = {"certificate": "good.pem", "key": "good.key"}
    (models / "keys").write_text("alice short")
    right = {"tls": good | {"client_ca": "authority.pem"}, "worker_tls": good | {"ca": "authority.pem"}}
    assert problems(models, **right, remote_tls={"ca": "authority.pem"}) == []
    found = problems(
        models,
        keys={"file": "keys"},
        tls={"certificate": "old.pem", "key": "old.key"},
        worker_tls={"certificate": "good.pem", "key": "old.key", "ca": "authority.pem"},
        remote_tls={"ca": "none.pem"},
        remote_credentials={"bearer_file": "none"},
    )
    assert [one.partition(": ")[0] for one in found] == [
        "keys.file",
        "tls",
        "worker_tls",
        "remote_tls",
        "remote_credentials",
    ]
    assert "a key has 16 to 1024" in found[0]
    assert "certificate has expired" in found[1]
    assert "is not that of certificate" in found[2]
    assert all("cannot be read" in one for one in found[3:])
