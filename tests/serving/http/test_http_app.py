"""The application without a server: routes, requests, answers, errors."""

import asyncio
import gzip
import threading
import zlib

import numpy as np
import orjson
import pytest

import evenkeel
from evenkeel.coding.code import Answer
from evenkeel.errors import BackendError, BackendLostError, DeadlineError, OverloadedError, ProtocolError, TooLargeError
from evenkeel.oip import RequestedOutput, Tensor, parse_response, write_request
from evenkeel.serving.gateway.gateway import Outcome
from http_helpers import (
    CLASSES,
    INFER,
    FakeGateway,
    ask,
    call,
    connect,
    file_of,
    get,
    images,
    infer,
    make_app,
    make_card,
    read_responses,
    request_bytes,
    serve,
    tensor_of,
)


def test_the_server_says_what_it_is_and_supports():
    found = get("/v2").json
    assert found["name"] == "evenkeel"
    assert found["version"] == evenkeel.__version__
    assert "binary_tensor_data" in found["extensions"]


def test_health():
    assert get("/v2/health/live").json == {"live": True}
    assert get("/v2/health/ready").json == {"ready": True}
    assert get("/v2/models/toy/ready").json == {"name": "toy", "ready": True}
    assert get("/v2/models/toy/versions/1/ready").status == 200


@pytest.mark.parametrize("gateway", [FakeGateway(ready=False), FakeGateway(ready=False, draining=True)])
def test_not_ready_is_503_but_live(gateway):
    assert get("/v2/health/live", gateway).status == 200
    for path in ("/v2/health/ready", "/v2/models/toy/ready"):
        found = get(path, gateway)
        assert found.status == 503
        assert found.error == ("the server is shutting down" if gateway.draining else "no replica is ready")


@pytest.mark.parametrize("path", ["/v2/models/toy", "/v2/models/toy/", "/v2/models/toy/versions/1"])
def test_model_metadata(path):
    found = get(path).json
    assert found["name"] == "toy"
    assert found["versions"] == ["1"]
    pixels = {"minimum": 0, "maximum": 255}
    assert found["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 4, 5, 3], "parameters": pixels}]
    assert found["outputs"][0] == {"name": "scores", "datatype": "FP32", "shape": [-1, 3]}
    assert [output["name"] for output in found["outputs"]] == ["scores", "label", "source", "confidence", "latency_ms"]


def test_metrics():
    found = get("/metrics")
    assert found.body == b"evenkeel_up 1\n"
    assert found.headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/nothing", 404, "nothing is served at '/nothing'"),
        ("GET", "/v3", 404, "nothing is served at '/v3'"),
        ("GET", "/v2/models/toy/statistics", 404, "nothing is served at"),
        ("GET", "/v2/models/cat", 404, "unknown model 'cat'; this server serves 'toy'"),
        ("POST", "/v2/models/cat/infer", 404, "unknown model 'cat'"),
        ("POST", "/v2/models/cat/versions/1/infer", 404, "unknown model 'cat'"),
        ("POST", "/v2/models/toy/versions/2/infer", 404, "no version '2'; it has version '1'"),
        ("GET", "/v2/models/toy/versions/2", 404, "no version '2'"),
        ("GET", INFER, 405, "GET is not allowed on /v2/models/toy/infer; use POST"),
        ("PUT", INFER, 405, "use POST"),
        ("GET", INFER + "/", 405, "use POST"),
        ("GET", "/" + "x" * 500, 404, "nothing is served at '/" + "x" * 59 + "'..."),
        ("GET", INFER + "?model=cat", 405, "use POST"),
        ("GET", "http://host/v2/models/cat", 404, "unknown model 'cat'"),
        ("POST", "/v2/health/live", 405, "use GET, HEAD"),
        ("DELETE", "/v2", 405, "use GET, HEAD"),
        ("GET", "/v2/models/\udc80", 404, "unknown model"),
    ],
)
def test_what_is_not_served_is_answered_in_words(method, path, status, message):
    found = get(path, method=method)
    assert found.status == status
    assert message in found.error
    assert ("allow" in found.headers) == (status == 405)


@pytest.mark.parametrize("path", ["/v2/health/ready", "/v2/models/toy", INFER, "/v3"])
def test_head_is_answered_like_get_without_the_body(path):
    found, full = get(path, method="HEAD"), get(path)
    assert found.status == full.status
    assert found.body == b""
    if path != INFER:
        assert found.headers["content-length"] == full.headers["content-length"]


