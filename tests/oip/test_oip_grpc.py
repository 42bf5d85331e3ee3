"""gRPC messages, against the protobuf library and tritonclient's own classes; the fast reader against the plain one."""

import random

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, strategies as st

from evenkeel.errors import ProtocolError, RequestError, UnsupportedError
from evenkeel.oip import InferResponse, Tensor, TensorHead
from evenkeel.oip.grpc import (
    RepeatedCalls,
    parse_infer_request,
    parse_infer_response,
    read_target,
    write_infer_request,
    write_infer_response,
)
from evenkeel.oip.protobuf import read, write, write_field
from evenkeel.oip.service import INDEX, MODEL_METADATA, MODEL_REQUEST, SERVER_METADATA
from triton_grpc import service_pb2 as triton

TYPED = {
    "BOOL": ("bool_contents", [True, False, True]),
    "INT8": ("int_contents", [-128, 0, 127]),
    "INT16": ("int_contents", [-(2**15), 0, 2**15 - 1]),
    "INT32": ("int_contents", [-(2**31), 0, 2**31 - 1]),
    "INT64": ("int64_contents", [-(2**63), 0, 2**63 - 1]),
    "UINT8": ("uint_contents", [0, 7, 255]),
    "UINT16": ("uint_contents", [0, 7, 2**16 - 1]),
    "UINT32": ("uint_contents", [0, 7, 2**32 - 1]),
    "UINT64": ("uint64_contents", [0, 7, 2**64 - 1]),
    "FP32": ("fp32_contents", [0.5, -1.0, 3.0]),
    "FP64": ("fp64_contents", [0.1, -1e300, 3.0]),
    "BYTES": ("bytes_contents", [b"a", b"", b"\xff\x00"]),
}


def request(**fields):
    return triton.ModelInferRequest(**{"model_name": "toy", **fields})


def raw_request(shape=(1, 4, 5, 3), datatype="UINT8", fill=7):
    message = request()
    message.inputs.add(name="images", datatype=datatype, shape=shape)
    size = int(np.prod(shape)) * {"UINT8": 1, "FP32": 4}[datatype]
    message.raw_input_contents.append(bytes([fill]) * size)
    return message


def same(one, other) -> bool:
    """Two requests, or two errors, say the same."""
    if isinstance(one, RequestError) or isinstance(other, RequestError):
        return type(one) is type(other) and str(one) == str(other)
    for ours, theirs in zip(one[2].inputs, other[2].inputs, strict=True):
        data = np.array_equal(ours.data, theirs.data) and getattr(ours.data, "dtype", 0) == getattr(
            theirs.data, "dtype", 0
        )
        if not data or (ours.name, ours.shape, ours.parameters) != (theirs.name, theirs.shape, theirs.parameters):
            return False
    rest = [(name, version, got.outputs, got.id, got.parameters) for name, version, got in (one, other)]
    return rest[0] == rest[1]


def attempt(parse, message):
    try:
        return parse(message)
    except RequestError as error:
        return error


@pytest.mark.parametrize("datatype", TYPED)
@pytest.mark.parametrize("packed", [True, False])
def test_typed_contents(datatype, packed):
    field, values = TYPED[datatype]
    message = request()
    tensor = message.inputs.add(name="x", datatype=datatype, shape=[3, 1])
    getattr(tensor.contents, field).extend(values)
    wire = message.SerializeToString()
    if not packed and datatype != "BYTES":
        # Each value alone, as writers of the older syntax do.
        number = tensor.contents.DESCRIPTOR.fields_by_name[field].number
        one = type(tensor.contents)()
        alone = b""
        for value in values:
            one.Clear()
            getattr(one, field).append(value)
            payload = one.SerializeToString()[2:]
            kind = {"FP32": 5, "FP64": 1}.get(datatype, 0)
            alone += bytes([number << 3 | kind]) + payload
        head = write_field(1, b"x") + write_field(2, datatype.encode()) + write_field(3, b"\x03\x01")
        wire = write_field(1, b"toy") + write_field(5, head + write_field(5, alone))
        assert triton.ModelInferRequest.FromString(wire) == message
    found = parse_infer_request(wire)[2].inputs[0]
    assert found.shape == (3, 1)
    assert np.ravel(found.data).tolist() == values if datatype != "BYTES" else found.data == values


