"""The clients that people use, unmodified, against a real server on loopback."""

import asyncio

import kserve
import numpy as np
import pytest
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from certificates import Authority
from evenkeel.errors import OverloadedError
from evenkeel.serving.front.access import Access, Guard
from evenkeel.trust.keys import KeyRing
from evenkeel.trust.tls import ServerTls
from http_helpers import FakeGateway, file_of, images, make_card, serving

ROWS = np.stack([np.full((4, 5, 3), value, np.uint8) for value in range(1, 31)])
SCORES = np.array([[0, value, 2 * value] for value in range(1, 31)], np.float32)


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


def triton_input(binary: bool):
    tensor = tritonclient.http.InferInput("images", ROWS.shape, "UINT8")
    tensor.set_data_from_numpy(ROWS, binary_data=binary)
    return tensor


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("binary_in", [True, False])
def test_tritonclient(server, binary_in, binary_out, compression):
    with tritonclient.http.InferenceServerClient(server.address) as client:
        outputs = [tritonclient.http.InferRequestedOutput(name, binary_data=binary_out) for name in ("scores", "label")]
        result = client.infer(
            "toy",
            [triton_input(binary_in)],
            outputs=outputs,
            request_id="7",
            timeout=10_000_000,
            request_compression_algorithm=compression,
            response_compression_algorithm=compression,
        )
    assert np.array_equal(result.as_numpy("scores"), SCORES)
    label = result.as_numpy("label")
    assert [bytes(value) if binary_out else value.encode() for value in label] == [b"bright"] * 30
    assert result.as_numpy("source") is None
    assert result.get_response()["id"] == "7"


def test_tritonclient_with_nothing_but_defaults(server):
    with tritonclient.http.InferenceServerClient(server.address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("toy")
        assert client.is_model_ready("toy", "1")
        assert not client.is_model_ready("cat")
        assert client.get_server_metadata()["name"] == "evenkeel"
        assert client.get_model_metadata("toy")["inputs"][0]["name"] == "images"
        result = client.infer("toy", [triton_input(binary=True)], model_version="1")
    assert np.array_equal(result.as_numpy("scores"), SCORES)
    assert result.as_numpy("source").tolist() == [b"exact"] * 30
    assert np.allclose(result.as_numpy("latency_ms"), 12.5)


def test_tritonclient_with_a_key_over_tls(tmp_path):
    authority = Authority(tmp_path)
    pair = authority.sign("server")
    keys = tmp_path / "keys"
    keys.touch(0o600)
    keys.write_text("alice alices-secret-key-0001")
    guard = Guard(Access(KeyRing(keys)), ServerTls(pair.certificate, pair.key))
    with serving(guard=guard) as running:
        url = f"localhost:{running.port}"
        options = {"ca_certs": str(authority.file)}
        with tritonclient.http.InferenceServerClient(url, ssl=True, ssl_options=options) as client:
            assert client.is_server_ready()
            with pytest.raises(InferenceServerException, match="this server wants a key"):
                client.infer("toy", [triton_input(binary=True)])
            headers = {"Authorization": "Bearer alices-secret-key-0001"}
            for _ in range(2):
                result = client.infer("toy", [triton_input(binary=True)], headers=headers)
                assert np.array_equal(result.as_numpy("scores"), SCORES)


def test_tritonclient_sends_files(server):
    tensor = tritonclient.http.InferInput("images", [2], "BYTES")
    tensor.set_data_from_numpy(np.array([file_of(ROWS[4]), file_of(ROWS[9], "JPEG", quality=95)], dtype=object))
    with tritonclient.http.InferenceServerClient(server.address) as client:
        scores = client.infer("toy", [tensor]).as_numpy("scores")
    assert np.allclose(scores, SCORES[[4, 9]], atol=2)


def test_tritonclient_reads_our_errors(server):
    with tritonclient.http.InferenceServerClient(server.address) as client:
        with pytest.raises(InferenceServerException, match="unknown model 'cat'; this server serves 'toy'"):
            client.infer("cat", [triton_input(binary=True)])
        wrong = tritonclient.http.InferInput("images", [1, 2], "FP32")
        wrong.set_data_from_numpy(np.zeros((1, 2), np.float32))
        with pytest.raises(InferenceServerException, match="expected UINT8 pixel values"):
            client.infer("toy", [wrong])
        with pytest.raises(InferenceServerException, match="'exact' must be a bool"):
            client.infer("toy", [triton_input(binary=True)], parameters={"exact": 1})


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_aio(server, binary, compression):
    async def ask():
        async with tritonclient.http.aio.InferenceServerClient(server.address) as client:
            assert await client.is_model_ready("toy")
            requests = [
                client.infer(
                    "toy",
                    [triton_input(binary)],
                    outputs=[tritonclient.http.InferRequestedOutput("scores", binary_data=binary)],
                    request_compression_algorithm=compression,
                    response_compression_algorithm=compression,
                )
                for _ in range(4)
            ]
            return await asyncio.gather(*requests)

    for result in asyncio.run(ask()):
        assert np.array_equal(result.as_numpy("scores"), SCORES)


@pytest.mark.parametrize("binary", [True, False])
def test_kserve_client(server, binary):
    async def ask():
        client = kserve.InferenceRESTClient(kserve.RESTConfig(protocol="v2"))
        url = f"http://{server.address}"
        assert await client.is_server_live(url)
        assert await client.is_server_ready(url)
        assert await client.is_model_ready(url, "toy")
        tensor = kserve.InferInput("images", list(ROWS.shape), "UINT8")
        tensor.set_data_from_numpy(ROWS, binary_data=binary)
        request = kserve.InferRequest("toy", [tensor], request_id="9", parameters={"binary_data_output": binary})
        result = await client.infer(url, request, model_name="toy")
        await client.close()
        return result

    result = asyncio.run(ask())
    scores = next(output for output in result.outputs if output.name == "scores")
    assert np.array_equal(scores.as_numpy(), SCORES)
    assert result.id == "9"


def test_a_busy_server_says_when_to_come_back():
    gateway = FakeGateway(refuse=lambda number: OverloadedError("all queues are full", 3))
    with serving(gateway) as running, tritonclient.http.InferenceServerClient(running.address) as client:
        with pytest.raises(InferenceServerException, match="all queues are full") as caught:
            client.infer("toy", [triton_input(binary=True)])
        assert caught.value.status() == "503"


def test_a_large_body_passes_through_a_real_server():
    card = make_card(height=224, width=224)
    gateway = FakeGateway()
    data = np.random.default_rng(1).integers(0, 256, (8, 224, 224, 3), dtype=np.uint8)
    with serving(gateway, card) as running, tritonclient.http.InferenceServerClient(running.address) as client:
        tensor = tritonclient.http.InferInput("images", data.shape, "UINT8")
        tensor.set_data_from_numpy(data)
        client.infer("toy", [tensor])
    assert np.array_equal(np.stack([submitted.item for submitted in gateway.submitted]), data)


def test_a_body_over_the_limit_is_413_for_a_real_client():
    with serving(max_body_bytes=1000) as running, tritonclient.http.InferenceServerClient(running.address) as client:
        with pytest.raises(InferenceServerException, match="more than 1000 bytes") as caught:
            client.infer("toy", [triton_input(binary=True)])
        assert caught.value.status() == "413"
        small = tritonclient.http.InferInput("images", [1, 4, 5, 3], "UINT8")
        small.set_data_from_numpy(images())
        assert client.infer("toy", [small]).as_numpy("label").tolist() == [b"bright"]
