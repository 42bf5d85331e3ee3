"""`evenkeel demo edge` in short, and `evenkeel demo` beside it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from evenkeel.bench.serving import command
from evenkeel.cli.main import main
from evenkeel.edge.demo import decoded_images
from evenkeel.models import shipped
from evenkeel.models.cards import load_card
from evenkeel.models.digest import card_digest
from evenkeel.promises.certificate import load_certificate
from evenkeel.promises.promise import Promise


def test_the_demo_compares_four_ways_to_answer(tmp_path: Path) -> None:
    rows, figure = tmp_path / "rows.json", tmp_path / "edge.png"
    arguments = ["demo", "edge", "--images", "45", "--rate", "60", "--delay", "2", "--deadline", "2000"]
    result = CliRunner().invoke(main, [*arguments, "--json", str(rows), "--figure", str(figure)])
    assert result.exit_code == 0, result.output
    found = {row["who"]: row for row in json.loads(rows.read_text())["rows"]}
    assert list(found) == ["edge", "data centre", "edge first", "edge first, link gone"]
    light = load_card(shipped.card_path("cifar10-light")).relative_cost
    assert (found["edge"]["cost"], found["edge"]["sent_bytes"]) == (light, 0)
    assert found["data centre"]["cost"] == pytest.approx(1.0, abs=0.1)
    assert light <= found["edge first"]["cost"] < 0.5
    assert found["edge first"]["failed"] == found["edge first, link gone"]["failed"] == 0
    assert min(row["right"] for row in found.values()) > 0.7
    assert figure.stat().st_size > 10_000
    assert "certificate" in result.output


def test_images_that_came_in_part_are_shown_as_they_came() -> None:
    for image in decoded_images(1):
        holes = (image.came == 128).all(axis=2).mean()
        assert holes == pytest.approx(image.lost, abs=0.05)
        gone = np.abs(image.came.astype(float) - image.sent).mean()
        assert np.abs(image.filled.astype(float) - image.sent).mean() < gone or not image.lost


def test_the_shipped_certificate_is_for_the_shipped_models_and_keeps_what_the_demo_promises() -> None:
    certificate = load_certificate(shipped.CERTIFICATE)
    paths = [shipped.card_path(name) for name in ("cifar10-light", "cifar10-base")]
    certificate.check_models({load_card(path).name: card_digest(load_card(path), path.parent) for path in paths})
    promise = Promise("min_accuracy", shipped.PROMISED)
    stricter = promise.stricter(shipped.MISSES)
    assert certificate.keeping(promise)
    assert stricter is not None
    assert certificate.keeping(stricter)


def test_the_serving_demo_is_what_demo_does_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(command, "run_demo", seen.append)
    assert CliRunner().invoke(main, ["demo", "--seconds", "3"]).exit_code == 0
    assert [one.seconds for one in seen] == [3]
    assert CliRunner().invoke(main, ["demo", "edge", "--loss", "2"]).exit_code == 2
