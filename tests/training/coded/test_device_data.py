"""Matrices, files of examples, messages and stores: what is right goes through, what is wrong is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from evenkeel.errors import ConfigurationError, ProtocolError
from evenkeel.training.coded.data_files import read_examples
from evenkeel.training.coded.device import Device
from evenkeel.training.coded.matrix import DenseMatrix, SparseMatrix, combine, from_arrays
from evenkeel.training.coded.messages import DeviceMessage, MessageReader, encode, size_bytes
from evenkeel.training.coded.store import BlockStore, HeldBlock, Membership


def sparse(table: np.ndarray) -> SparseMatrix:
    rows, columns = np.nonzero(table)
    starts = np.searchsorted(rows, np.arange(len(table) + 1))
    return SparseMatrix(table[rows, columns], columns, starts, table.shape[1])


def tables(seed: int = 0, rows: int = 6, columns: int = 4) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.where(random.random((rows, columns)) < 0.2, random.normal(size=(rows, columns)), 0.0)


@pytest.mark.parametrize("ones", [False, True])
def test_sparse_matrices_do_what_dense_ones_do(ones) -> None:
    table = tables()
    table[3] = 0.0
    thin, thick = sparse(table).converted("float64", ones), DenseMatrix(table).converted("float64", ones)
    random = np.random.default_rng(1)
    assert thin.shape == thick.shape
    right, left = random.normal(size=thin.shape[1]), random.normal(size=6)
    assert thin.times(right) == pytest.approx(thick.times(right))
    assert thin.transposed_times(left) == pytest.approx(thick.transposed_times(left))
    rows = np.array([5, 0, 9, 3, 5])
    assert (thin.picked(rows).dense().values == thick.picked(rows).values).all()
    for first, end in ((0, 6), (2, 5), (3, 4)):
        assert (thin.between(first, end).dense().values == thick.values[first:end]).all()
        assert (thick.between(first, end).values == thick.values[first:end]).all()
    assert (from_arrays(thin.arrays(), "x").transposed_times(left) == thin.transposed_times(left)).all()


def test_sums_of_matrices_are_padded_and_stay_sparse_where_they_are() -> None:
    long, short = tables(0, 9), tables(1, 5)
    wanted = 2.0 * long
    wanted[:5] -= 3.0 * short
    for parts in ([(2.0, sparse(long)), (-3.0, sparse(short))], [(2.0, DenseMatrix(long)), (-3.0, sparse(short))]):
        found = combine(parts)
        values = found.dense().values if isinstance(found, SparseMatrix) else found.values
        assert values == pytest.approx(wanted)
    big = np.zeros((50, 40))
    big[3, 7] = 1.0
    assert isinstance(combine([(1.0, sparse(big)), (1.0, sparse(big))]), SparseMatrix)
    assert isinstance(combine([(1.0, sparse(np.ones((3, 3))))]), DenseMatrix)


@pytest.mark.parametrize(
    "wrong",
    [
        {"columns": np.array([0, 9], np.int32)},
        {"columns": np.array([0], np.int32)},
        {"starts": np.array([0, 2, 1], np.int64)},
        {"starts": np.array([1, 2], np.int64)},
        {"values": np.array([1.0, np.inf])},
        {"width": np.array([], np.int64)},
    ],
)
def test_a_sparse_matrix_from_outside_is_checked(wrong) -> None:
    right = {
        "values": np.array([1.0, 2.0]),
        "columns": np.array([0, 1], np.int32),
        "starts": np.array([0, 1, 2], np.int64),
        "width": np.array([2], np.int64),
    }
    assert from_arrays(right, "x").shape == (2, 2)
    with pytest.raises(ConfigurationError, match="x"):
        from_arrays(right | wrong, "x")


def test_examples_are_read_from_libsvm_text_and_npz(tmp_path: Path) -> None:
    import gzip

    text = b"+1 1:0.5 3:2 # a comment\n\n-1 qid:4 2:1\n"
    (tmp_path / "a.svm").write_bytes(text)
    (tmp_path / "a.svm.gz").write_bytes(gzip.compress(text))
    wanted = np.array([[0.5, 0, 2, 0], [0, 1, 0, 0]])
    for name in ("a.svm", "a.svm.gz"):
        matrix, labels = read_examples(tmp_path / name, 4)
        assert isinstance(matrix, SparseMatrix)
        assert (matrix.dense().values == wanted).all()
        assert labels.tolist() == [1, -1]
    np.savez(tmp_path / "a.npz", X=wanted, y=[1, 0])
    assert read_examples(tmp_path / "a.npz")[0].shape == (2, 4)
    thin = sparse(wanted).arrays()
    np.savez(
        tmp_path / "b.npz", data=thin["values"], indices=thin["columns"], indptr=thin["starts"], shape=(2, 4), y=[1, 0]
    )
    assert read_examples(tmp_path / "b.npz")[0].shape == (2, 4)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"1 0:3", "line 1: expected LIBSVM text"),
        (b"1 1:2\n1 2:1 1:1", "line 2"),
        (b"one 1:2", "line 1"),
        (b"1 1:nan", "row 0, column 0 is not a finite number"),
        (b"nan 1:1", "label 0 is not a finite number"),
        (b"1 9:1", "column 9 although 4 were said"),
        (b"", "0 rows"),
    ],
)
def test_a_wrong_file_of_examples_is_refused(text, says, tmp_path: Path) -> None:
    (tmp_path / "a.svm").write_bytes(text)
    with pytest.raises(ConfigurationError, match=says):
        read_examples(tmp_path / "a.svm", 4)


def test_a_file_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", X=np.array([[{}]], object), y=[1])
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_examples(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", X=np.ones((1, 1)))
    with pytest.raises(ConfigurationError, match="no array y of labels, only X"):
        read_examples(tmp_path / "b.npz")


def messages() -> list[DeviceMessage]:
    return [
        DeviceMessage("hello", {"name": "a", "blocks": {"d0": 1}}),
        DeviceMessage("step", {"n": 1}, {"w": np.arange(400.0), "rows": np.arange(3), "none": np.empty((0, 3))}),
        DeviceMessage("step", {}, {"values": np.ones((3, 5), np.float32)}),
    ]


@given(st.lists(st.integers(1, 4_000), min_size=1, max_size=12))
def test_a_stream_cut_anywhere_gives_the_same_messages(cuts) -> None:
    stream = b"".join(bytes(piece) for message in messages() for piece in encode(message))
    reader, found = MessageReader(), []
    while stream:
        size = cuts[len(found) % len(cuts)]
        found += reader.feed(stream[:size])
        stream = stream[size:]
    assert reader.error is None
    for one, other in zip(found, messages(), strict=True):
        assert (one.kind, one.fields, list(one.arrays)) == (other.kind, other.fields, list(other.arrays))
        assert all((one.arrays[name] == other.arrays[name]).all() for name in one.arrays)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"XX" + data[2:],
        lambda data: data[:2] + b"\x09\x00" + data[4:],
        lambda data: data[:4] + b"\xff\xff\xff\xff" + data[8:],
        lambda data: data[:8] + b"\xff" * 8 + data[16:],
        lambda data: data.replace(b"<f8", b"|O8"),
        lambda data: data.replace(b"[2]", b"[3]"),
        lambda data: data.replace(b"[2]", b"2.5"),
        lambda data: data.replace(b'"kind"', b'"kond"'),
        lambda data: data.replace(b"{", b"[", 1),
    ],
)
def test_a_message_that_breaks_the_rules_ends_the_stream(change) -> None:
    data = b"".join(bytes(piece) for piece in encode(DeviceMessage("step", {"n": 1}, {"w": np.ones(2)})))
    reader = MessageReader()
    assert reader.feed(change(data)) == []
    assert isinstance(reader.error, ProtocolError)
    assert reader.feed(data) == []


def test_a_message_is_as_long_as_the_bytes_that_it_is_sent_as() -> None:
    for message in messages():
        assert size_bytes(message) == sum(len(piece) for piece in encode(message))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_count_as_finite_even_where_their_squares_are_not(dtype) -> None:
    largest = np.full(3, np.finfo(dtype).max)
    assert DeviceMessage("step", {}, {"w": largest}).array("w", 3) is largest
    for wrong in (np.inf, -np.inf, np.nan):
        with pytest.raises(ProtocolError, match="not finite"):
            DeviceMessage("step", {}, {"w": np.array([1, wrong, -wrong], dtype)}).array("w", 3)


def test_what_a_message_lacks_is_said() -> None:
    message = DeviceMessage("step", {"n": True}, {"w": np.array([1.0, np.nan])})
    for ask, says in (
        (lambda: message.array("v", 2), "without the array v"),
        (lambda: message.array("w", 3), r"shape \(2,\); expected \(3,\)"),
        (lambda: message.array("w", 2), "not finite"),
        (lambda: message.whole("n"), "expected a number"),
        (lambda: message.text("name"), "expected a text"),
    ):
        with pytest.raises(ProtocolError, match=says):
            ask()


def test_blocks_outlive_a_restart_and_a_spoilt_file_is_as_good_as_gone(tmp_path: Path, caplog) -> None:
    store = BlockStore(tmp_path)
    store.begin(Membership("ab", "d0", "float32", True))
    store.put("p0", HeldBlock(1, DenseMatrix(np.eye(3))))
    store.put("p0", HeldBlock(2, DenseMatrix(2 * np.eye(3))))
    store.put("d4", HeldBlock(1, sparse(tables()), np.arange(6.0)))
    again = BlockStore(tmp_path)
    assert again.membership == Membership("ab", "d0", "float32", True)
    assert again.versions == {"p0": 2, "d4": 1}
    block = again.get("p0", 2)
    assert block is not None
    assert (block.matrix.times(np.ones(3)) == 2).all()
    assert again.get("p0", 1) is None
    assert len(list(tmp_path.glob("p0-*.npz"))) == 1
    file = next(tmp_path.glob("p0-*.npz"))
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert BlockStore(tmp_path).versions == {"d4": 1}
    assert "was changed" in caplog.text
    again.begin(Membership("cd"))
    assert BlockStore(tmp_path).versions == {}
    assert not list(tmp_path.glob("*.npz"))
    (tmp_path / "store.json").write_text("[]")
    with pytest.raises(ConfigurationError, match=r"store\.json cannot be understood"):
        BlockStore(tmp_path)


def test_a_device_multiplies_some_rows_of_a_block_and_gives_up_what_nobody_waits_for() -> None:
    table, w = np.arange(8.0).reshape(4, 2), np.array([1.0, -2.0])
    device = Device("a", (table, np.ones(4)))
    device.answer(DeviceMessage("adopt", {"training": "ab", "own": "d0", "dtype": "float64", "ones": False}))
    fields = {"training": "ab", "blocks": {"d0": 1}, "spans": {"d0": [[0, 1], [2, 4]]}}
    step = DeviceMessage("step", fields, {"w": w})
    assert (device.answer(step).arrays["zd0"] == (table @ w)[[0, 2, 3]]).all()
    pull = DeviceMessage("pull", fields, {"vd0": np.array([1.0, 2.0, 3.0])})
    assert (device.answer(pull).arrays["gradient"] == np.array([1.0, 2.0, 3.0]) @ table[[0, 2, 3]]).all()
    batch = DeviceMessage("step", fields, {"w": w, "rows": np.array([3, 9, 1, 0])})
    assert (device.answer(batch).arrays["zd0"] == [(table @ w)[3], (table @ w)[1], (table @ w)[0]]).all()
    assert device.work(step) == device.work(pull) == 3 / 8
    both = DeviceMessage("step", {"training": "ab", "blocks": {"d0": 1}, "loss": "squared_error"}, {"w": w})
    assert device.work(both) == 1.0
    assert device.answer(both, lambda: True).kind == "error"
    assert device.answer(both, lambda: False).kind == "products"


@pytest.mark.parametrize(
    "request_",
    [
        DeviceMessage("dance"),
        DeviceMessage("adopt", {"training": 3}),
        DeviceMessage("adopt", {"training": "a", "own": "../d", "dtype": "float64"}),
        DeviceMessage("adopt", {"training": "a", "own": "d0", "dtype": "object"}),
        DeviceMessage("step", {"training": "ab", "blocks": {}}, {"w": np.ones(2)}),
        DeviceMessage("step", {"training": "ab", "blocks": {"d0": 1}}, {"w": np.ones(3)}),
        DeviceMessage("step", {"training": "ab", "blocks": {"d0": 1}}, {"w": np.ones(2), "rows": np.array([-1])}),
        DeviceMessage("step", {"training": "ab", "blocks": {"d0": 1}, "loss": "no"}, {"w": np.ones(2)}),
        DeviceMessage("pull", {"training": "ab", "blocks": {"d0": 1}}, {"vd0": np.ones(9)}),
        DeviceMessage("pull", {"training": "ab", "blocks": {"d0": 7}}, {"vd0": np.ones(4)}),
        *(
            DeviceMessage("step", {"training": "ab", "blocks": {"d0": 1}, "spans": spans}, {"w": np.ones(2)})
            for spans in (
                {"d0": []},
                {"d0": [[0, 5]]},
                {"d0": [[2, 2]]},
                {"d0": [[2, 3], [0, 1]]},
                {"d0": [[0]]},
                {"d0": 3},
            )
        ),
        DeviceMessage("step", {"training": "ab", "blocks": {"d0": 1}, "spans": {"d0": [["0", 2]]}}, {"w": np.ones(2)}),
        DeviceMessage("step", {"training": "ab", "blocks": {"d0": 1}, "spans": 3}, {"w": np.ones(2)}),
        DeviceMessage("pull", {"training": "ab", "blocks": {"d0": 1}, "spans": {"d0": [[0, 2]]}}, {"vd0": np.ones(4)}),
        DeviceMessage("build", {"training": "ab", "block": "../x", "version": 1, "parts": [["", "d0", 1, 1.0]]}),
        DeviceMessage("build", {"training": "ab", "block": "p0", "version": 1, "parts": []}),
        DeviceMessage("build", {"training": "ab", "block": "p0", "version": 1, "parts": [["a"]]}),
        DeviceMessage("build", {"training": "ab", "block": "p0", "version": 1, "parts": [["far", "d0", 1, 1.0]]}),
        DeviceMessage("fetch", {"training": "other", "block": "d0", "version": 1}),
    ],
)
def test_a_device_answers_what_it_cannot_do_with_an_error(request_) -> None:
    device = Device("a", (np.ones((4, 2)), np.ones(4)))
    device.answer(DeviceMessage("adopt", {"training": "ab", "own": "d0", "dtype": "float64", "ones": False}))
    reply = device.answer(request_)
    assert reply.kind == "error"
    assert reply.fields["text"]
    json.dumps(reply.fields)
