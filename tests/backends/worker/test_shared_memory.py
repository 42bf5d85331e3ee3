"""Slots of shared memory: what is written is read, bounds are checked, nothing is left."""

import os

import numpy as np
import pytest

from backend_helpers import open_files
from evenkeel.backends.worker.frames import FrameKind, FrameReader, encode_tensor
from evenkeel.backends.worker.shared_memory import SharedMemoryError, SlotReader, SlotWriter
from evenkeel.errors import ProtocolError


def task_frame(tensor, slot):
    [frame] = FrameReader().feed(b"".join(encode_tensor(FrameKind.TASK, 1, tensor, slot=slot)))
    return frame


def test_a_tensor_written_to_a_slot_is_read_without_a_copy():
    writer = SlotWriter(3, 10_000)
    reader = SlotReader(writer.offer())
    writer.seal()
    first, second = writer.take(9_000), writer.take(9_000)
    one, other = np.arange(1200, dtype=np.float32).reshape(20, 60).T, np.arange(900, dtype=">i8")
    writer.write(first, one)
    writer.write(second, other)
    read = reader.tensor(task_frame(one, first))
    np.testing.assert_array_equal(read, one)
    np.testing.assert_array_equal(reader.tensor(task_frame(other, second)), other)
    assert not read.flags.writeable
    writer.write(first, one + 1)
    np.testing.assert_array_equal(read, one + 1)  # the very memory, not a copy of it
    writer.close()


def test_slots_run_out_and_come_back():
    writer = SlotWriter(2, 4096)
    assert writer.take(4097) is None
    slots = {writer.take(1), writer.take(4096)}
    assert slots == {0, 1}
    assert writer.take(1) is None
    writer.give_back(1)
    assert writer.take(1) == 1
    writer.close()


def test_nothing_is_left_and_nobody_else_can_open_it():
    before = set(os.listdir("/dev/shm"))
    writer = SlotWriter(2, 4096)
    offer = writer.offer()
    assert set(os.listdir("/dev/shm")) == before
    assert open_files()
    writer.seal()
    with pytest.raises(SharedMemoryError, match="cannot be opened"):
        SlotReader(offer)
    writer.close()
    assert not open_files()


@pytest.mark.parametrize(("slot", "rows"), [(2, 1), (2**31, 1), (0, 2), (1, 2)])
def test_a_task_beyond_its_slot_is_refused(slot, rows):
    writer = SlotWriter(2, 4096)
    reader = SlotReader(writer.offer())
    with pytest.raises(ProtocolError, match="slot"):
        reader.tensor(task_frame(np.zeros((rows, 4096), np.uint8), slot))
    writer.close()


def test_an_offer_that_is_not_sealed_memory_is_refused(tmp_path):
    file = tmp_path / "plain"
    file.write_bytes(bytes(8192))
    unsealed = os.memfd_create("evenkeel-test", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 8192)
    read_end, write_end = os.pipe()
    with file.open("rb") as plain:
        sizes = {"slots": 2, "slot_bytes": 4096}
        me = f"/proc/{os.getpid()}/fd"
        for offer, says in [
            ({"path": str(file), **sizes}, "is not /proc"),
            ({"path": 7, **sizes}, "is not /proc"),
            ({}, "is not /proc"),
            ({"path": f"{me}/{plain.fileno()}", **sizes}, "cannot be opened|not sealed"),
            ({"path": f"{me}/{unsealed}", **sizes}, "not sealed"),
            ({"path": f"{me}/{unsealed}", "slots": 3, "slot_bytes": 4096}, "has not 12288 bytes"),
            ({"path": f"{me}/{read_end}", **sizes}, "has not"),
            ({"path": f"{me}/99999", **sizes}, "cannot be opened"),
            ({"path": f"{me}/{unsealed}", "slots": -2, "slot_bytes": -4096}, "slots of"),
            ({"path": f"{me}/{unsealed}", "slots": True, "slot_bytes": 8192}, "slots of"),
            ({"path": f"{me}/{unsealed}", "slots": 2**20, "slot_bytes": 2**20}, "at most"),
        ]:
            with pytest.raises(SharedMemoryError, match=says):
                SlotReader(offer)
    for number in (unsealed, read_end, write_end):
        os.close(number)