def test_one_item_is_answered_with_all_outputs():
    gateway = FakeGateway()
    found = ask(tensor_of(images(value=7)), gateway, request_id="abc")
    assert found.status == 200
    assert (found.json["model_name"], found.json["model_version"], found.json["id"]) == ("toy", "1", "abc")
    assert found.output("scores") == [0, 7, 14]
    assert found.output("label") == ["bright"]
    assert found.output("source") == ["exact"]
    assert found.output("confidence") == [0.75]
    assert found.output("latency_ms") == [12.5]
    assert gateway.submitted[0].item.shape == (4, 5, 3)
    assert gateway.submitted[0].options == evenkeel.serving.gateway.gateway.Options()
    assert gateway.submitted[0].key is None
    assert gateway.cancelled == []


def test_n_rows_are_n_items_and_answers_keep_their_order():
    gateway = FakeGateway()
    data = np.stack([np.full((4, 5, 3), value, np.uint8) for value in (3, 1, 2)])
    found = ask(tensor_of(data), gateway, parameters={"evenkeel_key": 10})
    assert [tuple(output["shape"]) for output in found.json["outputs"]] == [(3, 3), (3,), (3,), (3,), (3,)]
    assert found.output("scores") == [0, 3, 6, 0, 1, 2, 0, 2, 4]
    assert [submitted.key for submitted in gateway.submitted] == [10, 11, 12]


def test_outcomes_in_any_order_fill_their_own_rows():
    async def run():
        gateway = FakeGateway(hold=True)
        app = make_app(gateway)
        data = np.stack([np.full((4, 5, 3), value, np.uint8) for value in (3, 1, 2)])
        body, length = write_request([tensor_of(data)], [RequestedOutput("scores", True)], binary=True)
        asking = asyncio.ensure_future(call(app, INFER, body, headers={"inference-header-content-length": str(length)}))
        while len(gateway.open) < 3:
            await asyncio.sleep(0)
        assert app.in_flight == 1
        for number in (2, 0, 1):
            gateway.finish(number)
        found = await asking
        assert app.in_flight == 0
        app.close()
        return parse_response(found.body, int(found.headers["inference-header-content-length"]))

    assert asyncio.run(run()).outputs[0].data.tolist() == [[0, 3, 6], [0, 1, 2], [0, 2, 4]]


@pytest.mark.parametrize("binary", [True, False])
def test_only_the_requested_outputs_are_given_in_the_requested_form(binary):
    body, length = write_request(
        [tensor_of(images())], [RequestedOutput("label", binary), RequestedOutput("confidence")], binary=True
    )
    found = infer(body, {"inference-header-content-length": str(length)})
    header = found.headers.get("inference-header-content-length")
    assert (header is not None) == binary
    response = parse_response(found.body, None if header is None else int(header))
    assert [output.name for output in response.outputs] == ["label", "confidence"]
    assert response.outputs[0].data == [b"bright"]
    assert ("binary_data_size" in response.outputs[0].parameters) == binary
    assert "binary_data_size" not in response.outputs[1].parameters


def test_an_output_may_differ_from_the_request_wide_default():
    body, length = write_request(
        [tensor_of(images())],
        [RequestedOutput("scores"), RequestedOutput("label", False)],
        binary=True,
        parameters={"binary_data_output": True},
    )
    found = infer(body, {"inference-header-content-length": str(length)})
    outputs = parse_response(found.body, int(found.headers["inference-header-content-length"])).outputs
    assert ["binary_data_size" in output.parameters for output in outputs] == [True, False]


def test_an_unknown_output_is_refused_before_anything_is_submitted():
    gateway = FakeGateway()
    body, length = write_request([tensor_of(images())], [RequestedOutput("logits")], binary=True)
    found = infer(body, {"inference-header-content-length": str(length)}, gateway)
    assert found.status == 400
    assert "unknown output 'logits'; this model gives scores, label" in found.error
    assert gateway.submitted == []


@pytest.mark.parametrize("own", ["NHWC", "NCHW"])
@pytest.mark.parametrize("sent", ["NHWC", "NCHW"])
@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
def test_both_layouts_become_the_cards(own, sent, datatype):
    gateway = FakeGateway()
    pixels = np.arange(60, dtype=np.uint8).reshape(1, 4, 5, 3)
    card = make_card(layout=own, datatype=datatype)
    found = ask(tensor_of(pixels if sent == "NHWC" else pixels.transpose(0, 3, 1, 2)), gateway, card)
    assert found.status == 200
    item = gateway.submitted[0].item
    assert item.flags.c_contiguous
    assert item.dtype == ("u1" if datatype == "UINT8" else "f4")
    assert np.array_equal(item, pixels[0] if own == "NHWC" else pixels[0].transpose(2, 0, 1))


def test_a_three_by_three_image_is_read_in_the_cards_layout():
    gateway = FakeGateway()
    pixels = np.arange(27, dtype=np.uint8).reshape(1, 3, 3, 3)
    ask(tensor_of(pixels), gateway, make_card(height=3, width=3, layout="NCHW"))
    assert np.array_equal(gateway.submitted[0].item, pixels[0])


