"""Requests and responses: what is written is what is read, JSON and binary, over all datatypes."""

import contextlib
import tracemalloc

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from evenkeel.errors import ProtocolError, RequestError, UnsupportedError
from evenkeel.oip import (
    InferResponse,
    RequestedOutput,
    Tensor,
    message,
    numpy_dtype,
    oip_datatype,
    parse_request,
    parse_response,
    write_request,
    write_response,
)

NUMERIC = ["BOOL", *[f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)], "FP16", "FP32", "FP64"]
SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4)


@st.composite
def numeric_tensors(draw):
    datatype = draw(st.sampled_from(NUMERIC))
    dtype = numpy_dtype(datatype)
    elements = hnp.from_dtype(dtype, allow_nan=False, allow_infinity=False)
    data = draw(hnp.arrays(dtype, draw(SHAPES), elements=elements))
    return Tensor("x", datatype, data.shape, data)


@st.composite
def bytes_tensors(draw, elements):
    shape = draw(SHAPES)
    count = int(np.prod(shape))
    return Tensor("x", "BYTES", shape, draw(st.lists(elements, min_size=count, max_size=count)))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).map(str.encode)
ANY_BINARY = numeric_tensors() | bytes_tensors(st.binary(max_size=20))
ANY_JSON = numeric_tensors() | bytes_tensors(TEXTS)


def assert_same(left: Tensor, right: Tensor) -> None:
    assert (left.name, left.datatype, left.shape) == (right.name, right.datatype, right.shape)
    if isinstance(left.data, list):
        assert left.data == right.data
    else:
        assert isinstance(right.data, np.ndarray)
        assert left.data.dtype == right.data.dtype
        assert np.array_equal(left.data, right.data)


@given(ANY_BINARY)
def test_a_binary_request_is_read_as_it_was_written(tensor):
    body, header_length = write_request([tensor], binary=True)
    assert_same(tensor, parse_request(body, header_length).inputs[0])


@given(ANY_JSON)
def test_a_json_request_is_read_as_it_was_written(tensor):
    body, header_length = write_request([tensor], binary=False)
    assert header_length is None
    assert_same(tensor, parse_request(body).inputs[0])


@given(numeric_tensors())
def test_nested_data_is_the_same_as_flat_data(tensor):
    entry = {"name": "x", "datatype": tensor.datatype, "shape": tensor.shape, "data": tensor.data.tolist()}
    assert_same(tensor, parse_request(orjson.dumps({"inputs": [entry]})).inputs[0])


@given(st.lists(ANY_JSON, min_size=1, max_size=4), st.data())
def test_a_response_mixes_both_forms(tensors, data):
    for number, tensor in enumerate(tensors):
        tensor.name = f"t{number}"
    binary = data.draw(st.lists(st.booleans(), min_size=len(tensors), max_size=len(tensors)))
    body, header_length = write_response(InferResponse("m", tensors, "1", "id"), binary)
    assert (header_length is not None) == any(binary)
    read = parse_response(body, header_length)
    assert (read.model_name, read.model_version, read.id) == ("m", "1", "id")
    for tensor, back in zip(tensors, read.outputs, strict=True):
        assert_same(tensor, back)


def test_a_binary_tensor_is_a_view_of_the_body():
    data = np.arange(3072, dtype=np.uint8).reshape(1, 32, 32, 3)
    body, header_length = write_request([Tensor("x", "UINT8", data.shape, data)], binary=True)
    read = parse_request(body, header_length).inputs[0].data
    assert isinstance(read, np.ndarray)
    assert not read.flags.owndata
    assert not read.flags.writeable


def test_the_rest_of_a_request_is_read_too():
    tensor = Tensor("x", "FP32", (1,), np.ones(1, np.float32))
    body, header_length = write_request(
        [tensor],
        [RequestedOutput("a", True), RequestedOutput("b", False), RequestedOutput("c")],
        binary=True,
        request_id="7",
        parameters={"binary_data_output": True, "timeout": 5, "note": "hello", "share": 0.5},
    )
    request = parse_request(body, header_length)
    assert request.id == "7"
    assert request.binary_output
    assert request.parameters["timeout"] == 5
    assert [(output.name, output.binary) for output in request.outputs] == [("a", True), ("b", False), ("c", None)]


def test_header_length_zero_means_one_raw_tensor():
    request = parse_request(b"\x00\xff anything", 0)
    assert request.raw == b"\x00\xff anything"
    assert request.inputs == []


def test_an_empty_list_of_outputs_asks_for_all():
    assert parse_request(request_bytes(outputs=[])).outputs is None


