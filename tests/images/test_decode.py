"""What an image file says of itself, what is refused for it, and the pixels that come out."""

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageOps

from evenkeel.errors import UnreadableImageError
from evenkeel.images.decode import decoded, rgb_pixels
from evenkeel.images.header import MAX_SCANS, ImageHeader, check_size, is_image_file, read_header
from evenkeel.images.resize import centre_box, resize_image, resized

WIDTH, HEIGHT = 30, 20
SMOOTH = np.add.outer(np.arange(HEIGHT) * 6, np.arange(WIDTH) * 4)[..., None] + np.array([0, 10, 20])
PICTURE = Image.fromarray(SMOOTH.astype(np.uint8))
SAVED: dict[str, dict[str, object]] = {
    "JPEG": {},
    "progressive JPEG": {"progressive": True},
    "PNG": {},
    "WEBP": {},
    "lossless WEBP": {"lossless": True},
    "extended WEBP": {"exif": b"Exif\0\0"},
    "GIF": {},
    "BMP": {},
    "TIFF": {},
    "packed TIFF": {"compression": "tiff_lzw"},
    "PPM": {},
}


def packed(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.fixture(params=SAVED)
def saved(request: pytest.FixtureRequest) -> bytes:
    return packed(PICTURE, request.param.split()[-1], **SAVED[request.param])


# Headers


def test_a_header_says_what_pillow_says(saved: bytes) -> None:
    header = read_header(saved)
    with Image.open(io.BytesIO(saved)) as image:
        assert header is not None
        assert (header.form, header.width, header.height) == (image.format, *image.size) == (image.format, 30, 20)
        progressive = bool(image.info.get("progressive"))
    assert header.buffered == progressive
    assert is_image_file(saved)


def test_a_file_cut_anywhere_is_unreadable_or_refused_and_nothing_else(saved: bytes) -> None:
    for length in (*range(40), len(saved) // 2):
        with pytest.raises(UnreadableImageError):
            decoded(saved[:length])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80), st.sampled_from([b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"RIFF", b"BM", b"P6", b"GIF89a"]))
def test_any_bytes_are_no_header_or_one_or_unreadable(data: bytes, begin: bytes) -> None:
    for content in (data, begin + data):
        try:
            header = read_header(content)
        except UnreadableImageError:
            continue
        assert header is None or (header.width > 0 and header.height > 0)


@pytest.mark.parametrize("begin", [b"BM", b"P6\n", b"P6 4", b"RIFF", b"II*"])
def test_a_few_letters_make_no_image_file(begin: bytes) -> None:
    assert not is_image_file(begin + b"\x80" * 100)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (ImageHeader("PNG", 8001, 8000), "8001 x 8000 pixels; at most 64 million are taken"),
        (ImageHeader("PNG", 1, 40_000), "1 x 40000 pixels; a side may have at most 32,768"),
        (ImageHeader("PNG", 40_000, 1), "40000 x 1 pixels; a side may have at most 32,768"),
    ],
)
def test_too_many_pixels_and_too_long_sides_are_refused(header: ImageHeader, message: str) -> None:
    with pytest.raises(UnreadableImageError) as caught:
        check_size(header)
    assert str(caught.value) == message


# Files that are made to be costly