def test_floats_reach_a_float_model_whatever_their_alignment():
    data = np.linspace(0, 255, 60, dtype=np.float32).reshape(1, 4, 5, 3)
    for padding in range(4):
        gateway = FakeGateway()
        ask(tensor_of(data, "FP32"), gateway, make_card(datatype="FP32"), request_id="x" * (padding + 1))
        item = gateway.submitted[0].item
        assert item.flags.aligned
        assert np.array_equal(item, data[0])


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (tensor_of(images().astype(np.float32), "FP32"), "datatype is FP32; expected UINT8 pixel values, or BYTES"),
        (tensor_of(images().astype(np.int64), "INT64"), "datatype is INT64; expected UINT8"),
        (tensor_of(images()[0]), r"shape is [4, 5, 3]; expected [n, 4, 5, 3] or [n, 3, 4, 5]"),
        (tensor_of(np.zeros((1, 8, 8, 3), np.uint8)), "shape is [1, 8, 8, 3]; expected [n, 4, 5, 3]"),
        (tensor_of(images(0)), "shape [0, 4, 5, 3] holds no items; expected n >= 1"),
        (Tensor("x", "UINT8", (1, 4, 5, 3), images()), "expected exactly one input, 'images'; found 'x'"),
        (Tensor("images", "BYTES", (2, 2), [b"a"] * 4), "image files are a BYTES tensor of shape [n], n >= 1"),
        (Tensor("images", "BYTES", (0,), []), "image files are a BYTES tensor of shape [n], n >= 1"),
    ],
)
def test_a_tensor_that_does_not_fit_the_model_is_refused_in_words(tensor, message):
    found = ask(tensor)
    assert found.status == 400
    assert message in found.error


def floats(*values: float) -> Tensor:
    """A black image with some of its first values replaced."""
    data = np.zeros((2, 4, 5, 3), np.float32)
    data.reshape(-1)[: len(values)] = values
    return tensor_of(data, "FP32")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([np.nan], "some are not finite"),
        ([np.inf], "some are not finite"),
        ([-np.inf, 3], "some are not finite"),
        ([3e38, -3e38], "the lowest is -3e+38"),
        ([-1, 255], "the lowest is -1; undo what was subtracted"),
        ([255.001], "the highest is 255.001"),
        ([0.5], "an item has fractions and nothing above 0.5; if it was scaled to 0..1, multiply it by 255"),
        ([1, 0, 0.999], "an item has fractions and nothing above 1; if it was scaled to 0..1, multiply it by 255"),
        ([1.02, 0, 0.5], "an item has fractions and nothing above 1.02"),  # by a resampling
        ([2, 0, 0.5], "an item has fractions and nothing above 2"),
        (
            [2.5],
            "an item has fractions and nothing above 2.5; if it was scaled, say to what by the tensor's parameter 'max",
        ),
        ([0, 15.9375], "an item has fractions and nothing above 15.9375"),  # pixels / 16
        ([0, 16, 7], "an item has nothing above 16; if it was scaled, say to what"),  # scikit-learn's digits
        ([0, 3], "an item has nothing above 3"),
        ([255.0001], "the highest is 255.0001"),
        ([255] * 60 + [0.5], "an item has fractions and nothing above 0.5"),  # the second item of the batch
    ],
)
@pytest.mark.parametrize("binary", [True, False])
def test_floats_that_cannot_be_pixels_are_refused_in_words(values, message, binary):
    gateway, card = FakeGateway(), make_card(datatype="FP32")
    if binary:
        found = ask(floats(*values), gateway, card)
    elif np.isfinite(values).all():
        found = infer(write_request([floats(*values)], binary=False)[0], gateway=gateway, card=card)
    else:
        return  # JSON has no such number
    assert found.status == 400
    assert f"input 'images': expected pixel values 0..255; {message}" in found.error
    assert gateway.submitted == []


@pytest.mark.parametrize("values", [[], [1], [1, 0, 1], [255], [-0.0], [16.5], [0.25, 30], [2, 1], [254.99]])
def test_dark_images_and_fractions_are_pixels(values):
    gateway = FakeGateway()
    assert ask(floats(*values), gateway, make_card(datatype="FP32")).status == 200
    assert np.array_equal(gateway.submitted[0].item.reshape(-1)[: len(values)], np.float32(values))


