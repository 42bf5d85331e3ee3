"""Reads a request into its items, its options, and the outputs it wants.

An item is one row of pixel values 0..255 in the model card's layout and datatype. Tensors may come in either layout,
as UINT8 for a model that takes FP32, and in another range that their parameter `maximum` says; image files come as
BYTES. A raw body is a file where its content type says so or its length is no item's.
"""

import base64
import binascii
from collections.abc import Sequence

import numpy as np

from evenkeel.arrays import Array
from evenkeel.errors import ConfigurationError, RequestError
from evenkeel.images.header import FORMATS, is_image_file
from evenkeel.models.cards import ModelCard
from evenkeel.oip import InferRequest, Tensor, TensorHead, shown
from evenkeel.oip.types import Parameters
from evenkeel.promises.promise import KINDS, Promise
from evenkeel.serving.gateway.gateway import Options

__all__ = ["ItemReader", "read_key", "read_options"]

_NO_OPTIONS = Options()
_NEEDS = {*KINDS, "guarantee", "max_cost", "on_miss", "packet_loss"}
_KEY = "evenkeel_key"
_MAX_NAMES = 5  # in a message
_MAX_SCALED = 16.0
_MAX_BLACK = 2.0  # of a black item with a little noise, in whole numbers
_MAX_MAXIMUM = 65535
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
        if "maximum" in tensor.parameters:
            data = _scaled(data, tensor)
        elif tensor.datatype == "FP32":
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
    """Refuses floats that cannot be pixel values 0..255, or may as well be something else, item by item.

    Floats in another range would be answered with scores that mean nothing. An item of which nothing is above 16 is
    scaled (to 0..1, with what a resampling adds to it, to 0..2, by 16, to 0..16) or nearly black, and nobody can tell:
    its sender says which by the parameter `maximum`. Zeros, ones and twos alone are taken for black.
    """
    items = data.reshape(len(data), -1)
    tops = items.max(axis=1)
    low, high = float(items.min()), float(tops.max())
    if low >= 0 and high <= 255:
        if tops.min() > _MAX_SCALED:
            return
        dim = items[tops <= _MAX_SCALED]
        whole = (dim == np.floor(dim)).all(axis=1)
        black = whole & (dim.max(axis=1) <= _MAX_BLACK)
        if black.all():
            return
        first = int(np.argmin(black))
        top, scaled = float(dim[first].max()), "scaled to 0..1, multiply it by 255"
        if top > _MAX_BLACK:
            scaled = "scaled, say to what by the tensor's parameter 'maximum' (16, say, for 0..16)"
        nothing = "nothing" if whole[first] else "fractions and nothing"
        found = (
            f"an item has {nothing} above {top:.6g}; if it was {scaled}; "
            "if it is as dark as that, say so by the tensor's parameter 'maximum': 255"
        )
    elif not np.isfinite(items).all():
        found = "some are not finite (NaN or infinity)"
    elif low < 0:
        found = f"the lowest is {low:.7g}; undo what was subtracted: the model does that itself"
    else:
        found = f"the highest is {high:.7g}"
    raise RequestError(f"input {name!r}: expected pixel values 0..255; {found}")


def _scaled(data: Array, tensor: Tensor) -> Array:
    """Gives pixel values 0..255 of a tensor whose sender says that its values are 0..`maximum`."""
    top = tensor.parameters["maximum"]
    if isinstance(top, bool) or not isinstance(top, int | float) or not 0 < top <= _MAX_MAXIMUM:
        raise RequestError(
            f"input {tensor.name!r}: parameter 'maximum' must be a number above 0 and up to {_MAX_MAXIMUM}, "
            f"found {shown(top)}"
        )
    low, high = float(data.min()), float(data.max())
    if not (low >= 0 and high <= top):
        raise RequestError(
            f"input {tensor.name!r}: its parameter says values 0..{top:g}; found {low:.7g} and {high:.7g}"
        )
    if top == 255:
        return data
    pixels = data * np.float32(255 / top)
    return np.rint(pixels).astype(np.uint8) if data.dtype == np.uint8 else pixels


def read_options(parameters: Parameters) -> Options:
    """Reads the options among a request's parameters; unknown parameters are ignored, as the protocol wants.

    Raises:
        RequestError: one has the wrong type or range, or they contradict each other.
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
    timeout_s = None if timeout_us is None else timeout_us * 1e-6
    confidence = None if least is None else float(least)
    if not _NEEDS.isdisjoint(parameters):
        return _read_needs(parameters, exact, timeout_s, confidence)
    if not exact and timeout_us is None and least is None:
        return _NO_OPTIONS
    return Options(exact=exact, timeout_s=timeout_s, min_confidence=confidence)


def _read_needs(parameters: Parameters, exact: bool, timeout_s: float | None, confidence: float | None) -> Options:
    """Reads what a request needs of its answers, beside the options of every request.

    Raises:
        RequestError: a need has the wrong type or range, or needs contradict each other.
    """
    kinds = [kind for kind in KINDS if kind in parameters]
    if len(kinds) > 1:
        raise RequestError(f"parameters {' and '.join(kinds)} contradict each other: a request has one promise")
    for other, given in (("exact", exact), ("min_confidence", confidence is not None)):
        if given and kinds:
            raise RequestError(
                f"parameters {kinds[0]!r} and {other!r} contradict each other: a promise sets who answers"
            )
    if "guarantee" in parameters and not kinds:
        raise RequestError(f"parameter 'guarantee' needs a promise: {', '.join(KINDS[:3])}")
    promise = None
    if kinds:
        level, guarantee = (_number(parameters, name, 1.0) for name in (kinds[0], "guarantee"))
        assert level is not None
        try:
            promise = Promise(kinds[0], level, 0.95 if guarantee is None else guarantee)
        except ConfigurationError as error:
            raise RequestError(f"parameter {error}") from None
    on_miss = parameters.get("on_miss")
    if on_miss not in (None, "degrade", "reject"):
        raise RequestError(f"parameter 'on_miss' must be degrade or reject, found {shown(on_miss)}")
    max_cost = _number(parameters, "max_cost", float("inf"))
    loss = _number(parameters, "packet_loss", 1.0)
    degrade = None if on_miss is None else on_miss == "degrade"
    return Options(exact, timeout_s, confidence, promise, max_cost, degrade, loss or 0.0)


def _number(parameters: Parameters, name: str, high: float) -> float | None:
    value = parameters.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= float(value) <= high:
        raise RequestError(f"parameter {name!r} must be a number from 0 to {high:g}, found {shown(value)}")
    return float(value)


def read_key(parameters: Parameters) -> int | None:
    """Reads the number that names the request's work for injected delays; row i of the request gets it plus i."""
    key = parameters.get(_KEY) if parameters else None
    if key is not None and (type(key) is not int or key < 0):
        raise RequestError(f"parameter {_KEY!r} must be an integer >= 0, found {shown(key)}")
    return key