def jpeg_of_scans(side: int, scans: int, beside: bytes = b"") -> bytes:
    """A progressive grey JPEG whose scans hold nothing; `beside` stands in a comment before each of them."""
    head = b"\xff\xd8\xff\xdb" + struct.pack(">HB", 67, 0) + bytes([1] * 64)
    head += b"\xff\xc2" + struct.pack(">HBHHB", 11, 8, side, side, 1) + bytes([1, 0x11, 0])
    head += b"\xff\xc4" + struct.pack(">HB", 20, 0) + bytes([1] + [0] * 16)
    head += b"\xff\xc4" + struct.pack(">HB", 20, 0x10) + bytes([1] + [0] * 15 + [0])
    blocks = (side // 8) ** 2
    first = b"\xff\xda" + struct.pack(">HB", 8, 1) + bytes([1, 0, 0, 0, 0]) + bytes((blocks + 7) // 8)
    comment = b"\xff\xfe" + struct.pack(">H", 2 + len(beside)) + beside
    scan = comment + b"\xff\xda" + struct.pack(">HB", 8, 1) + bytes([1, 0, 1, 63, 0]) + bytes((blocks + 7) // 8)
    return head + first + scan * (scans - 1) + b"\xff\xd9"


@pytest.mark.parametrize("beside", [b"", b"\xff\xd9", b"\xff\xda" * 100])
def test_a_jpeg_of_too_many_scans_is_refused_before_it_is_decoded(beside: bytes) -> None:
    assert rgb_pixels(jpeg_of_scans(16, MAX_SCANS, beside), 8, 8).shape == (8, 8, 3)
    with pytest.raises(UnreadableImageError, match=f"a JPEG of more than {MAX_SCANS} scans"):
        rgb_pixels(jpeg_of_scans(16, MAX_SCANS + 1, beside), 8, 8)


def test_what_stands_behind_a_jpeg_is_no_scan() -> None:
    film = packed(PICTURE, "JPEG") + b"\xff\xda" * 10_000  # phones append a short film
    assert np.array_equal(decoded(film), decoded(packed(PICTURE, "JPEG")))


def test_a_jpeg_of_too_many_segments_is_refused() -> None:
    content = packed(PICTURE, "JPEG")
    assert decoded(content[:2] + b"\xff\xfe\0\2" * 400 + content[2:]).shape == (20, 30, 3)
    with pytest.raises(UnreadableImageError, match="in its first 500 segments"):
        decoded(content[:2] + b"\xff\xfe\0\2" * 100_000 + content[2:])


def test_a_tiff_with_a_tile_larger_than_itself_counts_the_tile() -> None:
    content = bytearray(packed(PICTURE, "TIFF"))
    (place,) = struct.unpack_from("<I", content, 4)
    struct.pack_into("<HHII", content, place + 2 + 12 * 2, 322, 4, 1, 100_000)
    with pytest.raises(UnreadableImageError, match="100000 x 20 pixels; a side may have at most"):
        decoded(bytes(content))


def test_a_frame_larger_than_the_header_says_is_refused() -> None:
    content = bytearray(packed(PICTURE, "GIF"))
    place = content.index(b"\x2c\0\0\0\0" + struct.pack("<HH", 30, 20))
    struct.pack_into("<HH", content, place + 5, 8000, 9000)
    with pytest.raises(UnreadableImageError, match="its header says 30 x 20 pixels, its content 8000 x 9000"):
        decoded(bytes(content))


def test_of_many_frames_the_first_counts() -> None:
    others = [Image.new("RGB", PICTURE.size, (each, 0, 0)) for each in range(50)]
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        content = packed(Image.new("RGB", PICTURE.size, (0, 255, 0)), form, save_all=True, append_images=others)
        assert np.abs(decoded(content)[5, 5].astype(int) - [0, 255, 0]).max() <= 4, form


# Scaling


class Sizes:
    """How many pixels pictures have that Pillow makes on the way."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def __call__(self, image: Image.Image, size: tuple[int, int], *args: object, **options: object) -> Image.Image:
        self.made.append(size[0] * size[1])
        # What Pillow makes in between: all rows that are wanted, scaled to the new width.
        box = options.get("box") or (0, 0, *image.size)
        assert isinstance(box, tuple)
        self.made.append(int(size[0] * (box[3] - box[1])))
        return PLAIN_RESIZE(image, size, *args, **options)  # type: ignore[arg-type]


PLAIN_RESIZE = Image.Image.resize


@pytest.fixture(scope="module")
def sizes() -> Iterator[Sizes]:
    found = Sizes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", lambda *args, **options: found(*args, **options))
        yield found


@pytest.mark.parametrize("shape", [(1, 32_768), (32_768, 1), (3, 3000), (2000, 2000), (5, 5)])
@pytest.mark.parametrize("target", [(224, 224), (48, 192), (8, 300)])
@pytest.mark.parametrize("cut", [False, True])
def test_scaling_takes_no_more_than_the_larger_of_both_pictures(
    sizes: Sizes, shape: tuple[int, int], target: tuple[int, int], cut: bool
) -> None:
    sizes.made.clear()
    image = Image.new("RGB", shape, (10, 20, 30))
    box = centre_box(image.height, image.width, *target) if cut else None
    found = resize_image(image, *target, box)
    assert found.size == target[::-1]
    assert found.getextrema() == ((10, 10), (20, 20), (30, 30))
    assert max(sizes.made) <= 2 * max(shape[0] * shape[1], target[0] * target[1])


def test_floats_and_bytes_are_scaled_alike() -> None:
    pixels = np.random.default_rng(0).integers(100, 150, (40, 50, 3), dtype=np.uint8)  # no value leaves 0..255
    for form in ("nearest", "bilinear", "bicubic", "lanczos"):
        for target in ((9, 7), (80, 70), (45, 10)):
            whole = resized(pixels, *target, interpolation=form)
            floats = resized(pixels.astype(np.float32), *target, interpolation=form)
            assert np.abs(floats.clip(0, 255) - whole).max() <= 2  # bytes are rounded after each of the passes


# Colours and orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_is_put_upright(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = packed(PICTURE, form, exif=exif, **({"quality": 100, "subsampling": 0} if form == "JPEG" else {}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert np.array_equal(decoded(content), np.asarray(upright))
    small = rgb_pixels(content, 10, 10).astype(int)
    wanted = np.asarray(resize_image(upright, 10, 10, centre_box(upright.height, upright.width, 10, 10)))
    assert np.abs(small - wanted).max() <= 2  # scaled before it was turned


def test_sixteen_bits_lose_their_lower_eight() -> None:
    values = np.array([[0, 255, 256, 511], [0x5AFF, 0x7FFF, 0xFF00, 0xFFFF]], np.uint16)
    for form in ("PNG", "TIFF", "PPM"):
        found = decoded(packed(Image.fromarray(values), form))
        assert found.tolist() == np.repeat((values >> 8)[..., None], 3, axis=2).tolist(), form
    row = b"\0" + np.repeat(values[1], 3).astype(">u2").tobytes()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    coloured = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, 16, 2, 0, 0, 0))
    coloured += chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    assert decoded(coloured)[0, :, 0].tolist() == (values[1] >> 8).tolist()


@pytest.mark.parametrize("alpha", [0, 40, 255])
@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_dropped_however_transparent_a_pixel_is(alpha: int, form: str) -> None:
    image = Image.new("RGBA", (WIDTH, HEIGHT), (200, 100, 50, alpha))
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    for found in (decoded(packed(image, form, **options)), rgb_pixels(packed(image, form, **options), 7, 7)):
        assert (found == [200, 100, 50]).all()
    grey = packed(Image.new("LA", (4, 4), (90, alpha)), "PNG")
    assert (decoded(grey) == 90).all()


def test_cmyk_and_greys_are_colours() -> None:
    red = Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK")
    for form in ("JPEG", "TIFF"):
        assert np.abs(decoded(packed(red, form))[0, 0].astype(int) - [255, 0, 0]).max() <= 4
    for mode, value in (("L", 77), ("1", 1)):
        found = decoded(packed(Image.new(mode, (16, 16), value), "PNG"))
        assert (found == (77 if mode == "L" else 255)).all()


def test_a_header_is_looked_for_in_the_beginning_only() -> None:
    """Reading headers holds up the gateway's event loop."""
    content = packed(PICTURE, "JPEG")
    header = read_header(content[:20] + bytes(500) + content[20:])  # libjpeg passes over what belongs to nothing
    assert header is not None
    assert (header.width, header.height) == (30, 20)
    with pytest.raises(UnreadableImageError, match="a JPEG without pixels"):
        read_header(content[:2] + b"\xff\xe0\0\2" + b"\xff\x00" * 1000 + content[2:])


def tiff(values: bytes, width: int, **tags: list[int]) -> bytes:
    """An uncompressed little-endian TIFF of one row; the names of `tags` end in their numbers."""
    own = {256: [width], 257: [1], 259: [1], 273: [8], 278: [1], 279: [len(values)]}
    entries = sorted({**own, **{int(name.rpartition("_")[2]): tag for name, tag in tags.items()}}.items())
    start = 8 + len(values) + len(values) % 2
    later, listed = b"", struct.pack("<H", len(entries))
    for number, numbers in entries:
        content = struct.pack(f"<{len(numbers)}I", *numbers)
        place = struct.pack("<I", start + 2 + 12 * len(entries) + 4 + len(later))
        listed += struct.pack("<HHI", number, 4, len(numbers)) + (content if len(content) == 4 else place)
        later += content if len(content) > 4 else b""
    return b"II*\0" + struct.pack("<I", start) + values.ljust(start - 8, b"\0") + listed + bytes(4) + later


@pytest.mark.parametrize(("photometric", "expected"), [(1, [0x12, 0xFE]), (0, [0xED, 0x01])])
def test_greys_of_a_tiff_may_count_from_white(photometric: int, expected: list[int]) -> None:
    for bits, values in ((8, b"\x12\xfe"), (16, struct.pack("<HH", 0x12FF, 0xFE00))):
        file = tiff(values, 2, bits_258=[bits], colours_262=[photometric], samples_277=[1])
        assert decoded(file)[0, :, 0].tolist() == expected, bits


def test_greys_of_12_bits_become_their_first_eight() -> None:
    file = tiff(bytes.fromhex("12ffe0"), 2, bits_258=[12], colours_262=[1], samples_277=[1])
    assert decoded(file)[0, :, 0].tolist() == [0x12, 0xFE]


def test_colours_of_a_tiff_in_planes() -> None:
    common: dict[str, list[int]] = {"colours_262": [2], "samples_277": [3], "planes_284": [2]}
    file = tiff(b"\1\2\3\4\5\6", 2, bits_258=[8] * 3, places_273=[8, 10, 12], sizes_279=[2] * 3, **common)
    assert decoded(file).tolist() == [[[1, 3, 5], [2, 4, 6]]]
    wide = tiff(bytes(12), 2, bits_258=[16] * 3, places_273=[8, 12, 16], sizes_279=[4] * 3, **common)
    with pytest.raises(UnreadableImageError, match="more than 8 bits with a plane for each colour"):
        decoded(wide)


def test_a_kind_that_is_not_read_is_named() -> None:
    with pytest.raises(UnreadableImageError, match="a TIFF file that is damaged or of a kind that is not read"):
        decoded(tiff(bytes(8), 2, bits_258=[16, 16], colours_262=[1], samples_277=[2]))