@pytest.mark.parametrize(
    ("values", "maximum", "pixels"),
    [
        ([0, 16, 8], 16, [0, 255, 127.5]),
        ([0, 1, 0.5], 1, [0, 255, 127.5]),
        ([0, 1, 0.5], 1.0, [0, 255, 127.5]),
        ([0, 3, 1], 255, [0, 3, 1]),  # nearly black
        ([0.5, 3.25], 255, [0.5, 3.25]),
        ([65535, 0], 65535, [255, 0]),
    ],
)
@pytest.mark.parametrize("binary", [True, False])
def test_a_tensor_may_say_its_range(values, maximum, pixels, binary):
    gateway = FakeGateway()
    tensor = floats(*values)
    tensor.parameters["maximum"] = maximum
    body, length = write_request([tensor], binary=binary)
    headers = {} if length is None else {"inference-header-content-length": str(length)}
    assert infer(body, headers, gateway, make_card(datatype="FP32")).status == 200
    item = gateway.submitted[0].item
    assert item.dtype == np.float32
    assert item.reshape(-1)[: len(values)].tolist() == pytest.approx(pixels)


def test_a_tensor_of_bytes_may_say_its_range_too():
    gateway = FakeGateway()
    tensor = tensor_of(images(value=8))
    tensor.parameters["maximum"] = 16
    assert ask(tensor, gateway).status == 200
    assert np.array_equal(gateway.submitted[0].item, images(value=128)[0])


@pytest.mark.parametrize(
    ("maximum", "message"),
    [
        (0, "must be a number above 0 and up to 65535, found 0"),
        (-1, "must be a number"),
        (True, "must be a number"),
        ("16", "must be a number"),
        (1e9, "must be a number"),
        (15, "its parameter says values 0..15; found 0 and 16"),
    ],
)
def test_a_range_that_is_none_or_does_not_hold_is_refused(maximum, message):
    tensor = floats(0, 16)
    tensor.parameters["maximum"] = maximum
    found = ask(tensor, card=make_card(datatype="FP32"))
    assert found.status == 400
    assert message in found.error


def test_a_raw_body_of_floats_has_the_same_range():
    card = make_card(datatype="FP32")
    for value, status in ((0.5, 400), (128.0, 200)):
        raw = np.full(60, value, np.float32).tobytes()
        assert infer(raw, {"inference-header-content-length": "0"}, card=card).status == status


def test_two_inputs_are_refused():
    other = Tensor("mask", "UINT8", (1,), np.zeros(1, np.uint8))
    body, length = write_request([tensor_of(images()), other], binary=True)
    found = infer(body, {"inference-header-content-length": str(length)})
    assert "expected exactly one input, 'images'; found 'images', 'mask'" in found.error


def test_a_request_may_say_how_it_wants_to_be_served():
    gateway = FakeGateway()
    ask(tensor_of(images()), gateway, parameters={"exact": True, "timeout": 1_500_000, "min_confidence": 0.9})
    ask(tensor_of(images()), gateway, parameters={"min_confidence": 1, "priority": 3, "sequence_id": 0})
    options = [submitted.options for submitted in gateway.submitted]
    assert options[0].exact
    assert options[0].timeout_s == pytest.approx(1.5, abs=0.5)
    assert options[0].min_confidence == 0.9
    assert (options[1].exact, options[1].timeout_s, options[1].min_confidence) == (False, None, 1.0)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"exact": 1}, "'exact' must be a bool, found 1"),
        ({"exact": "true"}, "'exact' must be a bool, found 'true'"),
        ({"timeout": 0}, "'timeout' must be an integer above zero (microseconds), found 0"),
        ({"timeout": 1.5}, "'timeout' must be an integer"),
        ({"timeout": True}, "'timeout' must be an integer"),
        ({"min_confidence": 2}, "'min_confidence' must be a number from 0 to 1, found 2"),
        ({"min_confidence": "high"}, "'min_confidence' must be a number"),
        ({"min_confidence": True}, "'min_confidence' must be a number"),
        ({"evenkeel_key": -1}, "'evenkeel_key' must be an integer >= 0"),
    ],
)
def test_wrong_options_are_refused_in_words(parameters, message):
    found = ask(tensor_of(images()), parameters=parameters)
    assert found.status == 400
    assert message in found.error


def test_a_raw_body_is_one_item():
    gateway = FakeGateway()
    pixels = np.arange(60, dtype=np.uint8)
    found = infer(pixels.tobytes(), {"Inference-Header-Content-Length": "0"}, gateway)
    assert found.status == 200
    assert found.output("label") == ["bright"]
    assert np.array_equal(gateway.submitted[0].item.reshape(-1), pixels)


def test_a_raw_body_of_the_wrong_size_is_refused():
    found = infer(b"x" * 61, {"Inference-Header-Content-Length": "0"})
    assert found.status == 400
    assert (
        "the raw body has 61 bytes; expected an image file (JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM), or 60 bytes"
        in found.error
    )