def request_bytes(tensor: object = None, **fields: object) -> bytes:
    tensor = {"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2]} if tensor is None else tensor
    return orjson.dumps({"inputs": [tensor], **fields})


def with_fields(**fields: object) -> bytes:
    tensor = {"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2], **fields}
    return request_bytes({key: value for key, value in tensor.items() if value != "absent"})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "JSON of the message cannot be read"),
        (b"{", "JSON of the message cannot be read"),
        (b'{"inputs": NaN}', "JSON of the message cannot be read"),
        (b"[]", "must be a JSON object"),
        (b"{}", "'inputs' must be a list with at least one tensor"),
        (b'{"inputs": []}', "'inputs' must be a list with at least one tensor"),
        (b'{"inputs": {}}', "'inputs' must be a list"),
        (b'{"inputs": [3]}', "input 0 must be an object, found an integer"),
        (with_fields(name=3), "'name' must be a non-empty string, found an integer"),
        (with_fields(name="absent"), "'name' must be a non-empty string, found nothing"),
        (with_fields(datatype="absent"), "tensor 'x': 'datatype' must be a string"),
        (with_fields(datatype="FLOAT"), "unknown datatype 'FLOAT'; expected one of BOOL, UINT8"),
        (with_fields(shape="absent"), "'shape' must be a list of integers, found nothing"),
        (with_fields(shape=[-1]), "'shape' must hold integers >= 0, found -1"),
        (with_fields(shape=[2.0]), "'shape' must hold integers >= 0, found 2.0"),
        (with_fields(shape=[True]), "'shape' must hold integers >= 0, found True"),
        (with_fields(shape=[1] * 40), "shape has 40 dimensions"),
        (with_fields(shape=[2**62, 2**62, 2]), "elements, but 'data' holds 2"),
        (with_fields(shape=[3]), r"shape \[3\] has 3 elements, but 'data' holds 2"),
        (with_fields(shape=[2, 1], data=[[1], [2, 3]]), "flat, or nested as shape"),
        (with_fields(shape=[2, 1], data=[[1], 2]), "flat, or nested as shape"),
        (with_fields(shape=[1, 2], data=[[[1], [2]]]), "must be a number or an integer, found a list"),
        (with_fields(data="absent"), "expected 'data', or 'binary_data_size'"),
        (with_fields(data={"a": 1}), "'data' must be a list, found an object"),
        (with_fields(data=[1, "2"]), "FP32 elements must be a number or an integer, found a string"),
        (with_fields(data=[1, None]), "found null"),
        (with_fields(data=[1, True]), "found a bool"),
        (with_fields(data=[1, 1e300]), "does not fit into FP32"),
        (with_fields(datatype="UINT8", data=[1, 256]), "does not fit into UINT8"),
        (with_fields(datatype="UINT8", data=[1, -1]), "does not fit into UINT8"),
        (with_fields(datatype="UINT8", data=[1, 2.5]), "UINT8 elements must be an integer, found a number"),
        (with_fields(datatype="INT64", data=[1, 2**63]), "does not fit into INT64"),
        (with_fields(datatype="FP16", data=[1, 1e6]), "does not fit into FP16"),
        (with_fields(datatype="BOOL", data=[True, 1]), "BOOL elements must be a bool, found an integer"),
        (with_fields(datatype="BYTES", data=["a", 1]), "BYTES elements must be strings, found an integer"),
        (with_fields(parameters=[]), "'parameters' must be an object, found a list"),
        (with_fields(parameters={"a": {}}), "parameter 'a' must be a string, number or bool, found an object"),
        (with_fields(parameters={"binary_data_size": 8}), "has both 'data' and 'binary_data_size'"),
        (
            with_fields(data="absent", parameters={"binary_data_size": 8}),
            "no Inference-Header-Content-Length header",
        ),
        (request_bytes(id=3), "'id' must be a string"),
        (request_bytes(parameters=3), "'parameters' must be an object"),
        (request_bytes(parameters={"binary_data_output": 1}), "'binary_data_output' must be a bool"),
        (request_bytes(outputs={}), "'outputs' must be a list"),
        (request_bytes(outputs=[3]), "output 0 must be an object"),
        (request_bytes(outputs=[{}]), "output 0: 'name' must be a non-empty string"),
        (request_bytes(outputs=[{"name": "a"}, {"name": "a"}]), "output 'a' is given more than once"),
        (request_bytes(outputs=[{"name": "a", "parameters": {"binary_data": 1}}]), "'binary_data' must be a bool"),
        (b'{"inputs": [], "inputs": [3]}', "holds the key 'inputs' twice in one object"),
        (b'{"a": ":", "inputs": [{"name": "x", "name": "y"}]}', "holds the key 'name' twice"),
        (b'{"inputs": [{"name": "x"}], "parameters": {"a": 1, "\\u0061": 2}}', "holds the key 'a' twice"),
        (b'{"inputs": [[{"a": 1, "a": 2}]]}', "holds the key 'a' twice"),
        (b'{"a": ":", "inputs": ' + b"[" * 1010 + b"]" * 1010 + b"}", "nested too deeply"),
        (b'{"a": ":", "inputs": [' + b"9" * 5000 + b"]}", "input 0 must be an object|cannot be read"),
        (request_bytes(id="x" * 4097), "'id' has 4097 characters; at most 4096"),
        (request_bytes(id=[[]] * 3), "'id' must be a string, found a list"),
        (request_bytes(parameters={"binary_data_output": "x" * 500}), r"found 'x{60}'\.\.\.$"),
        (with_fields(name="x" * 500, datatype="FLOAT"), "unknown datatype 'FLOAT'"),
        (with_fields(datatype="y" * 500), r"unknown datatype 'y{60}'\.\.\.; expected"),
        (with_fields(shape=[[]]), "'shape' must hold integers >= 0, found a list"),
        (with_fields(shape=[0, 2**63], data=[]), "no tensor can have the shape"),
        (with_fields(shape=[0, 2**64 - 1], data=[]), "no tensor can have the shape"),
        (with_fields(shape=[2**31, 0, 2**31, 3], data=[]), "no tensor can have the shape"),
        (request_bytes(outputs=[{"name": str(n)} for n in range(65)]), "'outputs' holds 65 entries; at most 64"),
        (orjson.dumps({"inputs": [{}] * 65}), "'inputs' holds 65 entries; at most 64"),
        (b'{"inputs":[' + b"{}," * 30_000 + b"{}]}", "values outside of numeric 'data'; at most 20000"),
        (
            orjson.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}] * 2}),
            "input 'x' is given more than once",
        ),
    ],
)
def test_a_malformed_request_is_refused_in_words(body, message):
    with pytest.raises(RequestError, match=message):
        parse_request(body)


