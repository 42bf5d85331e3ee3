"""The manifests of deploy/kubernetes are what Kubernetes takes, fit each other, and start what evenkeel understands."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from evenkeel.backends.worker.config import config_from
from evenkeel.models.shipped import NAMES
from evenkeel.serving.check import find_problems
from evenkeel.serving.config import read_config

DEPLOY = Path(__file__).parents[1] / "deploy"
FOLDERS = ("base", "monitored")
CUSTOM = {("monitoring.coreos.com/v1", "PodMonitor")}  # kinds that Kubernetes itself does not know


def rendered(folder: Path) -> list[dict[str, Any]]:
    """What `kubectl kustomize` gives for such a folder: its resources, and patches that remove."""
    wanted = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert not wanted.keys() - {"apiVersion", "kind", "resources", "patches"}
    found: list[dict[str, Any]] = []
    for name in wanted["resources"]:
        path = folder / name
        found += rendered(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for patch in wanted.get("patches", ()):
        (one,) = [it for it in found if (it["kind"], it["metadata"]["name"]) == tuple(patch["target"].values())]
        for step in json.loads(patch["patch"]):
            assert step["op"] == "remove"
            *inner, last = step["path"].strip("/").split("/")
            for name in inner:
                one = one[name]
            del one[last]
    return found


ALL = {name: rendered(DEPLOY / "kubernetes" / name) for name in FOLDERS}
OBJECTS = ALL["monitored"]


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [one for one in OBJECTS if one["kind"] == kind]


DEPLOYMENTS = {one["metadata"]["name"]: one["spec"]["template"] for one in of_kind("Deployment")}


def container(pod: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod["spec"]["containers"]
    return only


def settings() -> dict[str, Any]:
    (config,) = of_kind("ConfigMap")
    return yaml.safe_load(config["data"]["gateway.yaml"])


def check(value: Any, kind: str, models: Any, place: str) -> None:
    """Refuses what a type of Kubernetes' OpenAPI description does not have, through and through."""
    if inner := re.fullmatch(r"[Ll]ist\[(.*)\]", kind):
        assert isinstance(value, list), f"{place}: no list"
        for number, one in enumerate(value):
            check(one, inner[1], models, f"{place}[{number}]")
    elif inner := re.fullmatch(r"[Dd]ict[\[(]str, (.*)[\])]", kind):
        assert isinstance(value, dict), f"{place}: no mapping"
        for name, one in value.items():
            assert isinstance(name, str), place
            check(one, inner[1], models, f"{place}.{name}")
    elif kind in ("str", "int", "bool", "float", "object", "datetime"):
        # `object` stands for numbers or texts: ports, quantities.
        allowed = {"str": str, "int": int, "bool": bool, "float": (int, float)}.get(kind, (str, int))
        assert isinstance(value, allowed), f"{place}: {value!r} is no {kind}"
        assert kind == "bool" or not isinstance(value, bool), f"{place}: {value!r} is no {kind}"
    else:
        model = getattr(models, kind)
        names = {there: here for here, there in model.attribute_map.items()}
        assert isinstance(value, dict), f"{place}: no fields"
        assert not value.keys() - names.keys(), f"{place}: {kind} has no {value.keys() - names.keys()}"
        for name, one in value.items():
            check(one, model.openapi_types[names[name]], models, f"{place}.{name}")
        model(**{names[name]: one for name, one in value.items()})  # refuses what is missing


def kind_of(one: dict[str, Any]) -> str:
    group, _, version = one["apiVersion"].rpartition("/")
    return f"{version.capitalize()}{one['kind']}" if group != "rbac.authorization.k8s.io" else f"V1{one['kind']}"


def test_all_is_what_kubernetes_knows() -> None:
    models = pytest.importorskip("kubernetes.client.models")
    for one in OBJECTS:
        if (one["apiVersion"], one["kind"]) not in CUSTOM:
            check(one, kind_of(one), models, one["metadata"]["name"])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "template", "spec", "terminationGracePeriod"), 3),
        (("spec", "template", "spec", "terminationGracePeriodSeconds"), "45"),
        (("spec", "replicas"), True),
        (("spec", "template", "spec", "containers"), {}),
        (("spec", "template", "spec", "containers"), [{"image": "evenkeel"}]),
    ],
)
def test_the_check_itself_finds_what_is_wrong(path: tuple[str, ...], value: object) -> None:
    models = pytest.importorskip("kubernetes.client.models")
    base = rendered(DEPLOY / "kubernetes" / "base")
    one = next(it for it in base if (it["kind"], it["metadata"]["name"]) == ("Deployment", "evenkeel-gateway"))
    inner = one
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    with pytest.raises((AssertionError, ValueError)):
        check(one, kind_of(one), models, "deployment")


def test_names_are_used_once_and_objects_are_labelled() -> None:
    for objects in ALL.values():
        names = [(one["kind"], one["metadata"]["name"]) for one in objects]
        assert len(set(names)) == len(names)
        assert all(one["metadata"]["labels"]["app.kubernetes.io/name"] == "evenkeel" for one in objects)
        assert not any("namespace" in one["metadata"] for one in objects)  # `kubectl -n` says which


