"""New versions of models in the place of old ones, while requests are answered; what does not fit changes nothing."""

import asyncio
import json
import shutil
import threading
import time
from typing import ClassVar

import httpx
import numpy as np
import pytest

from evenkeel.errors import BackendError, ConfigurationError, EvenkeelError, OverloadedError, UnknownModelError
from evenkeel.files import write_whole
from evenkeel.models.shipped import card_path
from evenkeel.oip import Tensor, write_request
from evenkeel.serving import repository as module
from evenkeel.serving.changed_files import when_changed
from evenkeel.serving.config import read_config
from evenkeel.serving.control import ask, find_socket, own_socket
from evenkeel.serving.front.management import ReloadReport
from evenkeel.serving.front.served import ServedModels
from evenkeel.serving.repository import ModelRepository
from evenkeel.serving.service import _reload_when_changed, serve

CARD = json.loads(card_path("cifar10-base").read_text())


@pytest.fixture
def folder(tmp_path):
    """A folder with a model of one's own, which is the shipped one, and its configuration."""
    shutil.copy(card_path("cifar10-base").parent / CARD["file"], tmp_path / CARD["file"])
    write_card(tmp_path, version="1")
    return tmp_path


def write_card(folder, **changes):
    write_whole(folder / "toy.json", json.dumps({**CARD, "name": "toy", **changes}).encode())


def config_of(folder, **changes):
    raw = {"model": "toy.json", "replicas": 1, "backups": 0, "policy": "none", "port": 0, "drain": "5s", **changes}
    return read_config(raw, folder)


class Hosted:
    """Stands for a model's workers: they may be slow to start, refuse to, or not become ready."""

    made: ClassVar[list] = []
    error: EvenkeelError | None = None
    ready = True
    started: asyncio.Event | None = None
    ready_replicas = 1

    def __init__(self, config, read=None, before=None, tracer=None):
        self.config, self.read, self.closed = config, read or module.read_files(config), False
        card = config.card()
        self.gateway = self
        self.stats = object() if before is None else before.stats
        self.draining = False
        self.served = type(
            "Served", (), {"name": "toy", "version": card.version, "card": card, "in_use": False, "times": None}
        )()
        self.served.gateway = self
        self.why_not_ready = ""
        self.fleet = self
        self.members = []
        Hosted.made.append(self)

    def start_draining(self):
        self.draining = True

    def take_audits(self, before):
        """Has none."""

    async def start(self, at_once=None):
        if Hosted.started is not None:
            await Hosted.started.wait()
        if Hosted.error is not None:
            raise Hosted.error
        self.ready = Hosted.ready

    async def close(self):
        self.closed = True


@pytest.fixture
def run(monkeypatch, folder):
    """Runs a test with a repository of scripted models."""
    monkeypatch.setattr(module, "HostedModel", Hosted)
    for name, value in (("made", []), ("error", None), ("ready", True), ("started", None)):
        monkeypatch.setattr(Hosted, name, value)

    def run(test):
        async def whole():
            models = ServedModels()
            repository = ModelRepository(models, config_of(folder), lambda: config_of(folder))
            await repository.start()
            try:
                await test(repository, models)
            finally:
                await repository.close()
            assert all(hosted.closed for hosted in Hosted.made)

        asyncio.run(whole())

    return run