def test_many_integers_are_read_in_pieces_and_are_the_same():
    chance = random.Random(1)
    values = [chance.randrange(-(2**31), 2**31) >> chance.randrange(31) for _ in range(100_000)]
    message = request()
    message.inputs.add(name="x", datatype="INT32", shape=[len(values)]).contents.int_contents.extend(values)
    assert parse_infer_request(message.SerializeToString())[2].inputs[0].data.tolist() == values


def test_everything_else_of_a_request():
    message = raw_request()
    message.model_version, message.id = "3", "seven"
    message.parameters["timeout"].int64_param = -5
    message.parameters["exact"].bool_param = False
    message.parameters["min_accuracy"].double_param = 0.9
    message.parameters["on_miss"].string_param = "reject"
    message.parameters["large"].uint64_param = 2**64 - 1
    message.inputs[0].parameters["maximum"].int64_param = 255
    message.outputs.add(name="label").parameters["classification"].int64_param = 0
    name, version, found = parse_infer_request(message.SerializeToString())
    assert (name, version, found.id) == ("toy", "3", "seven")
    assert found.parameters == {
        "timeout": -5,
        "exact": False,
        "min_accuracy": 0.9,
        "on_miss": "reject",
        "large": 2**64 - 1,
    }
    assert found.inputs[0].parameters == {"maximum": 255}
    assert [output.name for output in found.outputs] == ["label"]
    assert found.binary_output
    assert read_target(message.SerializeToString()) == ("toy", "3")


def typed(datatype, shape, **contents):
    message = request()
    tensor = message.inputs.add(name="x", datatype=datatype, shape=shape)
    for name, values in contents.items():
        getattr(tensor.contents, name).extend(values)
    return message


def with_raw(message, *raws):
    message.raw_input_contents.extend(raws)
    return message


def with_shared_memory():
    message = typed("FP32", [1])
    message.inputs[0].parameters["shared_memory_region"].string_param = "r"
    return message


def with_output(**parameters):
    message = raw_request()
    output = message.outputs.add(name="label")
    for name, value in parameters.items():
        output.parameters[name].int64_param = value
    return message


@pytest.mark.parametrize(
    ("message", "error", "says"),
    [
        (request(), RequestError, "'inputs' must hold at least one tensor"),
        (typed("FP32", [2], fp32_contents=[1.0]), RequestError, "has 2 elements, but fp32_contents holds 1"),
        (typed("FP32", [1], int_contents=[1]), RequestError, "values of FP32 belong in fp32_contents"),
        (typed("UINT8", [1], uint_contents=[256]), RequestError, "does not fit into UINT8"),
        (typed("INT8", [1], int_contents=[-129]), RequestError, "does not fit into INT8"),
        (typed("FP16", [1]), UnsupportedError, "FP16 has no typed contents"),
        (typed("BF16", [1]), UnsupportedError, "BF16 is not offered"),
        (typed("WORD", [1]), RequestError, "unknown datatype 'WORD'"),
        (typed("BYTES", [2], bytes_contents=[b"a"]), RequestError, "says 2 elements, but bytes_contents holds 1"),
        (typed("FP32", [-1]), RequestError, "integers >= 0"),
        (typed("FP32", [1] * 17), RequestError, "17 dimensions"),
        (typed("FP32", [2**40, 0, 2**40]), RequestError, "no tensor can have the shape"),
        (with_raw(typed("FP32", [1], fp32_contents=[1.0]), bytes(4)), RequestError, "has both contents and raw_input"),
        (with_raw(typed("FP32", [1]), bytes(4), bytes(4)), RequestError, "holds 2 tensors, but there are 1 inputs"),
        (with_raw(typed("FP32", [2]), bytes(4)), RequestError, "takes 8 bytes, found 4"),
        (with_raw(typed("BOOL", [1]), b"\x02"), RequestError, "a BOOL is one byte, 0 or 1"),
        (with_raw(typed("BYTES", [1]), b"\x05\x00\x00\x00abc"), RequestError, "element 0 says 5 bytes, but 3 are left"),
        (with_shared_memory(), UnsupportedError, "shared memory is not offered"),
        (with_output(classification=3), UnsupportedError, "'classification' is not offered"),
        (request(inputs=[{"name": ""}]), RequestError, "'name' must not be empty"),
        (request(inputs=[{"name": "a"}] * 65), RequestError, "65 entries"),
        (raw_request().__class__(inputs=2 * [raw_request().inputs[0]]), RequestError, "tensor 'images': shape"),
        (request(id="x" * 4097, inputs=[{"name": "a"}]), RequestError, "4097 characters"),
        (request(parameters={"a": {}}, inputs=[{"name": "a"}]), RequestError, "parameter 'a' has no value"),
    ],
)
def test_what_is_wrong_is_said(message, error, says):
    with pytest.raises(error, match=says):
        parse_infer_request(message.SerializeToString())


