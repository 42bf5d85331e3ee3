"""One image, however it is kept, as RGB pixels of a wanted size."""

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from evenkeel.errors import UnreadableImageError

__all__ = ["MOST_PIXELS", "decoded", "rgb_pixels"]

MOST_PIXELS = 64_000_000  # of one image; more is taken for a decompression bomb

# Named, because Pillow's full list holds formats that start another program (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def rgb_pixels(image: bytes | NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """`image` as uint8 `[height, width, 3]`.

    Greyscale is repeated over the channels, transparency dropped, EXIF orientation obeyed. The shorter side (relative
    to the wanted shape) is scaled to fit, by Lanczos after a box filter where an image shrinks to less than a third,
    and the centre cut out. An image of the wanted size is not touched.

    Args:
        image: bytes of an image file, or pixels [h, w] or [h, w, 1..4 channels].
        height: wanted, pixels.
        width: wanted, pixels.

    Raises:
        UnreadableImageError: the bytes are no image, damaged, or more than `MOST_PIXELS`.
    """
    if isinstance(image, bytes):
        return _decoded(image, (height, width))
    pixels = _three_channels(image)
    if pixels.shape[:2] == (height, width):
        return pixels
    if not pixels.size:
        raise UnreadableImageError(f"it has no pixels: {image.shape[0]} x {image.shape[1]}")
    return _fitted(Image.fromarray(np.ascontiguousarray(pixels)), height, width)


def decoded(data: bytes) -> NDArray[np.uint8]:
    """The bytes of an image file as uint8 `[height, width, 3]` in its own size; errors as for `rgb_pixels`."""
    return _decoded(data, None)


def _decoded(data: bytes, wanted: tuple[int, int] | None) -> NDArray[np.uint8]:
    try:
        with Image.open(BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise UnreadableImageError(
                    f"{image.width} x {image.height} pixels; at most {MOST_PIXELS / 1e6:g} million are taken"
                )
            if wanted is None:
                return np.asarray(_as_rgb(ImageOps.exif_transpose(image), image.format))
            # JPEG can be decoded at 1/2, 1/4 or 1/8 for much less; twice the target leaves the rest to a good filter.
            # A square, since the orientation may swap the sides.
            image.draft("RGB", (2 * max(wanted),) * 2)
            return _fitted(_as_rgb(ImageOps.exif_transpose(image), image.format), *wanted)
    except UnreadableImageError:
        raise
    except UnidentifiedImageError:
        what = f"{len(data):,} bytes" if data else "it is empty"
        raise UnreadableImageError(f"no image file of a known form ({what})") from None
    # Pillow's readers raise many kinds (OSError, SyntaxError, struct.error, ...) on damaged files.
    except Exception as error:
        raise UnreadableImageError(f"cannot be decoded: {error}") from error


def _as_rgb(image: Image.Image, form: str | None) -> Image.Image:
    if image.mode == "RGB":
        return image
    # Pillow clips wider numbers at 255 instead of scaling them, which turns a photograph white.
    if image.mode.startswith("I;16") or (image.mode == "I" and form in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UnreadableImageError("pixel values beyond 16 bits")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnreadableImageError(f"32-bit pixels (mode {image.mode}) have no known range; convert them to 8 bits")
    if image.mode == "P":
        # By way of RGBA: a palette with transparency is refused a direct conversion.
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _fitted(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    if image.size != (width, height):
        scale = min(image.width / width, image.height / height)
        left, top = max(0.0, image.width - scale * width) / 2, max(0.0, image.height - scale * height) / 2
        box = (left, top, image.width - left, image.height - top)
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    return np.asarray(image)


def _three_channels(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    channels = pixels.shape[2]
    if channels in (1, 2):  # grey, grey with transparency
        return np.repeat(pixels[:, :, :1], 3, axis=2)
    return pixels[:, :, :3]