def test_the_gateways_configuration_is_right_but_for_its_keys() -> None:
    config = read_config(settings())
    assert {one.place[0] for one in find_problems(config)} <= {"worker_key_file", "keys", "replicas", "backups"}
    services = {one["metadata"]["name"]: one["spec"] for one in of_kind("Service")}
    for nodes in (config.replicas, config.backups):
        assert nodes.count == 0
        for found in nodes.discover:
            name, port = re.fullmatch(r"kubernetes://([a-z-]+):([a-z]+)", found).groups()
            assert services[name]["clusterIP"] == "None"
            assert port in [one["name"] for one in services[name]["ports"]]
    assert config.host == ("0.0.0.0",)
    (port,) = container(DEPLOYMENTS["evenkeel-gateway"])["ports"]
    assert port["containerPort"] == config.port


@pytest.mark.parametrize("name", ["evenkeel-replicas", "evenkeel-backups"])
def test_workers_understand_their_command_line_and_hold_what_the_gateway_wants(name: str) -> None:
    command, *arguments = container(DEPLOYMENTS[name])["args"]
    assert command == "worker"
    worker = config_from(arguments, "evenkeel worker")
    raw = settings()
    models = {raw["model"], *(code for code in raw["codes"] if code in NAMES)}
    assert set(worker.models) == (models if name == "evenkeel-backups" else {raw["model"]})
    assert worker.listen == f"tcp://0.0.0.0:{container(DEPLOYMENTS[name])['ports'][0]['containerPort']}"
    assert worker.key_file == raw["worker_key_file"]


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_pod_ends_after_what_it_has_begun(name: str) -> None:
    pod = DEPLOYMENTS[name]["spec"]
    pause_s = container(DEPLOYMENTS[name])["lifecycle"]["preStop"]["sleep"]["seconds"]
    if name == "evenkeel-gateway":
        drain_s = read_config(settings()).drain_s
    else:
        drain_s = config_from(container(DEPLOYMENTS[name])["args"][1:], "evenkeel worker").drain_s
    assert pod["terminationGracePeriodSeconds"] >= pause_s + drain_s + 5


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_pods_have_no_rights_that_they_do_not_need(name: str) -> None:
    pod, only = DEPLOYMENTS[name]["spec"], container(DEPLOYMENTS[name])
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert only["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert (name == "evenkeel-gateway") != (pod.get("automountServiceAccountToken") is False)
    (role,) = of_kind("Role")
    assert role["rules"] == [
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]}
    ]
    mounts = {one["name"] for one in only["volumeMounts"]}
    assert mounts == {one["name"] for one in pod["volumes"]}
    assert {"cpu", "memory"} <= only["resources"]["requests"].keys()
    assert "memory" in only["resources"]["limits"]
    user = re.search(r"^USER (\d+):(\d+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert user is not None
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]) == tuple(map(int, user.groups()))


def test_ports_selectors_and_probes_mean_the_same_pods() -> None:
    labels = {name: pod["metadata"]["labels"] for name, pod in DEPLOYMENTS.items()}
    for one in of_kind("Service") + of_kind("PodDisruptionBudget") + of_kind("PodMonitor"):
        selector = one["spec"]["selector"]
        wanted = selector.get("matchLabels", selector)
        assert [name for name in labels if wanted.items() <= labels[name].items()] == [one["metadata"]["name"]]
    ports = {
        name: {one["name"]: one["containerPort"] for one in container(pod)["ports"]}
        for name, pod in DEPLOYMENTS.items()
    }
    for one in of_kind("Service"):
        assert {port["targetPort"] for port in one["spec"]["ports"]} <= ports[one["metadata"]["name"]].keys()
    for name, pod in DEPLOYMENTS.items():
        probes = [container(pod)[probe] for probe in container(pod) if probe.endswith("Probe")]
        assert len(probes) >= 2
        for probe in probes:
            assert (probe.get("httpGet") or probe["tcpSocket"])["port"] in ports[name]
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind("NetworkPolicy")}
    assert policies["evenkeel-workers"]["ingress"][0]["ports"][0]["port"] == ports["evenkeel-replicas"]["work"]
    assert policies["evenkeel-gateway"]["egress"][0]["ports"][0]["port"] == ports["evenkeel-backups"]["work"]
    assert policies["evenkeel-gateway"]["ingress"][0]["ports"][0]["port"] == ports["evenkeel-gateway"]["http"]
    assert policies["evenkeel-workers"]["egress"] == []


def test_autoscalers_say_how_many_there_are() -> None:
    scaled = {one["spec"]["scaleTargetRef"]["name"] for one in of_kind("HorizontalPodAutoscaler")}
    fixed = {one["metadata"]["name"] for one in of_kind("Deployment") if "replicas" in one["spec"]}
    assert scaled | fixed == DEPLOYMENTS.keys()
    assert not scaled & fixed
    assert all("replicas" in one["spec"] for one in ALL["base"] if one["kind"] == "Deployment")


def test_the_image_is_what_its_check_makes_and_starts_what_pods_start() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    assert "RUN sh /src/install.sh /opt/evenkeel /src" in lines
    assert 'ENTRYPOINT ["evenkeel"]' in lines
    assert all("command" not in container(pod) for pod in DEPLOYMENTS.values())


def test_all_images_are_of_the_version_that_is_here() -> None:
    from evenkeel.version import __version__

    assert {container(pod)["image"] for pod in DEPLOYMENTS.values()} == {f"evenkeel:{__version__}"}
