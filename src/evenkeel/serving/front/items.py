"""Reads a request into its items, its options, and the outputs it wants.

An item is one row of pixel values 0..255 in the model card's layout and datatype. Tensors may come in either layout,
and as UINT8 for a model that takes FP32; image files come as BYTES. A raw body is a file where its content type says so
or its length is no item's.
"""

import base64
import binascii
from collections.abc import Sequence

import numpy as np

from evenkeel.arrays import Array
from evenkeel.errors import RequestError
from evenkeel.images.header import FORMATS, is_image_file
from evenkeel.models.cards import ModelCard
from evenkeel.oip import InferRequest, Tensor, TensorHead, shown
from evenkeel.oip.types import Parameters
from evenkeel.serving.gateway.gateway import Options

__all__ = ["ItemReader", "read_key", "read_options"]

_NO_OPTIONS = Options()
_KEY = "evenkeel_key"
_MAX_NAMES = 5  # in a message
_MAX_SCALED = 2.0
_BASE64_PIECE = 1 << 20  # a multiple of four characters


class ItemReader:
    """Reads the items out of requests for one model."""

    def __init__(self, card: ModelCard) -> None:
        self._card = card
        self._dtype = np.dtype("u1" if card.datatype == "UINT8" else "<f4")
        self._nhwc = (card.height, card.width, 3)
        self._nchw = (3, card.height, card.width)
        self._own = card.input_shape
        self._other = self._nchw if card.layout == "NHWC" else self._nhwc
        self._to_own = (0, 3, 1, 2) if card.layout == "NCHW" else (0, 2, 3, 1)

    def check(self, request: InferRequest) -> int:
        """Counts the items of the request, at least one; nothing is converted or decoded yet.

        Raises:
            RequestError: wrong name, number, datatype or shape of inputs.
        """
        if request.raw is not None:
            return 1
        tensor = request.inputs[0]
        if len(request.inputs) != 1:
            raise self._wrong_inputs(request.inputs)
        self.check_head(tensor)
        if tensor.datatype == "BYTES":
            if not tensor.data or tensor.shape not in ((len(tensor.data),), (len(tensor.data), 1)):
                raise RequestError(
                    f"input {tensor.name!r}: shape is {list(tensor.shape)}; image files are a BYTES tensor of shape "
                    f"[n], n >= 1"
                )
            return len(tensor.data)
        return tensor.shape[0]

    def check_head(self, tensor: TensorHead) -> int:
        """Counts the items of a tensor by its shape, before its data is read.

        Raises:
            RequestError: wrong name, datatype or shape.
        """
        if tensor.name != self._card.input_name:
            raise self._wrong_inputs([tensor])
        if tensor.datatype != "BYTES":
            self._check_pixels(tensor)
        return tensor.shape[0] if tensor.shape else 0

    def _wrong_inputs(self, found: Sequence[TensorHead]) -> RequestError:
        names = ", ".join(shown(tensor.name) for tensor in found[:_MAX_NAMES])
        return RequestError(f"expected exactly one input, {self._card.input_name!r}; found {names}")

    def read(self, request: InferRequest) -> Array | list[bytes]:
        """Reads the items `[n, ...]`, a view of the body where nothing had to be converted; or n image files.

        Args:
            request: one that `check` found right.

        Raises:
            RequestError: values that are no pixels, or a raw body of the wrong size.
        """
        if request.raw is not None:
            return self._read_raw(request.raw, request.raw_is_file)
        tensor = request.inputs[0]
        return self._files(tensor) if tensor.datatype == "BYTES" else self._read_pixels(tensor)

    def _check_pixels(self, tensor: TensorHead) -> None:
        card, row = self._card, tensor.shape[1:]
        if tensor.datatype != card.datatype and (card.datatype != "FP32" or tensor.datatype != "UINT8"):
            expected = "UINT8" if card.datatype == "UINT8" else "FP32 or UINT8"
            raise RequestError(
                f"input {tensor.name!r}: datatype is {tensor.datatype}; expected {expected} pixel values, or BYTES "
                f"holding image files ({', '.join(FORMATS)})"
            )
        # A 3 x 3 image has the same shape in both layouts; it is read in the model's own.
        if row != self._own and row != self._other:
            raise RequestError(
                f"input {tensor.name!r}: shape is {list(tensor.shape)}; expected [n, {card.height}, {card.width}, 3] "
                f"or [n, 3, {card.height}, {card.width}]"
            )
        if not tensor.shape[0]:
            raise RequestError(f"input {tensor.name!r}: shape {list(tensor.shape)} holds no items; expected n >= 1")

    def _read_pixels(self, tensor: Tensor) -> Array:
        data = tensor.data
        assert isinstance(data, np.ndarray)
        if tensor.datatype == "FP32":
            _check_range(data, tensor.name)
        if tensor.shape[1:] != self._own:
            data = data.transpose(self._to_own)
        elif data.dtype == self._dtype and data.flags.aligned:
            return data
        return np.require(data, self._dtype, ("C", "A"))

    def _read_raw(self, body: bytes, is_file: bool) -> Array | list[bytes]:
        if is_file:
            return [body]
        # What begins like a file may as well be pixels: only where the length cannot be theirs it is a file.
        row = np.prod(self._own, dtype=int) * self._dtype.itemsize
        if len(body) == row:
            data = np.frombuffer(body, self._dtype).reshape(1, *self._own)
            return self._read_pixels(Tensor(self._card.input_name, self._card.datatype, data.shape, data))
        if is_image_file(body):
            return [body]
        raise RequestError(
            f"the raw body has {len(body)} bytes; expected an image file ({', '.join(FORMATS)}), or {row} bytes: "
            f"{self._card.datatype} of shape {list(self._own)}"
        )

    def _files(self, tensor: Tensor) -> list[bytes]:
        files = tensor.data
        assert isinstance(files, list)
        # JSON strings cannot hold a file as it is; "content_type": "base64" is how MLServer's clients say it.
        if tensor.parameters.get("content_type") != "base64":
            return files
        try:
            return [_from_base64(text) for text in files]
        except binascii.Error as error:
            raise RequestError(f"input {tensor.name!r}: is not base64 as its content_type says: {error}") from None