def binary_request(size: object, data: bytes, *, datatype: str = "FP32", shape: object = (2,)) -> tuple[bytes, int]:
    tensor = {"name": "x", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}
    text = request_bytes(tensor)
    return text + data, len(text)


@pytest.mark.parametrize(
    ("request_parts", "message"),
    [
        (binary_request(8, b"1234567"), "binary_data_size is 8, but only 7 bytes"),
        (binary_request(8, b"123456789"), "1 bytes of binary data follow the last tensor"),
        (binary_request(7, b"1234567"), r"shape \[2\] of FP32 takes 8 bytes, but binary_data_size is 7"),
        (binary_request(-8, b"12345678"), "must be an integer >= 0, found -8"),
        (binary_request(True, b"12345678"), "must be an integer >= 0, found True"),
        (binary_request("8", b"12345678"), "must be an integer >= 0, found '8'"),
        (binary_request(8, b"", shape=[2**40, 2**40]), "takes 4835703278458516698824704 bytes"),
        (binary_request(2, b"\x00\x02", datatype="BOOL"), "a BOOL is one byte, 0 or 1"),
        (binary_request(3, b"\x01\x00\x00", datatype="BYTES", shape=[1]), "the length of element 0 is cut off"),
        (binary_request(5, b"\x02\x00\x00\x00a", datatype="BYTES", shape=[1]), "says 2 bytes, but 1 are left"),
        (binary_request(5, b"\x01\x00\x00\x00a", datatype="BYTES", shape=[2]), "shape says 2 elements"),
        (binary_request(5, b"\xff\xff\xff\xffa", datatype="BYTES", shape=[1]), "says 4294967295 bytes"),
        (binary_request(0, b"", shape=[0, 2**63]), "no tensor can have the shape"),
        (binary_request(0, b"", shape=[2**31, 0, 2**31, 3]), "no tensor can have the shape"),
        (binary_request(12, b"\x00" * 12, datatype="BYTES", shape=[2]), "shape says 2 elements, .* holds more"),
        (binary_request(0, b"", datatype="BYTES", shape=[2**16 + 1]), "BYTES tensor of 65537 elements; at most 65536"),
        ((b"{}", 3), "Inference-Header-Content-Length is 3, but the body has 2 bytes"),
    ],
)
def test_a_wrong_binary_section_is_refused_in_words(request_parts, message):
    with pytest.raises(RequestError, match=message):
        parse_request(*request_parts)


