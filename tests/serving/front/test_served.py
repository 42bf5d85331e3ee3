"""Several models behind one application: found by name and version, put in each other's place while requests go on."""

import asyncio
import gc
import weakref

import pytest

from evenkeel.errors import OverloadedError, UnknownModelError
from evenkeel.oip import write_request
from evenkeel.serving.front.served import ServedModel, ServedModels
from evenkeel.serving.front.shares import Client, FairShares
from evenkeel.serving.http.app import App
from http_helpers import FakeGateway, call, connect, images, make_card, read_responses, request_bytes, serve, tensor_of


def model(name: str = "toy", version: str = "1", **gateway) -> ServedModel:
    return ServedModel(name, version, make_card(), FakeGateway(**gateway))


def infer_body() -> bytes:
    return write_request([tensor_of(images())], binary=False)[0]


def test_a_model_is_found_by_its_name_and_version():
    first, second = model("a", "1"), model("b", "2")
    models = ServedModels([first, second])
    assert [models.find("a"), models.find("a", "1"), models.find("b")] == [first, first, second]
    with pytest.raises(UnknownModelError, match=r"unknown model 'c'; this server serves 'a', 'b'"):
        models.find("c")
    with pytest.raises(UnknownModelError, match=r"model 'b' has no version '1'; it has version '2'"):
        models.find("b", "1")
    assert models.remove("a") is first
    with pytest.raises(UnknownModelError):
        models.remove("a")


def test_the_server_is_ready_when_all_its_models_are():
    well, ill = model("a"), model("b", ready=False)
    models = ServedModels([well, ill])
    assert not models.ready
    models.remove("b")
    assert models.ready
    models.remove("a")
    assert not models.ready
    models.start_draining()
    models.put(well)
    assert well.gateway.draining  # it came after the shutdown had begun
    assert not models.ready


def test_each_request_goes_to_the_model_that_its_path_names():
    async def run():
        first, second = model("a"), model("b", "7")
        app = App(ServedModels([first, second]), metrics=bytes)
        for path, name, version in (
            ("/v2/models/a/infer", "a", "1"),
            ("/v2/models/b/infer", "b", "7"),
            ("/v2/models/b/versions/7/infer", "b", "7"),
        ):
            answer = (await call(app, path, infer_body())).json
            assert (answer["model_name"], answer["model_version"]) == (name, version)
        assert [len(one.gateway.submitted) for one in (first, second)] == [1, 2]
        assert (await call(app, "/v2/models/b", method="GET")).json["versions"] == ["7"]
        assert (await call(app, "/v2/models/b/versions/1/infer", infer_body())).status == 404
        assert "'a', 'b'" in (await call(app, "/v2/models/c/infer", infer_body())).error
        app.close()

    asyncio.run(run())


def test_a_model_put_in_anothers_place_takes_what_comes_from_then_on():
    async def run():
        old, new = model(version="1", hold=True), model(version="2")
        models = ServedModels([old])
        app = App(models, metrics=bytes)
        protocol, transport = connect(serve(app))
        answered = asyncio.Event()
        transport.more = answered.set
        protocol.data_received(request_bytes("/v2/models/toy/infer", infer_body()))
        assert models.put(new) is old
        assert old.in_use
        assert (await call(app, "/v2/models/toy/infer", infer_body())).json["model_version"] == "2"
        assert (await call(app, "/v2/models/toy/versions/1/infer", infer_body())).status == 404
        old.gateway.release()
        await answered.wait()
        assert read_responses(transport.sent, ["POST"])[0].json["model_version"] == "1"
        assert not old.in_use
        models.remove("toy")
        assert (await call(app, "/v2/models/toy/infer", infer_body())).status == 404
        assert (await call(app, "/v2/health/ready", method="GET")).error == "no model is loaded"
        app.close()

    asyncio.run(run())


def test_a_model_is_in_use_while_a_request_for_it_is_still_read():
    async def run():
        one = model()
        app = App(ServedModels([one]), metrics=bytes)
        request = request_bytes("/v2/models/toy/infer", b"not gzip", headers={"content-encoding": "gzip"})
        protocol, transport = connect(serve(app))
        answered = asyncio.Event()
        transport.more = answered.set
        protocol.data_received(request)
        assert one.in_use  # a thread unpacks it
        await answered.wait()
        await asyncio.sleep(0)
        assert not one.in_use
        app.close()

    asyncio.run(run())


def test_a_client_that_one_gateway_refused_waits_for_that_one_only():
    busy, other = (FairShares(lambda: 10, lambda: 0.0) for _ in range(2))
    client = Client("a")
    busy.refused(client, 1)
    other.refused(Client("b"), 1)
    with pytest.raises(OverloadedError, match="others waited longer"):
        busy.admit(client, 1)  # it comes back at once
    other.admit(client, 1)
    gone = weakref.ref(busy)
    del busy
    gc.collect()
    assert gone() is None  # clients outlive models that are taken out of service
