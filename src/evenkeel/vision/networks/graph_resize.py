"""Scales maps as ONNX's Resize and Upsample do: along one axis after the other, by places or by weights.

Source: the ONNX operator specification, whose reference formulas stand in `_places`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["resized", "sizes_of_resize"]


def sizes_of_resize(attributes: dict[str, Any], inputs: Sequence[Tensor | None]) -> list[int]:
    """Gives the shape that a Resize makes, by its sizes or its scales.

    Raises:
        ValueError: it is of a kind that is not computed here.
    """
    images = inputs[0]
    assert images is not None
    if attributes.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise ValueError("it keeps proportions; export it with the sizes that follow from them")
    shape, axes = [int(size) for size in images.shape], attributes.get("axes", range(images.ndim))
    scales, sizes = _factors(attributes, inputs), inputs[3] if len(inputs) > 3 else None
    found = list(shape)
    for place, axis in enumerate(axes):
        if sizes is not None and sizes.numel():
            found[axis] = int(sizes[place])
        else:
            found[axis] = math.floor(shape[axis] * scales[place] + 1e-6)  # scales are of single precision
    return found


def resized(attributes: dict[str, Any], inputs: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    """Gives the maps at `sizes`; the first axis is of images, and stays.

    Raises:
        ValueError: it is of a kind that is not computed here.
    """
    values = inputs[0]
    assert values is not None
    if attributes.get("antialias", 0):
        raise ValueError("it blurs what it makes smaller (antialias), which is not computed here")
    scales = _factors(attributes, inputs)
    for axis in range(1, values.ndim):
        before, after = int(values.shape[axis]), sizes[axis]
        if before == after:
            continue
        factor = scales[axis] if len(scales) == values.ndim else 0.0
        if math.floor(before * factor + 1e-6) != after:
            factor = after / before
        places = _places(attributes, before, after, factor)
        if attributes.get("mode", "nearest") == "nearest":
            values = values.index_select(axis, torch.from_numpy(_nearest(attributes, places, before)).to(values.device))
        else:
            weights = torch.from_numpy(_weights(attributes, places, before)).to(values)
            last = values.ndim - 1
            values = (values.transpose(axis, last) @ weights).transpose(axis, last)
    return values


def _factors(attributes: dict[str, Any], inputs: Sequence[Tensor | None]) -> list[float]:
    if "scales" in attributes:
        return list(attributes["scales"])
    given = inputs[1] if len(inputs) == 2 else inputs[2] if len(inputs) > 2 else None  # the first form has no region
    return [] if given is None else [float(each) for each in given.tolist()]


def _places(attributes: dict[str, Any], before: int, after: int, factor: float) -> NDArray[np.float32]:
    """Says where on an axis of `before` numbers each of the `after` numbers lies."""
    # In single precision, as ONNX Runtime does: which of two places is nearer may hang on it.
    scale = np.float32(factor)
    usual = "half_pixel" if attributes["opset"] >= 11 else "asymmetric"
    how, numbers = attributes.get("coordinate_transformation_mode", usual), np.arange(after, dtype=np.float32)
    if how == "asymmetric":
        return numbers / scale
    if how == "align_corners":
        return numbers * np.float32((before - 1) / max(1, after - 1))
    if how == "tf_half_pixel_for_nn":
        return (numbers + np.float32(0.5)) / scale
    if how == "pytorch_half_pixel" and after == 1:
        return numbers
    if how in ("half_pixel", "pytorch_half_pixel"):
        return (numbers + np.float32(0.5)) / scale - np.float32(0.5)
    if how == "half_pixel_symmetric":
        return (
            np.float32(before / 2 * (1 - after / (factor * before)))
            + (numbers + np.float32(0.5)) / scale
            - np.float32(0.5)
        )
    raise ValueError(f"its coordinates are {how!r}, which are not computed here")


def _nearest(attributes: dict[str, Any], places: NDArray[np.float32], before: int) -> NDArray[np.int64]:
    how = attributes.get("nearest_mode", "round_prefer_floor" if attributes["opset"] >= 11 else "floor")
    halfway = places - np.floor(places) == 0.5
    chosen = {
        "round_prefer_floor": np.where(halfway, np.floor(places), np.rint(places)),
        "round_prefer_ceil": np.where(halfway, np.ceil(places), np.rint(places)),
        "floor": np.floor(places),
        "ceil": np.ceil(places),
    }[how]
    return chosen.clip(0, before - 1).astype(np.int64)


def _weights(attributes: dict[str, Any], places: NDArray[np.float32], before: int) -> NDArray[np.float32]:
    """Gives a matrix [before, after] of how much each number counts."""
    cubic = attributes["mode"] == "cubic"
    if attributes.get("exclude_outside", 0):
        raise ValueError("it leaves out what lies outside of a map, which is not computed here")
    places = places if cubic else places.clip(0, before - 1)
    low, found = np.floor(places), np.zeros((before, len(places)), np.float32)
    for step in (-1, 0, 1, 2) if cubic else (0, 1):
        apart = np.abs(places - (low + step))
        share = _cubic(apart, attributes.get("cubic_coeff_a", -0.75)) if cubic else 1 - apart
        np.add.at(found, ((low + step).clip(0, before - 1).astype(np.int64), np.arange(len(places))), share)
    return found


def _cubic(apart: NDArray[np.float32], bend: float) -> NDArray[np.float32]:
    near = ((bend + 2) * apart - (bend + 3)) * apart**2 + 1
    far = ((bend * apart - 5 * bend) * apart + 8 * bend) * apart - 4 * bend
    return np.where(apart <= 1, near, far)