def _from_base64(text: bytes) -> bytes:
    """Decodes like `base64.b64decode`, in pieces between which other threads get their turn."""
    size = len(text.rstrip(b"="))
    if text.find(b"=", 0, size) >= 0:
        raise binascii.Error("padding in the middle")
    last = max(size - 1, 0) // _BASE64_PIECE * _BASE64_PIECE  # with all of the padding
    parts = [
        base64.b64decode(text[place : place + _BASE64_PIECE], validate=True) for place in range(0, last, _BASE64_PIECE)
    ]
    return b"".join([*parts, base64.b64decode(text[last:], validate=True)])


def _check_range(data: Array, name: str) -> None:
    """Refuses floats that cannot be pixel values 0..255, item by item.

    Floats in another range would be answered with scores that mean nothing. An image may be as dark as all zeros, ones
    and twos, and hold fractions between 0 and 255; but an item of fractions of which none is above 2 is scaled: to
    0..1, with what a resampling adds to it, or to 0..2.
    """
    items = data.reshape(len(data), -1)
    low, high = float(items.min()), float(items.max())
    if low >= 0 and high <= 255:
        dark = items[items.max(axis=1) <= _MAX_SCALED]
        if not dark.size or bool((dark == np.floor(dark)).all()):
            return
        top = float(dark.max())
        found = f"an item has fractions and nothing above {top:.6g}; if it was scaled to 0..1, multiply it by 255"
    elif not np.isfinite(items).all():
        found = "some are not finite (NaN or infinity)"
    elif low < 0:
        found = f"the lowest is {low:.7g}; undo what was subtracted: the model does that itself"
    else:
        found = f"the highest is {high:.7g}"
    raise RequestError(f"input {name!r}: expected pixel values 0..255; {found}")


def read_options(parameters: Parameters) -> Options:
    """Reads the options among a request's parameters; unknown parameters are ignored, as the protocol wants.

    Raises:
        RequestError: `exact`, `timeout` or `min_confidence` has the wrong type or range.
    """
    if not parameters:
        return _NO_OPTIONS
    exact = parameters.get("exact", False)
    if type(exact) is not bool:
        raise RequestError(f"parameter 'exact' must be a bool, found {shown(exact)}")
    timeout_us = parameters.get("timeout")
    if timeout_us is not None and (type(timeout_us) is not int or timeout_us <= 0):
        raise RequestError(
            f"parameter 'timeout' must be an integer above zero (microseconds), found {shown(timeout_us)}"
        )
    least = parameters.get("min_confidence")
    if least is not None and (type(least) not in (int, float) or not 0 <= float(least) <= 1):
        raise RequestError(f"parameter 'min_confidence' must be a number from 0 to 1, found {shown(least)}")
    if not exact and timeout_us is None and least is None:
        return _NO_OPTIONS
    return Options(
        exact=exact,
        timeout_s=None if timeout_us is None else timeout_us * 1e-6,
        min_confidence=None if least is None else float(least),
    )


def read_key(parameters: Parameters) -> int | None:
    """Reads the number that names the request's work for injected delays; row i of the request gets it plus i."""
    key = parameters.get(_KEY) if parameters else None
    if key is not None and (type(key) is not int or key < 0):
        raise RequestError(f"parameter {_KEY!r} must be an integer >= 0, found {shown(key)}")
    return key