def test_a_reload_loads_what_changed_and_closes_the_old_one_when_nobody_needs_it(run, folder):
    async def test(repository, models):
        assert await repository.reload() == ReloadReport([], [])
        (old,) = repository.hosted
        old.served.in_use = True
        write_card(folder, version="2")
        reloading = asyncio.ensure_future(repository.reload())
        while models.find("toy").version != "2":
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        assert old.draining
        assert not old.closed
        assert not reloading.done()
        old.served.in_use = False
        assert (await reloading).loaded == ["toy"]
        assert old.closed
        assert repository.hosted[0].stats is old.stats  # counters go on
        assert [model.version for model in repository.index()] == ["2"]

    run(test)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"classes": CARD["classes"][::-1]}, "the new model has other classes: only their order differs"),
        ({"classes": CARD["classes"][:9]}, "the new model has other classes: they have 9 and 10"),
        ({"height": 16}, r"the new model's shape is \[16, 32, 3\], and clients send \[32, 32, 3\]"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_any_worker_starts(run, folder, changes, says):
    async def test(repository, models):
        write_card(folder, version="2", **changes)
        with pytest.raises(ConfigurationError, match=f"'toy' stays as it was: {says}"):
            await repository.reload()
        assert len(Hosted.made) == 1
        assert models.find("toy").version == "1"

    run(test)


def test_a_new_version_that_cannot_start_leaves_the_old_one_in_place(run, folder, monkeypatch):
    async def test(repository, models):
        write_card(folder, version="2")
        Hosted.error = ConfigurationError("worker 'replica-0' cannot start")
        with pytest.raises(ConfigurationError, match="cannot start"):
            await repository.reload()
        Hosted.error, Hosted.ready = None, False
        with pytest.raises(BackendError, match="'toy' stays as it was: the new one is not ready"):
            await repository.load("toy")
        monkeypatch.setattr(Hosted, "ready", True)
        repository.hosted[0].ready_replicas = 2
        monkeypatch.setattr(repository, "_reread", lambda: config_of(folder, replicas=3))
        with pytest.raises(BackendError, match="of the new one 1 replicas are ready, and 2 now"):
            await repository.load("toy")
        assert [hosted.closed for hosted in Hosted.made] == [False, True, True, True]
        assert models.find("toy").version == "1"
        (folder / "toy.json").write_text("{")
        with pytest.raises(ConfigurationError, match=r"toy\.json"):
            await repository.reload()

    run(test)


def test_what_is_of_the_server_is_named_and_stays(run, folder, monkeypatch):
    async def test(repository, models):
        monkeypatch.setattr(repository, "_reread", lambda: config_of(folder, port=9, max_body="1MiB"))
        report = await repository.reload()
        assert report.need_restart == ["port", "max_body"]

    run(test)


def test_one_change_at_a_time(run):
    async def test(repository, models):
        Hosted.started = asyncio.Event()
        loading = asyncio.ensure_future(repository.load("toy"))
        await asyncio.sleep(0.05)
        with pytest.raises(OverloadedError, match=r"the load of 'toy' is under way; try again when it is done"):
            await repository.reload()
        Hosted.started.set()
        await loading

    run(test)


def test_a_model_is_unloaded_and_loaded_again(run):
    async def test(repository, models):
        (old,) = repository.hosted
        await repository.unload("toy")
        assert old.closed
        with pytest.raises(UnknownModelError):
            models.find("toy")
        assert [(one.name, one.state, one.reason) for one in repository.index()] == [("toy", "UNAVAILABLE", "unloaded")]
        assert (await repository.reload()).loaded == []  # it was taken out of service on purpose
        with pytest.raises(UnknownModelError):
            await repository.unload("toy")
        with pytest.raises(UnknownModelError, match=r"unknown model 'other'; the configuration has 'toy'"):
            await repository.load("other")
        await repository.load("toy")
        assert models.find("toy")

    run(test)


def test_files_are_used_when_they_have_changed_and_nobody_writes_them_any_more(tmp_path):
    async def run():
        path, used = tmp_path / "x", []

        async def use():
            used.append(path.read_text())
            return len(used) > 2

        path.write_text("1")
        watching = asyncio.ensure_future(when_changed(lambda: [path], 0.01, use))
        await asyncio.sleep(0.05)
        assert used == []
        path.write_text("22")
        while len(used) < 3:  # it is tried until it can be done
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        watching.cancel()
        assert used == ["22", "22", "22"]

    asyncio.run(run())


def test_files_are_looked_at_also_after_one_was_garbage_and_while_another_change_is_under_way(run, folder, caplog):
    async def test(repository, models):
        watching = asyncio.ensure_future(_reload_when_changed(repository, [], 0.01))
        await asyncio.sleep(0)  # it has seen what there is
        (folder / "toy.json").write_text("{")
        while "all stays as it was" not in caplog.text:
            await asyncio.sleep(0.01)
        write_card(folder, version="2")
        while models.find("toy").version != "2" or repository._changing:
            await asyncio.sleep(0.01)
        Hosted.started = asyncio.Event()
        resizing = asyncio.ensure_future(repository.load("toy"))
        await asyncio.sleep(0)
        write_card(folder, version="3")  # it read the one before
        await asyncio.sleep(0.1)  # it looks, and cannot
        Hosted.started.set()
        await resizing
        while models.find("toy").version != "3":
            await asyncio.sleep(0.01)
        assert not watching.done()
        watching.cancel()

    async def bounded(repository, models):
        async with asyncio.timeout(20):
            await test(repository, models)

    run(bounded)


def test_the_control_folder_must_be_this_users_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    path = own_socket()
    assert (path.parent.stat().st_mode & 0o777) == 0o700
    path.parent.chmod(0o755)
    with pytest.raises(ConfigurationError, match="must be a folder of this user alone"):
        own_socket()
    with pytest.raises(ConfigurationError, match="must be a folder of this user alone"):
        find_socket()
    path.parent.rmdir()
    (tmp_path / "evenkeel").symlink_to(tmp_path)
    with pytest.raises(ConfigurationError, match="must be a folder of this user alone"):
        own_socket()


def test_a_running_server_is_reloaded_over_its_control_socket_and_over_nothing_else(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(ConfigurationError, match="no server of this user runs on this machine"):
        find_socket()
    started, urls = threading.Event(), []

    def on_started(url, why_not):
        urls.append(url)
        started.set()

    def configured():
        base = {"model": "cifar10-base", "name": "base", "policy": "none"}
        raw = {"port": 0, "replicas": 1, "backups": 0, "models": [{"model": "toy.json", "policy": "none"}, base]}
        return read_config(raw, folder)

    stopped: list = []

    def target():
        async def main():
            task = asyncio.ensure_future(serve(configured(), on_started, reread=configured))
            stopped.append((asyncio.get_running_loop(), task))
            await asyncio.wait([task])

        asyncio.run(main())

    thread = threading.Thread(target=target)
    thread.start()
    try:
        assert started.wait(60)
        control, (url,) = find_socket(), urls
        body, header_bytes = write_request(
            [Tensor("images", "UINT8", (1, 32, 32, 3), np.zeros((1, 32, 32, 3), np.uint8))], binary=True
        )
        headers = {"inference-header-content-length": str(header_bytes)}
        with httpx.Client(base_url=url, timeout=30) as client:
            infer = client.post("/v2/models/toy/infer", content=body, headers=headers)
            assert infer.status_code == 200, infer.text
            for method, path in (
                ("POST", "/v2/repository/models/toy/unload"),
                ("POST", "/v2/repository/models/toy/load"),
                ("POST", "/v2/fleet/reload"),
                ("POST", "/v2/fleet/restart"),
                ("GET", "/v2/fleet"),
                ("GET", "//v2//fleet"),
                ("POST", "/v2/%66leet/reload"),
            ):
                assert client.request(method, path).status_code in (403, 404), path
            index = client.post("/v2/repository/index").json()
            ready = {"state": "READY", "reason": ""}
            version = json.loads(card_path("cifar10-base").read_text())["version"]
            assert index == [{"name": "toy", "version": "1", **ready}, {"name": "base", "version": version, **ready}]
            assert client.post("/v2/repository/index", content=b"[").status_code == 400
            assert client.post("/v2/repository/index", content=b" " * 70_000).status_code == 413
            write_card(folder, version="2")
            answered: list[tuple[float, float, str]] = []
            over = threading.Event()

            def hammer():
                with httpx.Client(base_url=url, timeout=30) as other:
                    while not over.is_set():
                        began = time.monotonic()
                        reply = other.post("/v2/models/toy/infer", content=body, headers=headers)
                        answered.append((began, time.monotonic(), reply.json()["model_version"]))

            hammering = [threading.Thread(target=hammer) for _ in range(2)]
            for one in hammering:
                one.start()
            assert ask(control, "POST", "/v2/fleet/reload") == {"loaded": ["toy"], "need_restart": []}
            assert client.get("/v2/models/toy").json()["versions"] == ["2"]
            until = time.monotonic() + 20
            while not any(version == "2" for _, _, version in answered) and time.monotonic() < until:
                time.sleep(0.01)
            over.set()
            for one in hammering:
                one.join(30)
            first_new = min(ended for _, ended, version in answered if version == "2")
            assert all(version == "2" for began, _, version in answered if began > first_new)
            assert {version for _, _, version in answered} == {"1", "2"}
            write_card(folder, version="3", classes=CARD["classes"][:9])
            with pytest.raises(EvenkeelError, match="the new model has other classes"):
                ask(control, "POST", "/v2/fleet/reload")
            with pytest.raises(EvenkeelError, match="takes no configuration or files by request"):
                ask(control, "POST", "/v2/repository/models/toy/load", {"parameters": {"config": "{}"}})
            for wrong in ({"replicas": True}, {"replicas": 5000}, {"backup": 1}, {"replicas": 0}):
                with pytest.raises(EvenkeelError):
                    ask(control, "POST", "/v2/fleet/resize", wrong)
            ask(control, "POST", "/v2/repository/models/toy/unload")
            assert client.post("/v2/models/toy/infer", content=body, headers=headers).status_code == 404
            assert client.post("/v2/models/base/infer", content=body, headers=headers).status_code == 200
            assert client.get("/v2/health/ready").status_code == 200
            assert list(ask(control, "GET", "/v2/fleet")) == ["base"]
            only_ready = client.post("/v2/repository/index", json={"ready": True}).json()
            assert [model["name"] for model in only_ready] == ["base"]
            assert 'evenkeel_items_total{model="base"} 1' in client.get("/metrics").text
    finally:
        loop, task = stopped[0]
        loop.call_soon_threadsafe(task.cancel)
        thread.join(30)
    assert not control.exists()