@pytest.mark.parametrize("value", ["abc", "-1", "1_0", "", "9" * 30, "1.0", "+5"])
@pytest.mark.parametrize("name", ["inference-header-content-length", "content-length"])
def test_a_length_that_is_no_number_is_refused(name, value):
    found = infer(b"{}", {name: value})
    assert found.status == 400
    if name == "content-length":  # without it nobody knows where the request ends
        assert found.error == "Invalid HTTP request received."
        assert found.headers["connection"] == "close"
    else:
        assert f"header {name} must be a whole number" in found.error


@pytest.mark.parametrize("begin", [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_pixels_that_begin_like_a_file_are_pixels(begin):
    gateway = FakeGateway()
    raw = begin + bytes(60 - len(begin))
    for kind in ("application/octet-stream", "application/x-www-form-urlencoded", ""):
        headers = {"inference-header-content-length": "0", "content-type": kind}
        assert infer(raw, headers, gateway).status == 200
        assert gateway.submitted[-1].item.tobytes() == raw


def test_a_body_whose_content_type_is_an_image_is_a_file():
    data = file_of(images()[0])
    for kind in ("image/png", "Image/PNG", "image/*"):
        assert infer(data, {"content-type": kind}).status == 200
        assert infer(data, {"content-type": kind, "inference-header-content-length": "0"}).status == 200
    found = infer(bytes(60), {"content-type": "image/png"})
    assert found.status == 400
    assert "image 0" in found.error


def test_a_header_length_beyond_the_body_is_refused():
    found = infer(b"{}", {"inference-header-content-length": "3"})
    assert found.status == 400
    assert "is 3, but the body has 2 bytes" in found.error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OverloadedError("all queues are full", retry_after_s=2.2), 503),
        (DeadlineError("no answer within 1 s"), 504),
    ],
)
def test_the_error_of_an_item_is_the_error_of_the_request(error, status):
    gateway = FakeGateway(errors={1: error})
    found = ask(tensor_of(images(4)), gateway)
    assert found.status == status
    assert found.error == str(error)
    assert found.headers.get("retry-after") == ("3" if status == 503 else None)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BackendError("KeyError: secret"), "it failed"),
        (BackendLostError("secret"), "its worker was lost"),
        (ProtocolError("secret" + "x" * 5000), "its worker gave no proper reply"),
    ],
)
def test_what_a_model_says_goes_to_the_log_alone(error, reason, caplog):
    found = ask(tensor_of(images()), FakeGateway(errors={0: error}))
    assert found.status == 502
    assert found.error == f"the model could not answer ({reason}); the server's log has the details"
    assert "secret" in caplog.text
    assert len(caplog.messages[0]) < 600


def test_scores_that_fp32_cannot_hold_are_no_answer():
    class Huge(FakeGateway):
        def finish(self, number):
            scores = np.array([0.0, 1e300, 0.0])
            self.submitted[number].on_outcome(Outcome(Answer(scores, "exact", 0.75), None, 0.0125))

    assert ask(tensor_of(images()), Huge()).status == 502
    assert ask(tensor_of(images(3)), Huge()).status == 502


@pytest.mark.parametrize("path", [INFER + "/", INFER + "//", "/v2/models/toy/versions/1/infer/", INFER + "/?x=1"])
def test_a_slash_at_the_end_changes_nothing(path):
    async def run():
        app = make_app()
        body, length = write_request([tensor_of(images())], binary=True)
        found = await call(app, path, body, headers={"inference-header-content-length": str(length)})
        app.close()
        return found

    assert asyncio.run(run()).status == 200


@pytest.mark.parametrize(
    "shape", [[0, 2**63], [2**31, 0, 2**31, 3], [0, 2**64 - 1], [2**63], [1, 2**40, 2**40, 3], [0], []]
)
@pytest.mark.parametrize("datatype", ["UINT8", "FP32", "BYTES", "INT64"])
@pytest.mark.parametrize("binary", [True, False])
def test_any_shape_is_400(shape, datatype, binary, caplog):
    data = {"parameters": {"binary_data_size": 0}} if binary else {"data": []}
    body = orjson.dumps({"inputs": [{"name": "images", "datatype": datatype, "shape": shape, **data}]})
    found = infer(body, {"inference-header-content-length": str(len(body))} if binary else {})
    assert found.status == 400
    assert len(found.error) <= 500
    assert not caplog.records


def test_an_error_shows_no_more_than_a_line_of_what_was_sent():
    for fields in ({"datatype": "x" * 9000}, {"name": "x" * 9000}, {"shape": ["x" * 9000]}, {"x" * 9000: 1}):
        body = orjson.dumps({"inputs": [{"name": "images", "datatype": "UINT8", "shape": [0], **fields}]})
        found = infer(body)
        assert found.status == 400
        assert len(found.error) < 300
    body = orjson.dumps({"id": "x", "inputs": [{"name": "x" * 50, "datatype": "UINT8", "shape": [0], "data": []}] * 2})
    assert len(infer(body).error) < 300