def test_what_is_understood_but_not_offered_is_501():
    with pytest.raises(UnsupportedError, match="BF16 is not offered; send FP32"):
        parse_request(with_fields(datatype="BF16"))
    with pytest.raises(UnsupportedError, match="'classification' is not offered"):
        parse_request(request_bytes(outputs=[{"name": "a", "parameters": {"classification": 3}}]))
    with pytest.raises(UnsupportedError, match="no datatype in the Open Inference Protocol"):
        oip_datatype(np.dtype("complex64"))


@given(st.binary(max_size=60), st.integers(0, 70) | st.none())
def test_any_bytes_are_a_request_or_a_request_error(body, header_length):
    with contextlib.suppress(RequestError):
        parse_request(body, header_length)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = {
    "name": st.just("x") | JSON_VALUES,
    "shape": st.lists(st.integers(0, 4), max_size=3) | JSON_VALUES,
    "datatype": st.sampled_from([*NUMERIC, "BYTES", "BF16"]) | JSON_VALUES,
    "data": st.lists(st.integers(0, 300) | st.text(max_size=2), max_size=6) | JSON_VALUES,
    "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(0, 20)}) | JSON_VALUES,
}


@settings(suppress_health_check=[HealthCheck.too_slow])  # on a busy machine the first values take a second to make
@given(st.fixed_dictionaries({}, optional=FIELDS), st.binary(max_size=20), st.booleans())
def test_any_tensor_is_consistent_or_refused(tensor, tail, as_binary):
    text = orjson.dumps({"inputs": [tensor]})
    try:
        request = parse_request(text + tail if as_binary else text, len(text) if as_binary else None)
    except RequestError:
        return
    read = request.inputs[0]
    size = len(read.data) if isinstance(read.data, list) else read.data.size
    assert size == int(np.prod(read.shape, dtype=object))
    if isinstance(read.data, np.ndarray):
        assert read.data.shape == read.shape
        assert read.data.dtype == numpy_dtype(read.datatype)


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b'{"outputs": [{}]}', b'{"outputs": [], "model_name": 3}', b'{"outputs": [], "id": 3}'],
)
def test_a_malformed_response_is_a_protocol_error(body):
    with pytest.raises(ProtocolError, match="the server's response is malformed"):
        parse_response(body)


def test_a_response_may_carry_parameters_that_are_not_ours():
    response = parse_response(b'{"model_name": "m", "outputs": [], "parameters": {"headers": {}, "a": 1}}')
    assert response.parameters == {"a": 1}


def test_bytes_that_are_not_text_have_no_json_form():
    with pytest.raises(RequestError, match="ask for binary data"):
        write_response(InferResponse("m", [Tensor("x", "BYTES", (1,), [b"\xff"])]), [False])


def test_null_is_the_same_as_absent_where_a_field_is_optional():
    tensor = {"name": "x", "datatype": "UINT8", "shape": [1], "data": None, "parameters": {"binary_data_size": 1}}
    tensor["parameters"]["headers"] = tensor["parameters"]["content_type"] = None
    output = {"name": "a", "parameters": None}
    text = request_bytes(tensor, id=None, parameters={"headers": None, "timeout": 5}, outputs=[output])
    request = parse_request(text + b"\x07", len(text))
    assert request.inputs[0].parameters == {"binary_data_size": 1}
    assert (request.id, request.parameters, request.outputs) == (None, {"timeout": 5}, [RequestedOutput("a")])
    assert parse_request(request_bytes(outputs=None, parameters=None)).outputs is None
    with pytest.raises(RequestError, match="expected 'data', or 'binary_data_size'"):
        parse_request(with_fields(data=None))