@pytest.mark.parametrize(
    "wire",
    [
        b"\xff",
        b"\x0a\x05ab",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x0b",  # a group
        b"\x00\x01",  # a field without a number
        b"\x08\x01",  # the name as a number
        b"\x0a\x01\xff",  # the name is not UTF-8
        20_000 * b"\x3a\x00",
    ],
)
def test_what_is_no_message_is_refused(wire):
    with pytest.raises(RequestError):
        parse_infer_request(wire)


def test_many_small_fields_are_refused_and_not_read():
    contents = 20_000 * b"\x35\x00\x00\x00\x00"
    head = write_field(1, b"x") + write_field(2, b"FP32") + write_field(3, b"\xa0\x9c\x01")
    with pytest.raises(RequestError, match="more than 10000 fields"):
        parse_infer_request(write_field(5, head + write_field(5, contents)))


def test_a_tensor_is_checked_before_its_values_are_read():
    heads = []

    def check(head):
        heads.append(head)
        raise RequestError("not that one")

    with pytest.raises(RequestError, match="not that one"):
        parse_infer_request(typed("FP32", [3], fp32_contents=[1.0]).SerializeToString(), check)
    assert heads == [TensorHead("x", "FP32", (3,))]


def test_a_request_that_comes_again_is_read_as_if_it_were_new():
    calls = RepeatedCalls()
    for fill in range(3):
        for message in (raw_request(fill=fill), raw_request((2, 4, 5, 3), fill=fill), raw_request(datatype="FP32")):
            wire = message.SerializeToString()
            assert same(calls.parse(wire), parse_infer_request(wire))
            # Of the same length, but not the same.
            cut = wire[:-3] + b"\x42\x01a"
            assert same(attempt(calls.parse, cut), attempt(parse_infer_request, cut))


@given(st.integers(0, 2**32))
def test_damaged_messages_are_read_as_protobuf_reads_them_or_refused(seed):
    chance = random.Random(seed)
    message = raw_request() if chance.random() < 0.5 else typed("INT32", [3], int_contents=[1, -1, 300])
    message.id = chance.choice(["", "a", "long" * 10])
    message.parameters["exact"].bool_param = True
    wire = bytearray(message.SerializeToString())
    calls = RepeatedCalls()
    attempt(calls.parse, bytes(wire))
    for _ in range(chance.choice((0, 1, 2))):
        wire[chance.randrange(len(wire))] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    ours = attempt(parse_infer_request, bytes(wire))
    assert same(attempt(calls.parse, bytes(wire)), ours)
    if isinstance(ours, RequestError):
        return
    try:
        theirs = triton.ModelInferRequest.FromString(bytes(wire))
    except DecodeError:
        # Of fields that mean nothing here we do not look at what is inside.
        return
    name, version, found = ours
    assert (name, version, found.id or "") == (theirs.model_name, theirs.model_version, theirs.id)
    assert [tensor.name for tensor in found.inputs] == [tensor.name for tensor in theirs.inputs]
    assert [list(tensor.shape) for tensor in found.inputs] == [list(tensor.shape) for tensor in theirs.inputs]
    for place, tensor in enumerate(found.inputs):
        if theirs.raw_input_contents:
            assert isinstance(tensor.data, list) or tensor.data.tobytes() == theirs.raw_input_contents[place]