def test_when_one_item_fails_the_others_are_cancelled():
    async def run():
        gateway = FakeGateway(hold=True, errors={1: DeadlineError("too late")})
        app = make_app(gateway)
        body, length = write_request([tensor_of(images(3))], binary=True)
        asking = asyncio.ensure_future(call(app, INFER, body, headers={"inference-header-content-length": str(length)}))
        while len(gateway.open) < 3:
            await asyncio.sleep(0)
        gateway.finish(1)
        found = await asking
        app.close()
        return found, gateway.cancelled

    found, cancelled = asyncio.run(run())
    assert found.status == 504
    assert cancelled == [0, 2]


def test_when_a_later_item_is_shed_the_earlier_are_cancelled():
    gateway = FakeGateway(hold=True, refuse=lambda number: OverloadedError("full") if number == 2 else None)
    found = ask(tensor_of(images(4)), gateway)
    assert found.status == 503
    assert found.headers["retry-after"] == "1"
    assert gateway.cancelled == [0, 1]


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [(OverloadedError("no room", 2.5), 503, "3"), (TooLargeError("400 items; at most 128"), 413, None)],
)
@pytest.mark.parametrize("as_files", [False, True])
def test_a_batch_without_room_is_refused_before_anything_is_submitted(error, status, retry_after, as_files):
    gateway = FakeGateway(no_room=error)
    # What is not decoded is not found to be no image.
    batch = Tensor("images", "BYTES", (4,), [b"no image"] * 4) if as_files else tensor_of(images(4))
    found = ask(batch, gateway)
    assert found.status == status
    assert found.error == str(error)
    assert found.headers.get("retry-after") == retry_after
    assert gateway.submitted == []
    assert ask(tensor_of(images()), gateway).status == 200


def test_a_client_that_goes_away_frees_its_slots():
    async def run():
        gateway = FakeGateway(hold=True)
        app = make_app(gateway)
        body, length = write_request([tensor_of(images(3))], binary=True)
        protocol, transport = connect(serve(app))
        headers = {"inference-header-content-length": str(length)}
        protocol.data_received(request_bytes(INFER, body, headers=headers))
        assert app.in_flight == 1
        gateway.finish(1)
        protocol.connection_lost(None)
        assert app.in_flight == 0
        gateway.release()
        app.close()
        return gateway, transport.sent

    gateway, sent = asyncio.run(run())
    assert gateway.cancelled == [0, 2]
    assert sent == b""


def test_a_client_that_goes_away_while_images_are_decoded_submits_nothing():
    async def run():
        gateway = FakeGateway()
        app = make_app(gateway)
        tensor = Tensor("images", "BYTES", (40,), [file_of(images()[0])] * 40)
        body, length = write_request([tensor], binary=True)
        protocol, transport = connect(serve(app))
        headers = {"inference-header-content-length": str(length)}
        protocol.data_received(request_bytes(INFER, body, headers=headers))
        assert app.in_flight == 1
        protocol.connection_lost(None)
        assert app.in_flight == 0
        assert (await call(app, INFER, body, headers=headers)).status == 200
        app.close()
        return gateway, transport.sent

    gateway, sent = asyncio.run(run())
    assert len(gateway.submitted) == 40
    assert sent == b""


@pytest.mark.parametrize("compressed", [False, True])
def test_a_request_that_is_given_up_frees_its_slots(compressed):
    async def run():
        gateway = FakeGateway(hold=True)
        app = make_app(gateway)
        body, length = write_request([tensor_of(images())], binary=True)
        headers = {"inference-header-content-length": str(length)}
        if compressed:  # given up before the task that unpacks it has begun
            body, headers["content-encoding"] = gzip.compress(body), "gzip"
        protocol, transport = connect(serve(app))
        protocol.data_received(request_bytes(INFER, body, headers=headers))
        app.give_up()
        assert app.in_flight == 0
        gateway.release()
        await asyncio.sleep(0)
        app.close()
        (found,) = read_responses(transport.sent, ["POST"])
        return found, gateway

    found, gateway = asyncio.run(run())
    assert found.status == 503
    assert found.error == "the server shut down before the answer was there"
    assert gateway.cancelled == ([] if compressed else [0])


