"""Decodes one image, however it is kept, into RGB pixels of a wanted size: for `fit`, `bench` and the gateway alike.

Rules:

* Formats: JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, known by how the file begins. Of several frames the first counts.
* The picture is turned upright as its Exif orientation says.
* Transparency is dropped: a pixel keeps the colour that the file gives it, however transparent it is. Classifiers are
  nearly always trained so (`convert("RGB")`).
* Greys are repeated over the three channels. 16-bit values become `value >> 8`, 12-bit ones `value >> 4`. Palettes,
  CMYK and other colours are converted to RGB without a colour profile. Values of 32 bits have no known range and are
  refused.
* The largest part in the middle that has the wanted proportions is scaled to the wanted size (`resize.py`).
"""

import warnings
from collections.abc import Mapping
from io import BytesIO
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from evenkeel.errors import UnreadableImageError
from evenkeel.images.header import FORMATS, MAX_PIXELS, ImageHeader, check_scans, check_size, read_header
from evenkeel.images.resize import DEFAULT_FILTER, Filter, centre_box, resize_image

__all__ = ["decoded", "rgb_pixels"]

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
# Tags of TIFF, and values of them.
_BITS, _PHOTOMETRIC, _PLANES = 258, 262, 284
_WHITE_IS_ZERO, _SEPARATE = 0, 2


def rgb_pixels(
    image: bytes | NDArray[np.uint8], height: int, width: int, interpolation: Filter = DEFAULT_FILTER
) -> NDArray[np.uint8]:
    """Gives `image` as uint8 `[height, width, 3]`; one of that size is not touched.

    Args:
        image: bytes of an image file, or pixels [h, w] or [h, w, 1..4 channels].
        height: wanted, pixels.
        width: wanted, pixels.
        interpolation: how it is scaled.

    Raises:
        UnreadableImageError: the bytes are no image, are damaged, or would take too much to decode.
    """
    if isinstance(image, bytes):
        return np.asarray(_decoded(image, (height, width), interpolation))
    pixels = _three_channels(image)
    if pixels.shape[:2] == (height, width):
        return pixels
    if not pixels.size:
        raise UnreadableImageError(f"it has no pixels: {image.shape[0]} x {image.shape[1]}")
    return np.asarray(_fitted(Image.fromarray(np.ascontiguousarray(pixels)), height, width, interpolation))


def decoded(data: bytes) -> NDArray[np.uint8]:
    """Decodes the bytes of an image file to uint8 `[height, width, 3]` in its own size; errors as for `rgb_pixels`."""
    return np.asarray(_decoded(data, None, DEFAULT_FILTER))


def _decoded(data: bytes, wanted: tuple[int, int] | None, interpolation: Filter) -> Image.Image:
    header = read_header(data)
    if header is None:
        _refuse_unknown(data)
    check_size(header)
    check_scans(data, header)
    try:
        with warnings.catch_warnings():
            # Pillow's advice to programmers (large images, odd metadata); our own limits and reasons apply.
            warnings.simplefilter("ignore")
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                return _picture(image, header, wanted, interpolation)
    except UnreadableImageError:
        raise
    except UnidentifiedImageError:
        raise UnreadableImageError(
            f"a {header.form} file that is damaged or of a kind that is not read; save it as 8-bit RGB or grey"
        ) from None
    # Pillow's readers raise many kinds (OSError, SyntaxError, struct.error, ...) on damaged files.
    except Exception as error:
        why = str(error) or type(error).__name__
        raise UnreadableImageError(f"cannot be decoded: {why}; is the file complete?") from error


def _picture(
    image: Image.Image, header: ImageHeader, wanted: tuple[int, int] | None, interpolation: Filter
) -> Image.Image:
    if image.width * image.height > min(header.pixels, MAX_PIXELS):
        raise UnreadableImageError(
            f"its header says {header.width} x {header.height} pixels, its content {image.width} x {image.height}"
        )
    form = image.format
    if form == "TIFF":
        _check_planes(image)
    if wanted is not None:
        # JPEG can be decoded at 1/2, 1/4 or 1/8 for much less; twice the target leaves the rest to a good filter.
        # A square, since the orientation may swap the sides.
        image.draft("RGB", (2 * max(wanted),) * 2)
    image.load()
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)  # after loading: a TIFF is upright by then
    picture = _plain_colours(image, form)
    if wanted is not None:
        # Scaled before it is turned: that leaves the least to turn.
        height, width = reversed(wanted) if orientation in _SIDEWAYS else wanted
        picture = _fitted(picture, height, width, interpolation)
    if orientation in _UPRIGHT:
        picture = picture.transpose(_UPRIGHT[orientation])
    return picture.convert("RGB")


def _check_planes(image: Image.Image) -> None:
    """Refuses colours of 16 bits that lie in planes: Pillow takes each byte of a plane for a value."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    if tags.get(_PLANES) == _SEPARATE and max(tags.get(_BITS, (1,))) > 8:
        raise UnreadableImageError("a TIFF of more than 8 bits with a plane for each colour; save it pixel by pixel")


def _plain_colours(image: Image.Image, form: str | None) -> Image.Image:
    """Gives the image in RGB or grey, 8 bits each, without transparency."""
    if image.mode in ("RGB", "L"):
        return image
    # Pillow clips wider numbers at 255 instead of scaling them, which turns a photograph white.
    if image.mode.startswith("I;16") or (image.mode == "I" and form in ("PNG", "PPM")):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UnreadableImageError("pixel values beyond 16 bits")
        tags: Mapping[int, Any] = getattr(image, "tag_v2", {}) if form == "TIFF" else {}
        (bits,) = tags.get(_BITS, (16,))
        greys = (values >> (bits - 8)).astype(np.uint8)
        # Pillow heeds this for 8 bits only.
        return Image.fromarray(255 - greys if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else greys)
    if image.mode in ("I", "F"):
        raise UnreadableImageError(f"32-bit pixels (mode {image.mode}) have no known range; convert them to 8 bits")
    if image.mode in ("1", "LA", "La"):
        return image.convert("L")
    image.info.pop("transparency", None)  # of a palette: it would be refused a direct conversion
    return image.convert("RGB")


def _fitted(image: Image.Image, height: int, width: int, interpolation: Filter) -> Image.Image:
    box = centre_box(image.height, image.width, height, width)
    return resize_image(image, height, width, box, interpolation)


def _refuse_unknown(data: bytes) -> NoReturn:
    what = f"{len(data):,} bytes" if data else "it is empty"
    raise UnreadableImageError(f"not an image file of a known format, which are {', '.join(FORMATS)} ({what})")


def _three_channels(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    channels = pixels.shape[2]
    if channels in (1, 2):  # grey, grey with transparency
        return np.repeat(pixels[:, :, :1], 3, axis=2)
    return pixels[:, :, :3]
