"""Image files as input."""

import asyncio
import base64
import binascii
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import example, given, strategies as st
from PIL import Image

from evenkeel.errors import OverloadedError, RequestError, TooLargeError
from evenkeel.oip import Tensor, write_request
from evenkeel.serving.front import items as items_module
from evenkeel.serving.front.image_process import ImageProcess
from evenkeel.serving.front.images import ImageDecoder
from http_helpers import INFER, FakeGateway, ask, call, file_of, images, infer, make_app, make_card, tensor_of

RANDOM = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)


def files(*contents: bytes, **parameters) -> Tensor:
    return Tensor("images", "BYTES", (len(contents),), list(contents), parameters)


def decode(data: bytes, **card) -> np.ndarray:
    async def run():
        decoder = ImageDecoder(make_card(**card), processes=1)
        try:
            return (await decoder.decode_all([data]))[0]
        finally:
            decoder.close()

    return asyncio.run(run())


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
def test_a_png_of_the_right_size_arrives_as_it_is(layout, datatype):
    gateway = FakeGateway()
    found = ask(files(file_of(RANDOM)), gateway, make_card(layout=layout, datatype=datatype))
    assert found.status == 200
    item = gateway.submitted[0].item
    assert item.dtype == ("u1" if datatype == "UINT8" else "f4")
    assert np.array_equal(item, RANDOM if layout == "NHWC" else RANDOM.transpose(2, 0, 1))


def test_files_keep_their_order():
    gateway = FakeGateway()
    found = ask(files(*[file_of(images(1, value)[0]) for value in (9, 3, 200, 0)]), gateway)
    assert found.output("scores")[1::3] == [9, 3, 200, 0]


def test_a_jpeg_arrives_as_pillow_reads_it():
    smooth = np.full((4, 5, 3), 90, np.uint8)
    data = file_of(smooth, "JPEG", quality=95)
    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data))))


def test_a_raw_body_may_be_a_file():
    gateway = FakeGateway()
    assert infer(file_of(RANDOM), {"inference-header-content-length": "0"}, gateway).status == 200
    assert np.array_equal(gateway.submitted[0].item, RANDOM)


@pytest.mark.parametrize("begin", [b"\xff\xd8\xff", b"BM", b"P6\n", b"II*\0"])
def test_a_raw_body_of_pixels_may_begin_like_a_file(begin):
    gateway = FakeGateway()
    body = (begin + begin * 60)[:60]
    assert infer(body, {"inference-header-content-length": "0"}, gateway).status == 200
    assert gateway.submitted[0].item.tobytes() == body


def test_a_larger_image_is_scaled_by_its_shorter_side_and_cut_at_the_centre():
    wide = np.zeros((40, 190, 3), np.uint8)  # covers 40 x 50 of it; 70 columns are cut on either side
    wide[:, :38] = 255  # the filter looks a little over the edge
    wide[:, 152:] = 255
    assert decode(file_of(wide)).max() == 0
    tall = np.zeros((192, 50, 3), np.uint8)
    tall[:40] = 255
    tall[152:] = 255
    assert decode(file_of(tall)).max() == 0


def test_a_smaller_image_is_scaled_up():
    assert np.array_equal(decode(file_of(np.full((2, 2, 3), 50, np.uint8))), np.full((4, 5, 3), 50))


def test_a_reduced_jpeg_is_close_to_the_full_one():
    ramp = np.linspace(0, 255, 800).astype(np.uint8)
    picture = np.broadcast_to(ramp[None, :, None], (640, 800, 3)).copy()
    expected = Image.fromarray(picture).resize((5, 4), Image.Resampling.LANCZOS)
    assert np.abs(decode(file_of(picture, "JPEG", quality=95)).astype(int) - np.asarray(expected)).max() <= 4


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16", "CMYK"])
def test_every_colour_mode_becomes_rgb(mode):
    image = Image.new(mode, (5, 4))
    stream = io.BytesIO()
    image.save(stream, "JPEG" if mode == "CMYK" else "PNG")
    assert decode(stream.getvalue()).shape == (4, 5, 3)


def test_a_turned_photo_is_put_upright():
    upright = np.zeros((50, 40, 3), np.uint8)
    upright[:25] = 255  # bright above
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    found = decode(file_of(np.rot90(upright).copy(), "PNG", exif=exif))
    assert found[0].min() > 200
    assert found[-1].max() < 50


def test_base64_text_is_taken_where_it_says_so():
    gateway = FakeGateway()
    body, _ = write_request([files(base64.b64encode(file_of(RANDOM)), content_type="base64")], binary=False)
    assert infer(body, gateway=gateway).status == 200
    assert np.array_equal(gateway.submitted[0].item, RANDOM)
    body, _ = write_request([files(b"not base64!", content_type="base64")], binary=False)
    assert "is not base64" in infer(body).error