def test_while_the_gateway_is_full_places_are_kept_for_clients_that_had_less():
    async def run():
        places = 20
        full = OverloadedError("all queues are full")
        gateway = FakeGateway(hold=True)
        gateway.refuse = lambda number: full if len(gateway.open) >= places else None
        app = make_app(gateway)
        server = serve(app)
        body, length = write_request([tensor_of(images())], binary=True)
        request = request_bytes(INFER, body, headers={"inference-header-content-length": str(length)})
        greedy = [connect(server) for _ in range(40)]
        polite, transport = connect(server)
        for protocol, _ in greedy:
            protocol.data_received(request)
        assert len(gateway.open) == places
        for _ in range(80):  # whenever an item is answered, all who were refused ask again
            gateway.hold = False
            gateway.finish(min(gateway.open))
            gateway.hold = True
            for protocol, _ in greedy:
                protocol.data_received(request)
        assert len(gateway.open) < places
        polite.data_received(request)
        gateway.release()
        (found,) = read_responses(transport.sent, ["POST"])
        app.close()
        return found.status

    assert asyncio.run(run()) == 200


def test_an_unexpected_error_is_500_and_logged(caplog):
    class Broken(FakeGateway):
        def submit(self, *args, **kwargs):
            raise ZeroDivisionError("secret detail")

    found = ask(tensor_of(images()), Broken())
    assert found.status == 500
    assert found.error == "internal error; the server's log has the details"
    assert "ZeroDivisionError" in caplog.text


def test_while_draining_every_response_closes_its_connection():
    gateway = FakeGateway(draining=True)
    assert ask(tensor_of(images()), gateway).headers["connection"] == "close"
    assert get("/v2", gateway).headers["connection"] == "close"
    assert "connection" not in get("/v2").headers


JSON_BODY = write_request([tensor_of(images(9))], binary=False)[0]


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        ("gzip", gzip.compress(JSON_BODY)),
        ("gzip", gzip.compress(JSON_BODY[:100]) + gzip.compress(b"") + gzip.compress(JSON_BODY[100:])),
        ("gzip", gzip.compress(JSON_BODY) + bytes(512)),
        ("deflate", zlib.compress(JSON_BODY)),
        ("identity", JSON_BODY),
    ],
)
def test_compressed_bodies_are_taken_and_given(encoding, packed):
    found = infer(packed, {"content-encoding": encoding, "accept-encoding": encoding})
    assert found.status == 200
    if encoding == "identity":
        assert "content-encoding" not in found.headers
        body = found.body
    else:
        assert found.headers["content-encoding"] == encoding
        body = gzip.decompress(found.body) if encoding == "gzip" else zlib.decompress(found.body)
    assert len(orjson.loads(body)["outputs"][0]["data"]) == 9 * len(CLASSES)


@pytest.mark.parametrize(
    ("encoding", "body", "status", "message"),
    [
        ("gzip", b"no gzip at all", 400, "the body is not gzip"),
        ("deflate", gzip.compress(JSON_BODY), 400, "the body is not deflate"),
        ("gzip", gzip.compress(JSON_BODY)[:-9], 400, "the gzip body is cut off"),
        ("gzip", gzip.compress(JSON_BODY) + b"more", 400, "the body is not gzip"),
        ("gzip", gzip.compress(JSON_BODY) + gzip.compress(b"more")[:-1], 400, "the gzip body is cut off"),
        ("gzip", gzip.compress(b"") * 5000, 400, "bytes follow the end of the gzip body"),
        ("deflate", zlib.compress(JSON_BODY) + b"more", 400, "4 bytes follow the end of the deflate body"),
        ("gzip", gzip.compress(b"\0" * 200_001), 413, "decompressed body has more than 200000 bytes"),
        ("br", JSON_BODY, 501, "Content-Encoding 'br' is not offered"),
    ],
)
def test_a_bad_compressed_body_is_refused(encoding, body, status, message):
    found = infer(body, {"content-encoding": encoding}, max_body_bytes=200_000)
    assert found.status == status
    assert message in found.error


def test_a_long_wish_for_encodings_is_read_in_part():
    wish = "br," * 400 + "gzip"
    assert "content-encoding" not in infer(JSON_BODY, {"accept-encoding": wish}).headers
    assert infer(JSON_BODY, {"accept-encoding": wish[600:]}).headers["content-encoding"] == "gzip"


def test_a_body_that_unpacks_to_far_more_than_was_sent_is_refused():
    packed = gzip.compress(b'{"inputs":[' + b"{}," * (4 << 20) + b"{}]}", 9)
    found = infer(packed, {"content-encoding": "gzip"})
    assert found.status == 413
    assert f"more than {100 * len(packed)} bytes, 100 times what was sent" in found.error
    little = gzip.compress(JSON_BODY + b" " * 500_000, 9)  # a thousand times, but of little
    assert infer(little, {"content-encoding": "gzip"}).status == 200


