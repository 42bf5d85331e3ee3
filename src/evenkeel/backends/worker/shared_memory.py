"""Shares memory between a client and a worker on one machine: large tensors are written once and never sent.

The client makes an anonymous file (memfd), seals its size and tells the worker where to open it (`/proc/PID/fd/N`,
which the kernel grants to the same user only). It has no name in any folder, so nothing is left behind however the two
end; and as its size is sealed, reading a slot can never fault. The file is cut into slots of equal size; a task takes
one and gives it back with its reply. Where the worker cannot open the file (another user, another container), tensors
go through the socket.
"""

import fcntl
import mmap
import os
import re
import stat
from typing import Any

import numpy as np

from evenkeel.arrays import Array
from evenkeel.backends.worker.frames import Frame
from evenkeel.errors import ProtocolError

__all__ = ["SharedMemoryError", "SlotReader", "SlotWriter"]

MAX_TOTAL_BYTES = 4 << 30


class SharedMemoryError(Exception):
    """Says that shared memory cannot be had here: the socket is used instead. Never leaves `backends`."""


class SlotWriter:
    """Serves the client's side: finds free slots, and writes into them.

    Args:
        slots: how many tasks may be on their way at once.
        slot_bytes: of one slot. Memory is taken page by page as slots are first written, and the slot freed last is
            taken next, so unused slots cost nothing.

    Raises:
        SharedMemoryError: the system gives no such memory.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self._slot_bytes = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._slots = slots
        self._free = list(range(slots))
        size_bytes = self._slots * self._slot_bytes
        try:
            self._file = os.memfd_create("evenkeel", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.ftruncate(self._file, size_bytes)
                fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
                self._map = mmap.mmap(self._file, size_bytes)
            except BaseException:
                os.close(self._file)
                raise
        except (OSError, AttributeError, ValueError) as error:
            raise SharedMemoryError(f"no shared memory: {error}") from error

    def offer(self) -> dict[str, Any]:
        """Gives what a SHARE frame says."""
        path = f"/proc/{os.getpid()}/fd/{self._file}"
        return {"path": path, "slots": self._slots, "slot_bytes": self._slot_bytes}

    def seal(self) -> None:
        """Lets nobody else open the memory from now on."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def take(self, size_bytes: int) -> int | None:
        """Takes a free slot of at least `size_bytes`, or gives None."""
        if size_bytes > self._slot_bytes or not self._free:
            return None
        return self._free.pop()

    def write(self, slot: int, tensor: Array) -> None:
        """Puts the tensor's bytes, in C order, into a slot that was taken."""
        dtype = tensor.dtype.newbyteorder("<")
        np.copyto(np.ndarray(tensor.shape, dtype, self._map, slot * self._slot_bytes), tensor)

    def give_back(self, slot: int) -> None:
        """Frees a slot that the worker has read."""
        self._free.append(slot)

    def close(self) -> None:
        """Lets go of the memory; it lives on until the worker has, too."""
        self.seal()
        self._map.close()


class SlotReader:
    """Serves the worker's side: opens what a client offers, and reads slots without copying.

    Raises:
        SharedMemoryError: it cannot be opened here, or is not what it should be.
    """

    def __init__(self, offer: dict[str, Any]) -> None:
        path, slots, slot_bytes = offer.get("path"), offer.get("slots"), offer.get("slot_bytes")
        if not isinstance(path, str) or not re.fullmatch(r"/proc/\d+/fd/\d+", path):
            raise SharedMemoryError(f"path {path!r} is not /proc/PID/fd/N")
        if type(slots) is not int or type(slot_bytes) is not int or slots < 1 or slot_bytes < 1:
            raise SharedMemoryError(f"{slots!r} slots of {slot_bytes!r} bytes")
        if slots * slot_bytes > MAX_TOTAL_BYTES:
            raise SharedMemoryError(f"{slots * slot_bytes} bytes; at most {MAX_TOTAL_BYTES} are allowed")
        self._slots, self._slot_bytes = slots, slot_bytes
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                status = os.fstat(file)
                if not stat.S_ISREG(status.st_mode) or status.st_size != slots * slot_bytes:
                    raise SharedMemoryError(f"{path} has not {slots * slot_bytes} bytes")
                if not fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                    raise SharedMemoryError(f"the size of {path} is not sealed")
                self._map = mmap.mmap(file, slots * slot_bytes, prot=mmap.PROT_READ)
            finally:
                os.close(file)
        except (OSError, ValueError) as error:
            raise SharedMemoryError(f"{path} cannot be opened: {error}") from error

    def tensor(self, frame: Frame) -> Array:
        """Gives the tensor of a task in its slot, read-only; it keeps the memory alive.

        Raises:
            ProtocolError: no such slot, or larger than one.
        """
        if frame.slot >= self._slots or frame.size_bytes > self._slot_bytes or frame.dtype is None:
            raise ProtocolError(f"a task of {frame.size_bytes} bytes in shared-memory slot {frame.slot}")
        flat = np.frombuffer(
            self._map, frame.dtype, frame.size_bytes // frame.dtype.itemsize, frame.slot * self._slot_bytes
        )
        return flat.reshape(frame.shape)