@example(b"AAAA=", 4)
@example(b"AAAA==", 4)
@given(st.binary(max_size=40) | st.text("AB+/=*", max_size=24).map(str.encode), st.sampled_from([4, 8]))
def test_base64_in_pieces_is_base64(text, piece):
    def outcome(decode):
        try:
            return decode(text)
        except binascii.Error:
            return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(items_module, "_BASE64_PIECE", piece)
        assert outcome(items_module._from_base64) == outcome(lambda text: base64.b64decode(text, validate=True))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "image 1: not an image file of a known format, which are JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM (0 bytes)"),
        (b"%PDF-1.7" + b"\0" * 50, "image 1: not an image file of a known format"),
        (b"GIF89a" + b"\0" * 50, "image 1: it has no pixels: 0 x 0"),
        (file_of(RANDOM)[:-30], "image 1: cannot be decoded"),
        (file_of(np.zeros((64, 64, 3), np.uint8), "JPEG")[:-400], "image 1: a JPEG without"),
        (b"\x89PNG\r\n\x1a\n" + b"\xff" * 4, "image 1: its header cannot be read"),
    ],
)
def test_a_damaged_file_fails_the_request_in_words(data, message):
    gateway = FakeGateway()
    found = ask(files(file_of(RANDOM), data, data), gateway)
    assert found.status == 400
    assert message in found.error
    assert gateway.submitted == []


@pytest.mark.parametrize("start", [b"", b"data:image/png;base64,"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_base64_text_that_does_not_say_so_is_told_how_to(kind, start):
    body, _ = write_request([files(start + base64.b64encode(file_of(RANDOM, kind)))], binary=False)
    found = infer(body)
    assert found.status == 400
    assert "send image files as binary tensors, or base64 with the tensor parameter content_type: base64" in found.error
    assert "binary tensors" not in ask(files(b"something else")).error


def bomb(side):
    """The beginning of a PNG file that says it is huge."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return head + struct.pack(">I", 9) + b"IDAT" + b"\0" * 13


def test_too_many_pixels_in_all_are_refused_before_any_is_decoded():
    gateway = FakeGateway()
    found = ask(files(*[bomb(7900)] * 8), gateway)  # decoding one would be 400: it is cut off
    assert found.status == 413
    assert found.error == "8 images have 499 million pixels in all; at most 64 million are taken in one request"
    assert ask(files(bomb(7900))).status == 400


def test_pillow_does_not_warn_of_what_is_refused_anyway():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert ask(files(bomb(10_000))).status == 413
    assert found == []


def test_too_many_pixels_are_refused_before_decoding():
    async def run():
        decoder = ImageDecoder(make_card(), max_pixels=1000)
        with pytest.raises(TooLargeError, match=r"image 0: 40 x 26 pixels; at most 0.001 million"):
            await decoder.decode_all([file_of(np.zeros((26, 40, 3), np.uint8))])

    asyncio.run(run())
    found = ask(files(bomb(30_000)))
    assert found.status == 413
    assert "at most 64 million are taken" in found.error


def test_files_that_would_wait_too_long_are_shed():
    async def run():
        decoder = ImageDecoder(make_card(), processes=1, max_waiting=2)
        first = asyncio.ensure_future(decoder.decode_all([file_of(RANDOM)] * 3))  # alone it may exceed the bound
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="3 images wait to be decoded"):
            await decoder.decode_all([file_of(RANDOM)])
        assert (await first).shape == (3, 4, 5, 3)
        assert (await decoder.decode_all([file_of(RANDOM)])).shape == (1, 4, 5, 3)
        with pytest.raises(RequestError):
            await decoder.decode_all([b"bad"])
        assert (await decoder.decode_all([file_of(RANDOM)] * 2)).shape == (2, 4, 5, 3)
        decoder.close()

    asyncio.run(run())


def test_the_timeout_counts_the_decoding_too():
    gateway = FakeGateway()
    found = ask(files(file_of(RANDOM)), gateway, parameters={"timeout": 1})
    assert found.status == 504
    assert "passed while images were decoded" in found.error
    ask(tensor_of(images()), gateway, parameters={"timeout": 60_000_000})
    assert 50 < gateway.submitted[0].options.timeout_s <= 60


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("deadline_s", [0.01, 30.0])
def test_nobody_waits_for_a_decoder_that_is_busy(monkeypatch, deadline_s, count):
    began = []

    async def decode(self, data, until_s):
        began.append(data)
        await asyncio.Event().wait()

    monkeypatch.setattr(ImageProcess, "decode", decode)
    gateway = FakeGateway(deadline_s=deadline_s)
    parameters = {} if deadline_s < 1 else {"timeout": 10_000}
    body, length = write_request([files(*[file_of(RANDOM)] * count)], binary=True, parameters=parameters)

    async def run():
        app = make_app(gateway)
        try:
            return await call(app, INFER, body, headers={"inference-header-content-length": str(length)})
        finally:
            app.close()

    found = asyncio.run(run())
    assert found.status == 504
    assert found.error == "the timeout of 0.01 s passed while images were decoded"
    assert gateway.submitted == []
    assert len(began) <= 2  # those that wait for a process are given up


def test_the_deadline_counts_the_decoding_too():
    gateway = FakeGateway(deadline_s=20.0)
    ask(files(file_of(RANDOM)), gateway)
    assert 10 < gateway.submitted[0].options.timeout_s < 20
