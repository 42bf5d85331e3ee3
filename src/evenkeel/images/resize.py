"""Resizes pictures: the one resampling for images that are fitted to, benchmarked and served, and for tiles."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["DEFAULT_FILTER", "FILTERS", "Box", "Filter", "centre_box", "resize_image", "resized"]

Filter = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels

FILTERS: dict[str, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
DEFAULT_FILTER: Filter = "lanczos"
# A picture that shrinks to less than a third is averaged over whole blocks first; the filter does the rest. The result
# looks as if the filter had done all, and costs a fraction of it.
_GAP = 3.0


def centre_box(rows: int, columns: int, height: int, width: int) -> Box:
    """Finds the largest middle part of `rows` x `columns` pixels that has the proportions of `height` x `width`."""
    scale = min(columns / width, rows / height)
    left, top = max(0.0, columns - scale * width) / 2, max(0.0, rows - scale * height) / 2
    return (left, top, columns - left, rows - top)


def resize_image(
    image: Image.Image, height: int, width: int, box: Box | None = None, interpolation: Filter = DEFAULT_FILTER
) -> Image.Image:
    """Scales `image`, or the part of it in `box`, to `height` x `width`; gives itself where there is nothing to do.

    Shrinking is antialiased (the filter's reach grows with the factor), except with "nearest". It takes no more memory
    than the larger of the two pictures does.
    """
    whole = (0.0, 0.0, float(image.width), float(image.height))
    box = whole if box is None else box
    if image.size == (width, height) and box == whole:
        return image
    resampling, gap = FILTERS[interpolation], None if interpolation == "nearest" else _GAP
    left, top, right, bottom = box
    if right - left < width and bottom - top > height:
        # Pillow scales rows first; a narrow, high picture would become a wide, high one in between.
        image = image.resize((image.width, height), resampling, box=(0, top, image.width, bottom), reducing_gap=gap)
        box = (left, 0, right, height)
    return image.resize((width, height), resampling, box=box, reducing_gap=gap)


def resized(
    picture: NDArray[Any], height: int, width: int, box: Box | None = None, interpolation: Filter = DEFAULT_FILTER
) -> NDArray[Any]:
    """Scales `picture` [h, w, 3], uint8 or floating point, as `resize_image` does; floating point becomes float32."""
    if picture.dtype == np.uint8:
        image = Image.fromarray(np.ascontiguousarray(picture))
        return np.asarray(resize_image(image, height, width, box, interpolation))
    channels = (Image.fromarray(np.ascontiguousarray(picture[..., each], np.float32)) for each in range(3))
    return np.stack([np.asarray(resize_image(each, height, width, box, interpolation)) for each in channels], axis=-1)
