"""What `deploy/` holds for other systems: every query names metrics and labels that a gateway exposes."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from evenkeel.serving.front.served import ServedModel
from evenkeel.serving.metrics import Metrics
from gateway_helpers import Scene
from http_helpers import make_card

ROOT = Path(__file__).parents[1]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "evenkeel.json").read_text(encoding="utf-8"))
RULES = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text(encoding="utf-8"))
DOCUMENTED = (ROOT / "docs" / "how-to" / "watch.md").read_text(encoding="utf-8")

# What Prometheus adds, and what a query makes itself.
GIVEN_LABELS = {"instance", "job", "le"}


class Promises:
    alarms = degraded = unshown = 1


@pytest.fixture(scope="module")
def exposed():
    """Metric -> its labels, of a gateway on which everything has happened."""
    scene = Scene(replicas=3)
    scene.slow(0)
    scene.send(20)
    scene.run()
    scene.gateway.promises = Promises()
    scene.stats.ejections["slow"] = 1
    model = ServedModel("toy", "1", make_card(), scene.gateway)
    model.times.add(200, 0.0)
    text = Metrics([model], lambda: {("toy", "near"): {"sent": 1}}, Counter({200: 1}))().decode()
    return {
        name: set(re.findall(r'(\w+)="', labels or ""))
        for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? \S+$", text, re.MULTILINE)
    }


def queries():
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield f"panel {panel['title']}", target["expr"]
    for group in RULES["groups"]:
        for rule in group["rules"]:
            yield f"alert {rule['alert']}", rule["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield f"variable {variable['name']}", variable["query"]["query"]


def named(query):
    return set(re.findall(r"\b(?:evenkeel|process)_\w+", query))


@pytest.mark.parametrize(("where", "query"), list(queries()), ids=lambda text: text[:40])
def test_a_query_names_metrics_that_exist_with_labels_that_they_have(exposed, where, query):
    names = named(query)
    assert names
    assert names <= exposed.keys(), where
    labels = set.intersection(*(exposed[name] for name in names)) | GIVEN_LABELS
    selected = {label for braces in re.findall(r"\{([^}]*)\}", query) for label in re.findall(r"(\w+)\s*[=!~]", braces)}
    grouped = {label.strip() for inner in re.findall(r"\bby \(([^)]*)\)", query) for label in inner.split(",")}
    assert selected | grouped <= labels, where


def test_a_query_of_what_does_not_exist_would_be_found(exposed):
    assert not named("rate(evenkeel_item_total[5m])") <= exposed.keys()
    assert {"model", "source", "le"} == exposed["evenkeel_item_duration_seconds_bucket"]


def test_the_dashboard_can_be_imported_anywhere():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    assert {target["datasource"]["uid"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())} == {
        "${datasource}"
    }
    cells = Counter()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells.update((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"]))
    assert max(cells.values()) == 1, "panels lie on each other"


def test_an_alert_says_how_serious_it_is_and_what_it_is_about(exposed):
    for group in RULES["groups"]:
        names = [rule["alert"] for rule in group["rules"]]
        assert len(set(names)) == len(names)
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("info", "warning", "critical")
            known = set().union(*(exposed[name] for name in named(rule["expr"]))) | GIVEN_LABELS
            text = " ".join(rule["annotations"].values())
            assert set(re.findall(r"\$labels\.(\w+)", text)) <= known
            assert rule["annotations"]["summary"]


def test_the_page_about_it_names_metrics_that_exist(exposed):
    plain = {re.sub(r"_(?:bucket|count|sum)$", "", name) for name in exposed}
    assert named(DOCUMENTED) - exposed.keys() - plain == set()