@contextlib.contextmanager
def reading(short_bytes: int, array_bytes: int, piece_bytes: int):
    """Other limits of what is a short text, a long array and a piece of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(message, "_SHORT_BYTES", short_bytes)
        patch.setattr(message, "_LONG_ARRAY_BYTES", array_bytes)
        patch.setattr(message, "_PIECE_BYTES", piece_bytes)
        yield


def outcome(body: bytes) -> object:
    try:
        tensor = parse_request(body).inputs[0]
    except RequestError as error:
        return type(error)
    data = tensor.data if isinstance(tensor.data, list) else (tensor.data.dtype.str, tensor.data.tolist())
    return tensor.name, tensor.shape, tensor.parameters, data


def long_outcome(body: bytes) -> object:
    with reading(0, 0, 5):
        return outcome(body)


@given(ANY_JSON, st.booleans(), st.booleans())
def test_a_long_text_is_read_as_a_short_one_is(tensor, nested, spaced):
    assume(0 not in tensor.shape)
    data = [e.decode() for e in tensor.data] if isinstance(tensor.data, list) else tensor.data.tolist()
    if not nested and not isinstance(tensor.data, list):
        data = tensor.data.reshape(-1).tolist()
    entry = {"name": "x", "datatype": tensor.datatype, "shape": tensor.shape, "data": data}
    body = orjson.dumps({"inputs": [entry]}, option=orjson.OPT_INDENT_2 if spaced else None)
    assert long_outcome(body) == outcome(body)


PIECES = st.lists(
    st.sampled_from([b"[", b"]", b",", b"1", b"2", b" ", b"-", b".5", b"e2", b"true", b"null", b'"a"', b"{", b"}"]),
    max_size=12,
).map(b"".join)


@given(PIECES, st.sampled_from([b"[2]", b"[1,2]", b"[2,1]", b"[0]", b"[]"]), st.sampled_from(["FP32", "UINT8", "BOOL"]))
def test_what_is_no_data_is_refused_in_a_long_text_too(data, shape, datatype):
    body = b'{"inputs":[{"name":"x","datatype":"%b","shape":%b,"data":[%b]}]}' % (datatype.encode(), shape, data)
    expected = outcome(body)
    # An array without values is the one thing that a long text cannot have.
    assert long_outcome(body) == expected or (isinstance(expected, tuple) and 0 in expected[1])


@pytest.mark.parametrize(
    "data", ["[[1,2]5,[3,4]]", "[1 2,3,4]", "[1,,2,3]", "[1,2,3,4,]", "[[1,2,3],[4]]", "[[1,2],[3,4]", '"data":[1]']
)
def test_a_long_array_hides_no_error(data):
    body = '{"inputs":[{"name":"x","datatype":"UINT8","shape":[2,2],"data":%s}]}' % data  # noqa: UP031
    assert isinstance(long_outcome(body.encode()), type)


@pytest.mark.parametrize("text", [b'{"data":[1]},', b'{"data":[', b'"\\"data":[', b'"data":[,'])
def test_a_text_full_of_data_is_looked_through_a_bounded_number_of_times(text):
    class Counted(bytes):
        looks = 0

        def find(self, *args):
            Counted.looks += 1
            return super().find(*args)

    with pytest.raises(RequestError):
        message.read_message(Counted(b'{"inputs":[' + text * 60_000), False)
    assert 0 < Counted.looks < 1000


def test_no_sender_can_name_the_mark_of_a_long_array():
    assert isinstance(outcome(with_fields(data="0" * 32 + ":0")), type)


def test_data_in_other_places_is_left_alone():
    entry = {"name": "data", "datatype": "UINT8", "shape": [40_000], "data": [7] * 40_000, "parameters": {"data": 1}}
    request = parse_request(request_bytes(entry, id='"data":[1,2]', parameters={"data": "\\"}))
    assert request.id == '"data":[1,2]'
    assert request.inputs[0].parameters == {"data": 1}
    assert np.array_equal(request.inputs[0].data, np.full(40_000, 7, np.uint8))


def test_a_long_text_takes_little_more_memory_than_its_tensor():
    body = request_bytes({"name": "x", "datatype": "UINT8", "shape": [1_000_000], "data": [200] * 1_000_000})
    tracemalloc.start()
    try:
        parse_request(body)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(body)
    finally:
        tracemalloc.stop()


def test_a_tensor_may_be_refused_before_a_long_array_of_its_values_is_read():
    entry = {"name": "x", "datatype": "FP32", "shape": [100_000], "data": [1.5] * 100_000}
    heads = []

    def refuse(head):
        heads.append((head.name, head.datatype, head.shape))
        raise RequestError("too many")

    wrong_values = orjson.dumps({"inputs": [entry]}).replace(b"1.5,1.5,", b"true,,", 1)
    with pytest.raises(RequestError, match="too many"):
        parse_request(wrong_values, None, refuse)
    assert heads == [("x", "FP32", (100_000,))]


def test_a_long_array_of_blanks_is_refused_since_it_would_be_read_in_one_step():
    body = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[2],"data":[1,%b2]}]}'
    assert parse_request(body % (b" " * (1 << 19))).inputs[0].data.tolist() == [1, 2]
    with pytest.raises(RequestError, match="1048576 characters without a comma"):
        parse_request(body % (b" " * (3 << 20)))