def test_ordinary_bodies_do_not_wait_for_large_ones():
    async def run():
        app, free = make_app(), threading.Event()
        app._inference._large_executor.submit(free.wait)
        large, large_transport = connect(serve(app))
        large.data_received(request_bytes(INFER, JSON_BODY + b" " * (5 << 20)))
        packed = gzip.compress(JSON_BODY)
        found = await call(app, INFER, packed, headers={"content-encoding": "gzip"})
        assert large_transport.sent == b""
        free.set()
        while not large_transport.sent:
            await asyncio.sleep(0.001)
        app.close()
        return found.status, read_responses(large_transport.sent, ["POST"])[0].status

    assert asyncio.run(run()) == (200, 200)


def test_bodies_that_take_up_too_much_together_are_503():
    async def run():
        app = make_app(max_bodies_bytes=300_000)
        server = serve(app)
        slow, _ = connect(server)
        whole = request_bytes(INFER, b"x" * 250_000)
        slow.data_received(whole[:200_000])
        assert 190_000 < server.held_bytes < 200_000
        other, transport = connect(server)
        other.data_received(whole)
        (found,) = read_responses(transport.sent, ["POST"])
        assert (found.status, found.headers["retry-after"]) == (503, "1")
        assert "connection" not in found.headers
        other.data_received(request_bytes("/v2", method="GET"))  # little is never refused
        assert len(read_responses(transport.sent, ["POST", "GET"])) == 2
        slow.connection_lost(None)
        assert server.held_bytes == 0
        other.data_received(whole)
        other.connection_lost(None)
        assert server.held_bytes == 0
        for half in (100_000, 149_000):
            slow, _ = connect(server)
            slow.data_received(whole[:200_000])
            other, transport = connect(server)
            other.data_received(whole[:half])
            assert transport.sent[:12] == (b"HTTP/1.1 503" if half > 110_000 else b"")
            slow.connection_lost(None)
            other.connection_lost(None)
        assert server.held_bytes == 0
        app.close()

    asyncio.run(run())


def test_a_decompressed_body_counts_too():
    async def run(limit, busy):
        app = make_app(max_bodies_bytes=limit)
        server = serve(app)
        other, _ = connect(server)
        if busy:
            other.data_received(request_bytes(INFER, b"x" * 250_000)[:100_000])
        packed = gzip.compress(JSON_BODY + b" " * 400_000)
        protocol, transport = connect(server)
        protocol.data_received(request_bytes(INFER, packed, headers={"content-encoding": "gzip"}))
        while not transport.sent:
            await asyncio.sleep(0.001)
        app.close()
        return read_responses(transport.sent, ["POST"])[0].status

    assert asyncio.run(run(300_000, True)) == 503
    assert asyncio.run(run(300_000, False)) == 200  # alone it would not be served later, either
    assert asyncio.run(run(600_000, True)) == 200


def test_a_body_in_many_parts_is_put_together():
    assert infer([JSON_BODY[:5], b"", JSON_BODY[5:100], JSON_BODY[100:]]).status == 200


@pytest.mark.parametrize("encoding", [None, "gzip"])
@pytest.mark.parametrize("size", [(1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_a_long_body_is_the_same_however_it_comes(size, encoding):
    body = JSON_BODY[:-1] + np.random.default_rng(1).choice([9, 10, 32], size).astype(np.uint8).tobytes() + b"}"
    headers = {} if encoding is None else {"content-encoding": encoding}
    sent = body if encoding is None else gzip.compress(body, 0)
    for step in (len(sent), 70_000, 1_001):
        found = infer([sent[at : at + step] for at in range(0, len(sent), step)], headers=headers)
        assert found.status == 200


@pytest.mark.parametrize("parts", [[b"x" * 1001], [b"x" * 600] * 2, [b"x" * 600] * 100])
def test_a_body_over_the_limit_is_refused_while_it_comes(parts):
    found = infer(parts, max_body_bytes=1000)
    assert found.status == 413
    assert "more than 1000 bytes" in found.error
    assert found.headers["connection"] == "close"


def test_a_long_json_body_of_more_items_than_are_ever_taken_is_refused_before_its_values_are_read():
    values = b",".join([b"1"] * (4 * 5 * 3 * 9_000))
    body = b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[9000,4,5,3],"data":[%b]}]}'
    assert len(values) > 1 << 20
    for data in (values, values + b",no number"):
        found = infer(body % data, gateway=FakeGateway(max_items=64))
        assert (found.status, found.error) == (413, "a request may hold at most 64 items, found 9000")
    assert infer(body % values, gateway=FakeGateway()).status == 200


def test_a_long_json_body_is_parsed_aside():
    blanks = b" " * (1 << 20)
    assert infer(JSON_BODY + blanks).status == 200
    assert infer(b"{" + blanks).status == 400