RESPONSE = InferResponse(
    "toy",
    [
        Tensor("scores", "FP32", (2, 3), np.arange(6, dtype=np.float32).reshape(2, 3)),
        Tensor("label", "BYTES", (2,), [b"dark", b""]),
    ],
    "1",
    "seven",
)


def test_a_response_is_read_by_others_and_by_us():
    wire = write_infer_response(RESPONSE)
    theirs = triton.ModelInferResponse.FromString(wire)
    assert (theirs.model_name, theirs.model_version, theirs.id) == ("toy", "1", "seven")
    assert [(o.name, o.datatype, list(o.shape)) for o in theirs.outputs] == [
        ("scores", "FP32", [2, 3]),
        ("label", "BYTES", [2]),
    ]
    assert theirs.raw_output_contents[1] == b"\x04\x00\x00\x00dark\x00\x00\x00\x00"
    ours = parse_infer_response(wire)
    assert np.array_equal(ours.outputs[0].data, RESPONSE.outputs[0].data)
    assert ours.outputs[1].data == [b"dark", b""]
    theirs.ClearField("raw_output_contents")
    theirs.outputs[0].contents.fp32_contents.extend(range(6))
    theirs.outputs[1].contents.bytes_contents.extend([b"dark", b""])
    assert np.array_equal(parse_infer_response(theirs.SerializeToString()).outputs[0].data, RESPONSE.outputs[0].data)


@pytest.mark.parametrize("wire", [b"\xff", b"\x08\x01", write_field(6, b"x"), write_field(5, b"")])
def test_a_malformed_response_is_the_servers_fault(wire):
    with pytest.raises(ProtocolError, match="the server's response is malformed"):
        parse_infer_response(wire)


def test_our_requests_are_read_by_others():
    head = TensorHead("images", "UINT8", (1, 4, 5, 3))
    wire = write_infer_request("toy", "2", head, ["scores"], {"exact": True, "timeout": 5}, {"maximum": 255})
    theirs = triton.ModelInferRequest.FromString(wire + write_field(7, bytes(60)))
    expected = with_raw(request(model_version="2"), bytes(60))
    tensor = expected.inputs.add(name="images", datatype="UINT8", shape=[1, 4, 5, 3])
    tensor.parameters["maximum"].int64_param = 255
    expected.parameters["exact"].bool_param = True
    expected.parameters["timeout"].int64_param = 5
    expected.outputs.add(name="scores")
    assert theirs == expected


@pytest.mark.parametrize(
    ("schema", "message", "values"),
    [
        (SERVER_METADATA, triton.ServerMetadataResponse, {"name": "e", "version": "1", "extensions": ["a", "b"]}),
        (MODEL_REQUEST, triton.ModelReadyRequest, {"name": "toy"}),
        (
            MODEL_METADATA,
            triton.ModelMetadataResponse,
            {
                "name": "toy",
                "versions": ["1"],
                "platform": "p",
                "inputs": [{"name": "i", "datatype": "FP32", "shape": [-1, 3, 2**40]}],
                "outputs": [{"name": "o", "datatype": "BYTES", "shape": [-1]}, {"name": "q"}],
            },
        ),
        (INDEX, triton.RepositoryIndexResponse, {"models": [{"name": "a", "state": "READY"}, {"name": "b"}]}),
    ],
)
def test_the_other_messages_are_those_of_the_protocol(schema, message, values):
    wire = write({**values, "unknown": 5}, schema)
    assert message.FromString(wire) == message(**values)
    assert read(message(**values).SerializeToString(), schema) == values
