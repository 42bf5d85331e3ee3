"""Writes and reads what the packets of a session say besides images: the greeting, what is missing, the answer."""

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from evenkeel.arrays import Array
from evenkeel.backends.lossy.intervals import JpegForm
from evenkeel.backends.lossy.packets import MAX_PAYLOAD, MIN_PAYLOAD
from evenkeel.errors import ConfigurationError, ProtocolError

__all__ = ["NONCE_BYTES", "Greeting", "LossyAnswer", "model_digest", "read_missing", "write_missing"]

NONCE_BYTES = 16
MAX_NAME_BYTES = 32
MODEL_BYTES = 8
_GREETING = struct.Struct(f">{NONCE_BYTES}s8s{MODEL_BYTES}sHHBBHHB")
_RETRANSMIT, _CONCEAL, _EXACT = 1, 2, 4
_MISSING_BYTES = 48  # of a packet's bitmap; what lies beyond is asked for when this is here
_ANSWER = struct.Struct(">BHB")
_MAX_DIMENSIONS = 8
_MAX_ELEMENTS = 1 << 20
_MAX_TEXT_BYTES = 500


@dataclass(frozen=True)
class Greeting:
    """Holds how a client wants its images read.

    Attributes:
        nonce: that it drew.
        model: that answers.
        form: of its images.
        payload: bytes of a packet at most, both ways.
        retransmit: whether it sends again what is said to be missing.
        conceal: whether holes are filled before the model sees the image.
        exact: whether the named model itself must answer, and nothing in its place.
        digest: of the model that is meant, from `model_digest`; zeros: whichever has the name.
    """

    nonce: bytes
    model: str
    form: JpegForm
    payload: int
    retransmit: bool
    conceal: bool
    exact: bool = False
    digest: bytes = bytes(MODEL_BYTES)

    def write(self) -> bytes:
        """Gives it as bytes, of at least the length of the welcome: nobody is sent more than they sent."""
        form = self.form
        flags = _RETRANSMIT * self.retransmit | _CONCEAL * self.conceal | _EXACT * self.exact
        return _GREETING.pack(
            self.nonce, form.digest, self.digest, form.width, form.height, form.quality, form.subsampling, form.blocks,
            self.payload, flags,
        ) + self.model.encode()  # fmt: skip

    @classmethod
    def read(cls, body: bytes) -> "Greeting":
        """Reads one.

        Raises:
            ProtocolError: it is damaged, or means other bytes by its images than this end does.
        """
        if not _GREETING.size < len(body) <= _GREETING.size + MAX_NAME_BYTES:
            raise ProtocolError("a greeting of another length")
        nonce, of_form, digest, width, height, quality, subsampling, blocks, payload, flags = _GREETING.unpack_from(
            body
        )
        try:
            form = JpegForm(width, height, quality, subsampling, blocks)
            model = body[_GREETING.size :].decode()
        except (ConfigurationError, UnicodeDecodeError) as error:
            raise ProtocolError(f"a greeting that makes no sense: {error}") from error
        if not MIN_PAYLOAD <= payload <= MAX_PAYLOAD:
            raise ProtocolError(f"a payload has {MIN_PAYLOAD} to {MAX_PAYLOAD} bytes, found {payload}")
        if form.digest != of_form:
            raise ProtocolError("both ends write JPEG files with different tables; install the same Pillow on both")
        retransmit, conceal, exact = (bool(flags & flag) for flag in (_RETRANSMIT, _CONCEAL, _EXACT))
        return cls(nonce, model, form, payload, retransmit, conceal, exact, digest)


def model_digest(text: str) -> bytes:
    """Gives the bytes by which a greeting names a model: of its digest as text; zeros where that is empty."""
    return hashlib.blake2s(text.encode(), digest_size=MODEL_BYTES).digest() if text else bytes(MODEL_BYTES)


@dataclass(frozen=True)
class LossyAnswer:
    """Holds what became of an image: outputs, or the text that says why there are none, and the share that was lost."""

    outputs: Array | None
    lost: float = 0.0
    error: str = ""

    def write(self, room: int) -> list[bytes]:
        """Gives it as bytes, in pieces of at most `room`."""
        lost = min(0xFFFF, max(0, round(self.lost * 0xFFFF)))
        if self.outputs is None:
            data = _ANSWER.pack(1, lost, 0) + self.error.encode()[:_MAX_TEXT_BYTES]
        else:
            values = np.ascontiguousarray(self.outputs, ">f4")
            data = (
                _ANSWER.pack(0, lost, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
            )
        return [data[start : start + room] for start in range(0, len(data), room)]

    @classmethod
    def read(cls, data: bytes) -> "LossyAnswer":
        """Reads one.

        Raises:
            ProtocolError: it is damaged.
        """
        if len(data) < _ANSWER.size:
            raise ProtocolError("an answer that ends early")
        failed, lost, dimensions = _ANSWER.unpack_from(data)
        body = data[_ANSWER.size :]
        if failed:
            return cls(None, lost / 0xFFFF, body.decode(errors="replace"))
        if dimensions > _MAX_DIMENSIONS or len(body) < 4 * dimensions:
            raise ProtocolError("an answer whose shape is damaged")
        shape = struct.unpack_from(f">{dimensions}I", body)
        elements = int(np.prod(shape, dtype=object)) if shape else 1
        if elements > _MAX_ELEMENTS or len(body) != 4 * (dimensions + elements):
            raise ProtocolError("an answer whose shape does not fit its length")
        return cls(np.frombuffer(body, ">f4", offset=4 * dimensions).reshape(shape).astype(np.float32), lost / 0xFFFF)


def write_missing(missing: Iterable[int]) -> bytes:
    """Gives the numbers of missing packets as bytes: where they start, and a bit for each from there."""
    numbers = sorted(missing)
    start, bits = numbers[0], 0
    for number in numbers:
        if number - start < 8 * _MISSING_BYTES:
            bits |= 1 << (number - start)
    return start.to_bytes(2, "big") + bits.to_bytes((bits.bit_length() + 7) // 8, "little")


def read_missing(body: bytes) -> list[int]:
    """Reads numbers of missing packets.

    Raises:
        ProtocolError: it is damaged.
    """
    if not 3 <= len(body) <= 2 + _MISSING_BYTES:
        raise ProtocolError("a list of missing packets of another length")
    start, bits = int.from_bytes(body[:2], "big"), int.from_bytes(body[2:], "little")
    return [start + bit for bit in range(bits.bit_length()) if bits >> bit & 1]
